"""Causal attention whose results for a query depend on its row alone: on no other row, no padding and no threads.

So a token that is drawn over a cache, and the same token in a whole row, give the same bits. Float32 on the CPU, native
code only. Vaswani et al., "Attention Is All You Need" (2017), eq. 1; heads may share keys and values in groups
(Ainslie et al., "GQA", 2023).

Shape suffixes: N tokens of all rows side by side, B rows, H heads, G key-value heads, K head width, S places of a
cache.
"""

from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from rlhf_kernels.arguments import (
    SCALE,
    require_dtype,
    require_number,
    require_rank,
    require_shape,
    require_tensors,
)
from rlhf_kernels.dispatch import REMEDY, BackendUnavailableError
from rlhf_kernels.native import ENVIRONMENT_VARIABLE, asked_by_environment, differentiable_once, native_serves

_native: Any
try:
    from rlhf_kernels.cpu import _attention as _native
    from rlhf_kernels.cpu import launch
except ImportError:  # not built
    _native = None

LANES = 16


def attends(x: Tensor) -> bool:
    """Whether this module's functions serve tensors like this one."""
    return _native is not None and native_serves(x)


def attend(query_NHK: Tensor, key_NGK: Tensor, value_NGK: Tensor, starts: Tensor, scale: float) -> Tensor:
    """Return softmax(scale Q Kᵀ) V of rows that lie side by side, each query over its row up to itself.

    Args:
        query_NHK: [N, H, K] float32, as the others.
        key_NGK: [N, G, K], G a divisor of H.
        value_NGK: [N, G, K].
        starts: [B + 1] int64, where each row begins, and N.
        scale: of the scores.

    Returns:
        [N, H, K], differentiable once.

    Raises:
        ValueError: a shape, or ``starts``, that does not fit.
        TypeError: a tensor that is not float32 on the CPU, or a dtype of ``starts``.
        BackendUnavailableError: native code is not built, or the environment asks for the reference: there is none.
    """
    _require_heads(query_NHK, key_NGK, value_NGK)
    _require_starts(starts, query_NHK.shape[0])
    require_number("scale", scale, SCALE)
    if torch.is_grad_enabled() and (query_NHK.requires_grad or key_NGK.requires_grad or value_NGK.requires_grad):
        return cast("Tensor", _Attend.apply(query_NHK, key_NGK, value_NGK, starts, scale))
    return _attended(query_NHK, key_NGK, value_NGK, starts, scale)[0]


def _require_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise unless these are float32 on the CPU, [N, H, K] and twice [N, G, K], G a divisor of H."""
    require_tensors(query=query, key=key, value=value)
    if _native is None or not native_serves(query, key, value):  # asked once for the three
        _refuse(query=query, key=key, value=value)
    if not _fit(query.shape, key.shape, value.shape):  # asked as a whole: it takes less than an attention of few tokens
        _refuse_shapes(query, key, value)


def _refuse(**heads: Tensor) -> NoReturn:
    """Raise what keeps native code from serving one of these."""
    for name, x in heads.items():
        if x.dtype != torch.float32 or not x.is_cpu:
            raise TypeError(f"{name} is {x.dtype} on {x.device}; native attention takes float32 on the CPU")
    if _native is None:
        raise BackendUnavailableError(f"attention has native code alone, which is not available; {REMEDY}")
    if asked_by_environment() == "reference":
        raise BackendUnavailableError(
            f"attention has native code alone, and {ENVIRONMENT_VARIABLE} is 'reference', which turns it off;"
            " set it to auto, or call torch.nn.functional.scaled_dot_product_attention"
        )
    kinds = ", ".join(f"{name} is a {type(x).__name__}" for name, x in heads.items())
    raise TypeError(f"{kinds}; native attention takes plain tensors, neither traced nor negative by a flag")


def _fit(query: torch.Size, key: torch.Size, value: torch.Size) -> bool:
    """Whether these are [N, H, K] and twice [N, G, K], G a divisor of H."""
    if not len(query) == len(key) == 3 or key != value:
        return False
    (tokens, heads, width), (key_tokens, shared, key_width) = query, key
    return key_tokens == tokens and key_width == width and shared > 0 and heads % shared == 0


def _refuse_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise what does not :func:`_fit`."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        require_rank(name, x, 3)
    (tokens, heads, width), shared = query.shape, key.shape[1]
    if shared == 0 or heads % shared:
        raise ValueError(f"query has {heads} heads, which the {shared} of key do not divide")
    require_shape("key", key, torch.Size((tokens, shared, width)))
    require_shape("value", value, key.shape)


def _require_starts(starts: Tensor, tokens: int) -> None:
    """Raise unless ``starts`` [B + 1] goes up from 0 to the number of tokens."""
    require_tensors(starts=starts)
    require_rank("starts", starts, 1)
    require_dtype("starts", starts, (torch.int64,))
    places = starts.tolist()  # operators on tensors would take longer than the attention of a few tokens
    if not places or places[0] != 0 or places[-1] != tokens or places != sorted(places):
        raise ValueError(f"starts is {places}; it must go up from 0 to the {tokens} tokens there are")


class Cache:
    """Keys and values of the tokens so far, row by row, each row with a length of its own."""

    def __init__(self, key_NGK: Tensor, value_NGK: Tensor, starts: Tensor, more: int) -> None:
        """Hold those of rows that lie side by side, with room for ``more`` tokens each.

        Raises:
            ValueError, TypeError, BackendUnavailableError: as :func:`attend`.
        """
        _require_heads(key_NGK, key_NGK, value_NGK)
        _require_starts(starts, len(key_NGK))
        lengths_B = starts.diff()
        rows, (_, shared, width) = len(lengths_B), key_NGK.shape
        room = -(-(int(lengths_B.max()) + more) // LANES) * LANES
        row_N = torch.repeat_interleave(torch.arange(rows), lengths_B)
        place_N = torch.arange(len(key_NGK)) - starts[row_N]
        # Sixteen keys side by side in a block, each in a column of it.
        self.keys = key_NGK.new_zeros(rows, shared, room // LANES, width, LANES)
        self.keys.permute(0, 2, 4, 1, 3)[row_N, place_N // LANES, place_N % LANES] = key_NGK
        self.values_BGSK = value_NGK.new_zeros(rows, shared, room, width)
        self.values_BGSK.transpose(1, 2)[row_N, place_N] = value_NGK

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, in this order."""
        self.keys, self.values_BGSK = self.keys[rows], self.values_BGSK[rows]

    def attend(self, query_BHK: Tensor, key_BGK: Tensor, value_BGK: Tensor, lengths_B: Tensor, scale: float) -> Tensor:
        """Put a token behind each row and return [B, H, K] what its query attends to; ``lengths_B`` are from before.

        Raises:
            ValueError: a shape that does not fit the cache, or a row without room.
            TypeError: a tensor that is not float32 on the CPU, or lengths that are not int64.
            BackendUnavailableError: as :func:`attend`.
        """
        _require_heads(query_BHK, key_BGK, value_BGK)
        rows, shared, room, width = self.values_BGSK.shape
        require_shape("key", key_BGK, (rows, shared, width))
        require_tensors(lengths=lengths_B)
        require_shape("lengths", lengths_B, (rows,))
        require_dtype("lengths", lengths_B, (torch.int64,))
        if min(lengths := lengths_B.tolist(), default=0) < 0:
            raise ValueError(f"lengths is {lengths}; a row has no fewer than 0 tokens")
        require_number("scale", scale, SCALE)
        heads = query_BHK.shape[1]
        query_BHK, query_stride = _heads_side_by_side(query_BHK)
        key_BGK, key_stride = _heads_side_by_side(key_BGK)
        value_BGK, value_stride = _heads_side_by_side(value_BGK)
        out_BHK = query_BHK.new_empty(rows, heads, width)
        _native.attend_cached(
            query_BHK.data_ptr(), key_BGK.data_ptr(), value_BGK.data_ptr(),
            launch.address(self.keys), launch.address(self.values_BGSK), launch.address(lengths_B), rows, room,
            query_stride, key_stride, value_stride, heads, heads // shared, width, scale,
            out_BHK.data_ptr(), launch.instruction_set(), launch.threads(),
        )  # fmt: skip
        return out_BHK


