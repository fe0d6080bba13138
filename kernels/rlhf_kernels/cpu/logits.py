"""The logits of hidden states one part at a time, on the CPU, and the memory in which some of them can be kept.

A part is [ROWS, COLUMNS], at most 8 MiB of float32. The parts do not depend on the number of threads, and COLUMNS is a
multiple of the block of moments.h: what is carried from part to part gives the bits of whole rows.

Shapes: N rows, H hidden size, V vocabulary, C columns of a part.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.cpu.launch import output
from rlhf_kernels.memory import reusable
from rlhf_kernels.products import multiplies, multiply, multiply_widened, widens_these

ROWS = 1024
COLUMNS = 2048


class Part(NamedTuple):
    """Rows of the hidden states, columns of the vocabulary, and the logits where they meet."""

    rows: slice
    columns: slice
    logits: Tensor
    room: Tensor
    """Where something of the same shape can be written: these very logits, unless they are kept."""


class KeptLogits:
    """Logits of the first rows, in the memory in which the backward pass makes the gradient of the weight.

    There a part of the gradient is written when the logits of the same columns have been read, and is no smaller.
    """

    def __init__(self, rows: int, weight_VH: Tensor) -> None:
        """Have room for up to ``rows`` rows, as the weight's shape will have it."""
        self.rows = min(rows, ROWS, weight_VH.shape[1])
        self.memory_VH = reusable(weight_VH.shape, weight_VH.dtype)

    def of(self, columns: slice) -> Tensor:
        """Return [rows, C] those of some columns of the vocabulary."""
        shape = self.rows, columns.stop - columns.start
        return self.memory_VH[columns].view(-1)[: math.prod(shape)].view(shape)


def parts(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    kept: KeptLogits | None = None,
    read: Tensor | None = None,
) -> Iterator[Part]:
    """Yield every part of the logits in turn, the vocabulary being the outer loop.

    All live in one buffer, but for those that are kept. A part belongs to the caller until the next is asked for.

    Args:
        hidden_NH: hidden states.
        weight_VH: the head.
        bias_V: its bias.
        kept: keeps the logits of the first rows.
        read: which of the rows that were kept the first rows are: they are read and not computed.
    """
    n, vocabulary = hidden_NH.shape[0], weight_VH.shape[0]
    buffer = output(torch.Size((min(n, ROWS) * min(vocabulary, COLUMNS),)), hidden_NH.dtype)
    keeping = kept.rows if kept is not None and read is None else 0
    known = 0 if read is None else len(read)
    in_place = kept is not None and (keeping > 0 or known == kept.rows == min(n, ROWS))
    blocks = [slice(0, keeping)] * (keeping > 0) + [slice(at, min(at + ROWS, n)) for at in range(keeping, n, ROWS)]
    for first in range(0, vocabulary, COLUMNS):
        columns = slice(first, min(first + COLUMNS, vocabulary))
        for rows in blocks:
            shape = rows.stop - rows.start, columns.stop - first
            room = logits = buffer[: math.prod(shape)].view(shape)
            there = 0
            if kept is not None and rows.start == 0:
                there = known
                if in_place:
                    logits = kept.of(columns)
                elif read is not None:
                    torch.index_select(kept.of(columns), 0, read, out=room[:known])
            if there < shape[0]:
                bias_C = None if bias_V is None else bias_V[columns]
                product_into(logits[there:], hidden_NH[rows][there:], weight_VH[columns].T, bias_C)
            yield Part(rows, columns, logits, room)


def product_into(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, *, add: bool = False) -> None:
    """Make ``out`` a b + bias; or ``add`` a b to it, in its own dtype."""
    assert bias is None or not add
    if multiplies(out, a, b, bias):
        multiply(a, b, bias, out_MN=out, add=add)
    elif widens_these(a, b, bias):
        multiply_widened(a, b, bias, out_MN=out, add=add)
    elif out.dtype != a.dtype:
        torch.add(out if add else out.new_zeros(()), a @ b, out=out)
    elif add or bias is not None:
        torch.addmm(out if bias is None else bias, a, b, out=out)
    else:
        torch.mm(a, b, out=out)
