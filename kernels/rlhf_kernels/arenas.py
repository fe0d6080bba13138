"""Pieces of memory that programs work in: that of a pass that is over serves the next.

New memory costs its pages, and leaves holes when it is given back.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_free: list[Tensor] = []
"""Arenas that nobody works in, as many as there were at the same time."""


def new(size: int) -> Tensor:
    """Return memory for so many float32 numbers."""
    return torch.empty(size, dtype=torch.float32, device="cpu")  # whatever torch's defaults are just now


def take(size: int) -> Tensor:
    """Return an arena of at least this size, for :func:`give` to give back; a smaller one that is free is let go."""
    try:
        arena = _free.pop()
    except IndexError:
        return new(size)
    return arena if arena.numel() >= size else new(size)


def give(arena: Tensor) -> None:
    """Let others have an arena."""
    _free.append(arena)


def keep(most: int) -> None:
    """Let go of arenas that nobody works in, the smallest first, until no more than ``most`` are left."""
    _free.sort(key=Tensor.numel)
    del _free[: max(0, len(_free) - most)]


@contextmanager
def lent(size: int) -> Iterator[Tensor]:
    """Take an arena and give it back in the end."""
    arena = take(size)
    try:
        yield arena
    finally:
        give(arena)