def _heads_side_by_side(x_NHK: Tensor) -> tuple[Tensor, int]:
    """The tensor as attention reads it, the heads of a token without gaps, and how far the next token is."""
    token, head, number = x_NHK.stride()
    if number == 1 and head == x_NHK.shape[2]:
        return x_NHK, token
    x_NHK = x_NHK.contiguous()
    return x_NHK, x_NHK.stride(0)


def _attended(
    query_NHK: Tensor, key_NGK: Tensor, value_NGK: Tensor, starts: Tensor, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """What :func:`attend` returns, the softmax's largest score and 1 / Σ [N, H, 2], and the three as read."""
    query_NHK, query_stride = _heads_side_by_side(query_NHK)
    key_NGK, key_stride = _heads_side_by_side(key_NGK)
    value_NGK, value_stride = _heads_side_by_side(value_NGK)
    (tokens, heads, width), shared = query_NHK.shape, key_NGK.shape[1]
    out_NHK, softmax_NH2 = query_NHK.new_empty(tokens, heads, width), query_NHK.new_empty(tokens, heads, 2)
    _native.attend_rows(
        query_NHK.data_ptr(), key_NGK.data_ptr(), value_NGK.data_ptr(), launch.address(starts), starts.shape[0] - 1,
        query_stride, key_stride, value_stride, heads, heads // shared, width, scale,
        out_NHK.data_ptr(), softmax_NH2.data_ptr(), launch.instruction_set(), launch.threads(),
    )  # fmt: skip
    return out_NHK, softmax_NH2, (query_NHK, key_NGK, value_NGK)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_NHK: Tensor, key_NGK: Tensor, value_NGK: Tensor, starts: Tensor, scale: float
    ) -> Tensor:
        out_NHK, softmax_NH2, read = _attended(query_NHK, key_NGK, value_NGK, starts, scale)
        ctx.scale = scale
        ctx.save_for_backward(*read, starts, softmax_NH2)
        return out_NHK

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_NHK: Tensor) -> tuple[Tensor | None, ...]:
        query_NHK, key_NGK, value_NGK, starts, softmax_NH2 = ctx.saved_tensors
        heads, (shared, width) = query_NHK.shape[1], key_NGK.shape[1:]
        grads = [x.new_empty(x.shape) for x in (query_NHK, key_NGK, value_NGK)]
        grad_NHK = grad_NHK.contiguous()
        _native.attend_rows_backward(
            query_NHK.data_ptr(), key_NGK.data_ptr(), value_NGK.data_ptr(), grad_NHK.data_ptr(),
            launch.address(softmax_NH2), launch.address(starts), len(starts) - 1, query_NHK.stride(0),
            key_NGK.stride(0), value_NGK.stride(0), heads, heads // shared, width, ctx.scale,
            *(launch.address(x) for x in grads), *(x.stride(0) for x in grads), launch.instruction_set(),
            launch.threads(),
        )  # fmt: skip
        return *grads, None, None
