"""Native CPU code that has no operator of its own: which tensors it takes, and how a profile shows it."""

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

BACKENDS = ("auto", "reference", "cython", "cuda")
ENVIRONMENT_VARIABLE = "RLHF_KERNELS_BACKEND"
_REFERENCE_HAS = f"native functions of rlhf_kernels have one with {ENVIRONMENT_VARIABLE}=reference"
_NO_TANGENT = (
    f"native functions of rlhf_kernels have no forward-mode derivative; {ENVIRONMENT_VARIABLE}=reference has one"
)
_PLAIN = (Tensor, Parameter)


def asked_by_environment() -> str:
    """Return the backend that the environment variable names, `auto` where it is not set or empty.

    Raises:
        ValueError: it names none.
    """
    try:
        asked = os.environ[ENVIRONMENT_VARIABLE] or "auto"  # `get` takes half as long again where it is not set
    except KeyError:
        return "auto"
    if asked not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} is {asked!r}; choose one of {', '.join(BACKENDS)}")
    return asked


def native_serves(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether tensors are on the CPU, of one of the dtypes, and nobody asked for the reference instead.

    Subclasses are torch's to serve: many have no memory of their own (fake, nested and distributed tensors). So is what
    is negative only by a flag.

    Raises:
        ValueError: the environment variable names no backend, and the rest would be served.
        RuntimeError: one of them carries a tangent, and the rest would be served.
    """
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:  # a loop, because this is asked before every operator
        if tensor is not None and not (
            tensor.dtype in dtypes and tensor.is_cpu and type(tensor) in _PLAIN and not tensor.is_neg()
        ):
            return False
    if asked_by_environment() == "reference":
        return False
    if forward_ad._current_level >= 0:
        refuse_tangents(*tensors)
    return True


def carries_tangent(*tensors: Tensor | None) -> bool:
    """Whether a tensor has a tangent of forward-mode differentiation (`torch.autograd.forward_ad`)."""
    if forward_ad._current_level < 0:  # nobody differentiates that way: the one question that every call has to pay for
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise RuntimeError if a tensor carries a tangent, which native code would lose without a word."""
    if carries_tangent(*tensors):
        raise RuntimeError(_NO_TANGENT)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a backward pass refuse a second derivative, also where only what was saved for it asks for one.

    torch's `once_differentiable` refuses where the upstream gradient asks for it, and gives zeros elsewhere. A tangent
    in the upstream gradients is refused too. The backward pass returns a tuple.
    """
    words = f"{backward.__qualname__.removesuffix('.backward')} has no second derivative; {_REFERENCE_HAS}"

    @functools.wraps(backward)
    def refusing(ctx: Any, *grads: Any) -> Any:
        refuse_tangents(*grads)
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # without create_graph
            return gradients
        refuse: Any = torch._C._functions.DelayedError(words, len(gradients))
        return refuse(*(None if one is None else one.detach().requires_grad_() for one in gradients))

    return refusing


def shown_as(name: str) -> AbstractContextManager[None]:
    """Let torch's profiler, where it runs, show what is done meanwhile as an operator ``rlhf_kernels::name``."""
    recorded = torch._C._profiler._RecordFunctionFast(f"rlhf_kernels::{name}")
    return cast("AbstractContextManager[None]", recorded)
