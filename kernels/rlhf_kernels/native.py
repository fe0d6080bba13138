"""Native CPU code that has no operator of its own: which tensors it takes, and how a profile shows it."""

import os
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "RLHF_KERNELS_BACKEND"


def native_serves(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether tensors are on the CPU, of one of the dtypes, and nobody asked for the reference instead."""
    for tensor in tensors:  # a loop, because this is asked before every operator
        if tensor is not None and not (tensor.dtype in dtypes and tensor.is_cpu):
            return False
    return os.environ.get(ENVIRONMENT_VARIABLE) != "reference" and not torch.compiler.is_compiling()


def shown_as(name: str) -> AbstractContextManager[None]:
    """Let torch's profiler, where it runs, show what is done meanwhile as an operator ``rlhf_kernels::name``."""
    recorded = torch._C._profiler._RecordFunctionFast(f"rlhf_kernels::{name}")
    return cast("AbstractContextManager[None]", recorded)
