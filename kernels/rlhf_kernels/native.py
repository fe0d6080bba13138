"""Which tensors the native CPU code takes that has no operator of its own, and calls of it that are made later."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "RLHF_KERNELS_BACKEND"

Call = Callable[[], object]
Prepared = tuple[Tensor, list[Call]]
"""Where a result will be, and the calls that put it there from what is in their inputs then."""


def native_serves(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether tensors are on the CPU, of one of the dtypes, and nobody asked for the reference instead."""
    for tensor in tensors:  # a loop, because this is asked before every operator
        if tensor is not None and not (tensor.dtype in dtypes and tensor.is_cpu):
            return False
    return os.environ.get(ENVIRONMENT_VARIABLE) != "reference" and not torch.compiler.is_compiling()


def later(function: Callable[..., object], *arguments: Any, over: tuple[Tensor | None, ...]) -> Call:
    """Return a call of native code, which is given addresses of tensors and so must keep those from being freed."""
    call: Any = partial(function, *arguments)
    call.over = over
    return cast("Call", call)


def done(prepared: Prepared) -> Tensor:
    """Return a result once its calls are made."""
    result, calls = prepared
    for call in calls:
        call()
    return result
