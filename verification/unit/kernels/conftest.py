from collections.abc import Iterator

import pytest
import torch

import rlhf_kernels


@pytest.fixture(params=[name for name in rlhf_kernels.available_backends() if name != "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Fixed random inputs, and the number of threads put back."""
    threads = torch.get_num_threads()
    torch.manual_seed(20260101)
    yield
    torch.set_num_threads(threads)
