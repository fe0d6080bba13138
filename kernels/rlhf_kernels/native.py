"""Native CPU code that has no operator of its own: which tensors it takes, and how a profile shows it."""

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

ENVIRONMENT_VARIABLE = "RLHF_KERNELS_BACKEND"
_NO_SECOND_DERIVATIVE = "native functions of rlhf_kernels have no second derivative; RLHF_KERNELS_BACKEND=reference has"
_PLAIN = (Tensor, Parameter)


def native_serves(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether tensors are on the CPU, of one of the dtypes, and nobody asked for the reference instead.

    Subclasses are torch's to serve: many have no memory of their own (fake, nested and distributed tensors). So is what
    is negative only by a flag.
    """
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:  # a loop, because this is asked before every operator
        if tensor is not None and not (
            tensor.dtype in dtypes and tensor.is_cpu and type(tensor) in _PLAIN and not tensor.is_neg()
        ):
            return False
    return os.environ.get(ENVIRONMENT_VARIABLE) != "reference"


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a backward pass refuse a second derivative, also where only what was saved for it asks for one.

    torch's `once_differentiable` refuses where the upstream gradient asks for it, and gives zeros elsewhere.
    """

    @functools.wraps(backward)
    def refusing(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # without create_graph
            return gradients
        refuse: Any = torch._C._functions.DelayedError(_NO_SECOND_DERIVATIVE, len(gradients))
        return refuse(*(None if one is None else one.detach().requires_grad_() for one in gradients))

    return refusing


def shown_as(name: str) -> AbstractContextManager[None]:
    """Let torch's profiler, where it runs, show what is done meanwhile as an operator ``rlhf_kernels::name``."""
    recorded = torch._C._profiler._RecordFunctionFast(f"rlhf_kernels::{name}")
    return cast("AbstractContextManager[None]", recorded)
