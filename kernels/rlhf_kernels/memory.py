"""Memory for large results, which the next of the same size can have when they are gone.

New memory costs its pages: the system fills each with zeros when it is first written. Gradients of a minibatch are as
large as those of the one before.
"""

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

try:
    from rlhf_kernels.cpu.launch import output
except ImportError:  # not built

    def output(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An empty tensor."""
        return torch.empty(shape, dtype=dtype, device="cpu")


LARGE = 1 << 20
"""Bytes from which it pays."""

_free: dict[int, list[Tensor]] | None = None
"""Memory that is free, by bytes; None where it goes back to the system."""


@contextmanager
def reused() -> Iterator[None]:
    """Let memory of :func:`reusable` serve again meanwhile, if the same size is asked for before any other."""
    global _free
    outer = _free
    _free = {} if outer is None else outer
    try:
        yield
    finally:
        _free = outer


def reusable(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return an empty tensor that is about to be written as a whole."""
    size = math.prod(shape) * dtype.itemsize
    if _free is None or size < LARGE:
        return output(shape, dtype)
    try:
        memory = _free[size].pop()
    except (KeyError, IndexError):
        _free.clear()  # what is there fits no more
        memory = output(torch.Size((size,)), torch.uint8)
    # A tensor over an array lets the array go when its last view is gone.
    lent = memory.numpy()[:]
    weakref.finalize(lent, _give_back, memory).atexit = False
    return torch.from_numpy(lent).view(dtype).view(shape)


def _give_back(memory: Tensor) -> None:
    if _free is not None:
        _free.setdefault(memory.nbytes, []).append(memory)
