"""Tensors beside pages of memory that must not be read: a process that does, dies."""

import ctypes
import mmap

import torch

_libc = ctypes.CDLL(None, use_errno=True)
_kept: list[mmap.mmap] = []


def fenced(tensor: torch.Tensor, at_start: bool) -> torch.Tensor:
    """Return a copy that touches such a page: the one before its first byte, or the one behind its last."""
    page = mmap.PAGESIZE
    pages = -(-max(tensor.nbytes, 1) // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (first, first + (pages + 1) * page):
        assert _libc.mprotect(ctypes.c_void_p(fence), page, 0) == 0
    offset = page if at_start else (pages + 1) * page - tensor.nbytes
    _kept.append(memory)
    copied = torch.frombuffer(memory, dtype=torch.uint8, count=tensor.nbytes, offset=offset)
    return copied.view(tensor.dtype).view(tensor.shape).copy_(tensor)
