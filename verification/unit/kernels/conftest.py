from collections.abc import Iterator

import pytest
import torch
from cuda_kernels import DeviceKernels, EmulatedKernels, compile_emulation, why_no_device_kernels

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


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory):
    return compile_emulation(tmp_path_factory.mktemp("emulated_cuda"))


@pytest.fixture(scope="session")
def emulated(emulated_library):
    return EmulatedKernels(emulated_library)


@pytest.fixture(params=["emulated", pytest.param("device", marks=pytest.mark.cuda)])
def kernels(request):
    if request.param == "device":
        if (reason := why_no_device_kernels()) is not None:
            pytest.skip(f"no CUDA kernels: {reason}")
        return DeviceKernels("cuda")
    emulated = request.getfixturevalue("emulated")
    emulated.set_order(0)
    return emulated
