"""Loads the CUDA kernels when the first CUDA tensor needs them: importing the package touches no GPU."""

import functools
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("librlhf_kernels_cuda.so")
MIN_CAPABILITY = (8, 0)


@functools.cache
def _load() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU"
    lowest = min(torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count()))
    if lowest < MIN_CAPABILITY:
        return (
            f"a GPU has compute capability {lowest[0]}.{lowest[1]}, {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} is needed"
        )
    if not LIBRARY.is_file():
        return "it is not built; build it with `RLHF_KERNELS_CUDA=1 pip install -e .` (needs the CUDA toolkit)"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error}; build it anew with `RLHF_KERNELS_CUDA=1 pip install -e .`"
    return None


def why_missing() -> str | None:
    """None when the CUDA kernels are ready, else why they are not and what to do. The first call loads them."""
    return _load()


# What torch.compiler.assume_constant_result does, without importing the compiler: a graph may hold the answer.
why_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
