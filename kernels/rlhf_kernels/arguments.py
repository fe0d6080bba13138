"""What a user passes is checked here: each error names the value, its place and the rule."""

import math
import operator
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from rlhf_kernels.native import carries_tangent

MIN_TEMPERATURE = 1e-30
HUGE_TEMPERATURE = 1e36
"""From here on logits may differ by more than float32 holds and neither have probability 0: softmax(x / T) is computed
as softmax((x / 2) / (T / 2)), in which every difference is held, and no number that matters loses a bit."""


class Rule(NamedTuple):
    """What a number must be: a test of it, and the words that follow its value in an error."""

    fits: Callable[[Any], bool]
    says: str


FRACTION = Rule(lambda x: 0.0 <= x <= 1.0, "must be a number in [0, 1]")
TEMPERATURE = Rule(lambda x: MIN_TEMPERATURE <= x < math.inf, f"must be a finite number of at least {MIN_TEMPERATURE}")
SCALE = Rule(math.isfinite, "must be a finite number")
TOP_K = Rule(lambda x: operator.index(x) >= 0, "must be a whole number, 0 (off) or positive")
TOP_P = Rule(lambda x: 0.0 < x <= 1.0, "must be a number in (0, 1]; 1.0 is off")
IGNORED = Rule(lambda x: x is None or operator.index(x) == x, "must be a whole number, or None for no such label")


def require_tensors(**arguments: object) -> None:
    """Raise TypeError with the name and the value of the first argument that is no tensor."""
    for name, argument in arguments.items():
        if not isinstance(argument, Tensor):
            raise TypeError(f"{name} is {reprlib.repr(argument)}; it must be a torch.Tensor")


def require_number(name: str, number: Any, rule: Rule) -> None:
    """Raise TypeError for what is no number, ValueError for a number that breaks the rule."""
    try:
        fits = rule.fits(number)
    except (TypeError, RuntimeError):  # None, a string; a tensor of several numbers, or on the meta device
        raise TypeError(f"{name} is {reprlib.repr(number)}; it {rule.says}") from None
    if not fits:
        raise ValueError(f"{name} is {number}; it {rule.says}")


def require_rank(name: str, tensor: Tensor, rank: int) -> None:
    """Raise ValueError unless the tensor has so many dimensions."""
    if tensor.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions, got shape {tuple(tensor.shape)}")


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the tensor has this shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def require_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError unless the tensor has one of these dtypes."""
    if tensor.dtype not in dtypes:
        remedy = f"; pass {name}.long()" if dtypes == (torch.int64,) else ""
        raise TypeError(f"{name} must be {' or '.join(str(d) for d in dtypes)}, got {tensor.dtype}{remedy}")


def require_device(name: str, tensor: Tensor, other: Tensor) -> None:
    """Raise ValueError unless the tensor is where the other is."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, the other arguments on {other.device}")


def require_like(name: str, tensor: Tensor, other: Tensor, shape: torch.Size | None = None) -> None:
    """Raise unless the tensor has dtype, device and (by default) shape of the other."""
    require_shape(name, tensor, other.shape if shape is None else shape)
    require_dtype(name, tensor, (other.dtype,))
    require_device(name, tensor, other)


def require_labels(labels: Tensor, shape: torch.Size, other: Tensor) -> None:
    """Raise unless the labels are int64, of this shape, and where the other is."""
    require_shape("labels", labels, shape)
    require_dtype("labels", labels, (torch.int64,))
    require_device("labels", labels, other)


def as_mask(mask: Tensor, other: Tensor) -> Tensor:
    """Return a mask of zeros and ones, of any dtype and the other's shape, as bool."""
    require_shape("mask", mask, other.shape)
    require_device("mask", mask, other)
    if mask.dtype == torch.bool:
        return mask
    if has_values(mask):
        require_none("mask", mask, (mask != 0) & (mask != 1), "must be 0 or 1")
    return mask != 0


def per_token(name: str, number: float | Tensor, other: Tensor, mask: Tensor) -> float | Tensor:
    """The number, or the tensor expanded to the other's shape; either in [0, 1] where it counts."""
    if not isinstance(number, Tensor):
        require_number(name, number, FRACTION)
        return number
    require_dtype(name, number, (other.dtype,))
    require_device(name, number, other)
    try:
        each = number.expand(other.shape)
    except RuntimeError as error:
        raise ValueError(f"{name} must expand to shape {tuple(other.shape)}, got {tuple(number.shape)}") from error
    if has_values(each):
        require_none(name, each, ~((each >= 0.0) & (each <= 1.0)) & mask, "must be in [0, 1]")
    return each


def has_data(tensor: Tensor) -> bool:
    """Whether a tensor is more than a shape: neither on the meta device nor fake."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def has_values(tensor: Tensor) -> bool:
    """Whether values can be looked at: not while tracing or capturing a CUDA graph, and not without data."""
    if torch.compiler.is_compiling() or not has_data(tensor):
        return False
    return not (tensor.is_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def require_none(name: str, tensor: Tensor, bad: Tensor, rule: str) -> None:
    """Raise ValueError with the first value that is bad, its position and the rule."""
    if bad.any():
        position = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(f"{name} is {tensor[position].item()} at position {position}; it {rule}")


def require_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is finite, not too small to divide by, and asks for no gradient."""
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        raise ValueError("temperature has no gradient: pass a number, or divide the logits by the tensor yourself")
    require_number("temperature", temperature, TEMPERATURE)


def refuse_gradient(function: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError if one of the tensors asks for a gradient that a function does not have, or has a tangent."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{function} has no gradient: pass detached tensors, or call it under torch.no_grad()")
    refuse_tangent(function, *tensors)


def refuse_tangent(function: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError if one of the tensors has a tangent, of a function that no backend differentiates that way."""
    if carries_tangent(*tensors):
        raise RuntimeError(f"{function} has no forward-mode derivative: pass detached tensors")


def require_labels_in_range(labels: Tensor, vocabulary: int, ignore_index: int | None) -> None:
    """Raise IndexError with the first label outside [0, vocabulary) that is not ignored, and its position."""
    if not has_values(labels):  # gather checks them when it runs
        return
    bad = (labels < 0) | (labels >= vocabulary)
    if ignore_index is not None:
        bad &= labels != ignore_index
    if bad.any():
        position = tuple(int(i) for i in bad.nonzero()[0])
        hint = "" if ignore_index is not None else "; pass ignore_index for labels that do not count"
        raise IndexError(f"label {int(labels[position])} at position {position} is outside [0, {vocabulary}){hint}")


def require_distributions(logits: Tensor) -> None:
    """Raise ValueError with the first row of logits [N, V] whose softmax is no distribution."""
    if not has_values(logits):
        return
    bad = ~logits.amax(-1).isfinite() if logits.numel() else torch.zeros(0, dtype=torch.bool)
    if bad.any():  # amax propagates NaN
        raise ValueError(f"logits of row {int(bad.nonzero()[0])} are no distribution: NaN, +inf, or nothing but -inf")


def require_uniforms(uniforms: Tensor) -> None:
    """Raise ValueError with the first uniform number [N] outside [0, 1)."""
    if not has_values(uniforms):
        return
    bad = ~((uniforms >= 0.0) & (uniforms < 1.0))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"uniform {float(uniforms[row])} of row {row} is outside [0, 1)")
