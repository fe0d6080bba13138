"""Which tensors the native CPU code takes that has no operator of its own."""

import os

import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "RLHF_KERNELS_BACKEND"


def native_serves(tensor: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether a tensor is on the CPU, of one of the dtypes, and nobody asked for the reference instead."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in dtypes
        and os.environ.get(ENVIRONMENT_VARIABLE) != "reference"
        and not torch.compiler.is_compiling()
    )
