"""Which backend runs a call: `auto` picks the fastest that is there, an explicit one that is missing raises."""

import importlib
import warnings

import torch
from torch import Tensor

from rlhf_kernels.cuda import extension
from rlhf_kernels.native import BACKENDS, asked_by_environment

REMEDY = "build it with `pip install -e .` (a C compiler is needed)"
_NATIVE_FOR_DEVICE = {"cpu": "cython", "cuda": "cuda", "meta": "cython"}  # meta: shapes only


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and is not built, or cannot work on these tensors."""


class KernelFallbackWarning(UserWarning):
    """`auto` found no native kernel for a device and uses the slow reference code instead."""


def _try_import(module: str) -> str | None:
    """None when the compiled module loads, else why it does not."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return None


_WHY_MISSING: dict[str, str | None] = {
    "reference": None,
    "cython": _try_import("rlhf_kernels.cpu.linear"),
}
_warned: set[str] = set()


def _why_missing(name: str) -> str | None:
    if name == "cuda":
        return extension.why_missing()
    reason = _WHY_MISSING[name]
    return None if reason is None else f"{reason}; {REMEDY}"


def available_backends() -> tuple[str, ...]:
    """The backends that can be named explicitly in this installation."""
    return tuple(name for name in BACKENDS if name != "auto" and _why_missing(name) is None)


def choose_backend(
    backend: str, tensor: Tensor, native_dtypes: tuple[torch.dtype, ...], *, lacking: tuple[str, ...] = ()
) -> str:
    """The backend that runs this call: `reference`, `cython` or `cuda`.

    Args:
        backend: what the caller asked for. `auto` yields to the environment variable RLHF_KERNELS_BACKEND, unless that
            is empty.
        tensor: the argument whose device and dtype decide.
        native_dtypes: what the native kernel takes; `auto` sends any other dtype to the reference.
        lacking: backends that have no kernel for this function.

    Raises:
        ValueError: no such backend, or none of the name in the environment, whatever the caller asked for.
        BackendUnavailableError: a backend that is not built, or is for another device.
        TypeError: a native backend was named and does not take this dtype.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    named = asked_by_environment()  # looked at whatever the caller asked for
    asked = named if backend == "auto" else backend
    if asked == "reference":
        return asked
    native = _NATIVE_FOR_DEVICE.get(tensor.device.type)
    if asked == "auto":
        return _choose_automatically(native, tensor, native_dtypes, lacking)
    if (reason := _why_missing(asked)) is not None:
        raise BackendUnavailableError(f"backend {asked!r} is not available ({reason})")
    if asked != native:
        raise BackendUnavailableError(
            f"backend {asked!r} cannot run on a tensor on {tensor.device}; use backend='auto'"
        )
    if asked in lacking:
        raise BackendUnavailableError(f"backend {asked!r} has no kernel for this function; use backend='auto'")
    if tensor.dtype not in native_dtypes:
        names = ", ".join(str(dtype) for dtype in native_dtypes)
        raise TypeError(f"backend {asked!r} takes {names}, got {tensor.dtype}; backend='reference' takes it")
    return asked


def _choose_automatically(
    native: str | None, tensor: Tensor, native_dtypes: tuple[torch.dtype, ...], lacking: tuple[str, ...]
) -> str:
    device = tensor.device.type
    if native == "cython" and tensor.dtype not in native_dtypes:
        return "reference"
    if native is None:
        reason: str | None = f"there is no native kernel for {device}"
    elif native in lacking:
        reason = f"this function has no kernel for {device}"
    elif tensor.dtype not in native_dtypes:
        reason = f"the {device} kernel does not take {tensor.dtype}"
    else:
        reason = _why_missing(native)
    if reason is None:
        assert native is not None
        return native
    _warn_once(f"rlhf_kernels runs its slow reference code on {device}: {reason}")
    return "reference"


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, KernelFallbackWarning, stacklevel=5)
