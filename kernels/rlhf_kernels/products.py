"""Matrix products whose every element stands alone: y = x Wᵀ + b, each added up in the order of the inner index.

An element has the same bits whatever rows and columns stand beside it, however the matrices lie in memory, however many
threads compute it and on every x86-64 processor; so have the gradients. The BLAS behind `torch.nn.functional.linear`
promises none of that. Native code for float32 on a CPU with fused multiply-add (x86-64 of 2013 or later).

Where torch has no fast way to bfloat16 products, those are made here too: the numbers as float32, the result rounded.
That is so with AVX2 alone, where torch makes them at a tenth of float32's rate.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from rlhf_kernels.arguments import require_tensors
from rlhf_kernels.dense import Rowwise, column_sums, value
from rlhf_kernels.native import asked_by_environment, differentiable_once, native_serves

_native: Any
try:
    from rlhf_kernels.cpu import _product as _native
    from rlhf_kernels.cpu import launch
except ImportError:  # not built
    _native = None


WIDENED_COLUMNS = 1024
"""Columns of a bfloat16 matrix that are float32 at the same time."""


@cache
def available() -> bool:
    """Whether this processor has what the native product is made of; a product without would be slow."""
    return _native is not None and launch.usable_instruction_sets()[-1] != launch.INSTRUCTION_SETS[0]


def multiplies(*matrices: Tensor | None) -> bool:
    """Whether :func:`multiply` serves matrices like these."""
    return native_serves(*matrices) and available()


@cache
def widens() -> bool:
    """Whether bfloat16 matrices are multiplied as float32 here: torch would do it one number at a time."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return available() and not (asked is not None and asked())


def widens_these(*matrices: Tensor | None) -> bool:
    """Whether :func:`multiply_widened` serves matrices like these."""
    return native_serves(*matrices, dtypes=(torch.bfloat16,)) and widens()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b, differentiable once, each element of which stands alone where all are float32 on the CPU.

    So it is with bfloat16, autocast to bfloat16 included, where :func:`widens`. Other dtypes and devices take
    `torch.nn.functional.linear`.

    Args:
        x: [..., K].
        weight: [N, K], of any strides.
        bias: [N] or None.

    Returns:
        [..., N].

    Raises:
        ValueError: the environment variable RLHF_KERNELS_BACKEND names no backend.
    """
    require_tensors(x=x, weight=weight)
    if takes(x, weight, bias):
        return linear_between(x, weight, bias)
    if _fits(x, weight, bias) and _in_bfloat16(x, weight, bias) and widens():
        if torch.is_grad_enabled():
            bias_N = None if bias is None else bias.to(torch.bfloat16)
            return cast("Tensor", _WidenedLinear.apply(x.to(torch.bfloat16), weight.to(torch.bfloat16), bias_N))
        return _widened_linear(x, weight, bias)
    asked_by_environment()  # which was not looked at if the tensors are not served anyway
    return functional.linear(x, weight, bias)


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether :func:`linear` is native for these; where they do not fit each other, torch says so."""
    return _fits(x, weight, bias) and multiplies(x, weight, bias) and not torch.is_autocast_enabled("cpu")


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    fits = weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[1]
    return fits and (bias is None or bias.shape == weight.shape[:1])


def _in_bfloat16(*matrices: Tensor | None) -> bool:
    """Whether matrices on the CPU are bfloat16, or autocast would have them be."""
    if not torch.is_autocast_enabled("cpu"):
        return native_serves(*matrices, dtypes=(torch.bfloat16,))
    narrows = torch.get_autocast_dtype("cpu") == torch.bfloat16
    return narrows and native_serves(*matrices, dtypes=(torch.bfloat16, torch.float32))


def linear_between(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    before: Rowwise | None = None,
    parameters: tuple[Tensor, ...] = (),
    residual: Tensor | None = None,
) -> Tensor:
    """Return residual + f(x) Wᵀ + b of what :func:`takes` takes, differentiable once.

    f(x) is not kept for the backward pass but computed again: a norm or an activation costs little, and what goes into
    the products is most of what a transformer keeps (Chen et al., "Training Deep Nets with Sublinear Memory Cost",
    2016).

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N] or None.
        before: f, by default nothing.
        parameters: of f.
        residual: [..., N].
    """
    if torch.is_grad_enabled():
        return cast("Tensor", _Linear.apply(x, weight, bias, residual, before, *parameters))
    return _linear(x, weight, bias, before, parameters, residual)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Rowwise | None,
    parameters: tuple[Tensor, ...],
    residual: Tensor | None,
) -> Tensor:
    x = x if before is None else value(before, x, *parameters)
    residual_MN = None if residual is None else _as_rows(residual)
    # A result that were a view of the rows could not be changed in place before the backward pass.
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    multiply(_as_rows(x), weight.t(), bias, residual_MN=residual_MN, out_MN=_as_rows(out))
    return out


def _widened_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.bfloat16)  # no view, as in _linear
    multiply_widened(_as_rows(x), weight.t(), bias, out_MN=_as_rows(out))
    return out


def multiply(
    a_MK: Tensor,
    b_KN: Tensor,
    bias_N: Tensor | None = None,
    *,
    residual_MN: Tensor | None = None,
    out_MN: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """Return a b + bias + residual of float32 matrices on the CPU, without a gradient.

    Args:
        a_MK: of any strides, as ``b_KN``.
        b_KN: the other factor.
        bias_N: added to each row; with ``add`` there is none.
        residual_MN: added in the end.
        out_MN: where the result goes, its rows contiguous; by default a new matrix.
        add: keep what ``out_MN`` holds and add to it.
    """
    (a_MK, a_row, a_k), (b_KN, b_k, b_n) = _strided(a_MK), _strided(b_KN)
    (rows, depth), columns = a_MK.shape, b_KN.shape[1]
    out_MN = a_MK.new_empty(rows, columns) if out_MN is None else out_MN
    bias_N, residual_MN = (None if x is None else x.contiguous() for x in (bias_N, residual_MN))
    assert b_KN.shape[0] == depth
    assert out_MN.shape == (rows, columns)
    assert columns < 2 or out_MN.stride(1) == 1
    assert residual_MN is None or residual_MN.shape == out_MN.shape
    _native.multiply(
        a_MK.data_ptr(), a_row, a_k, b_KN.data_ptr(), b_k, b_n, rows, depth, columns, add,
        0 if bias_N is None else bias_N.data_ptr(), 0 if residual_MN is None else residual_MN.data_ptr(), columns,
        out_MN.data_ptr(), out_MN.stride(0), launch.instruction_set(), launch.threads(),
    )  # fmt: skip
    return out_MN


def multiply_widened(
    a_MK: Tensor,
    b_KN: Tensor,
    bias_N: Tensor | None = None,
    *,
    out_MN: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """Return a b + bias of matrices rounded to bfloat16, added up in float32, without a gradient.

    Args:
        a_MK: of any strides, as ``b_KN``; bfloat16, or float32 that is rounded first.
        b_KN: the other factor, of which some columns are widened at a time.
        bias_N: added to each row; with ``add`` there is none.
        out_MN: where the result goes, in float32 not rounded; by default a new matrix of bfloat16.
        add: keep what a float32 ``out_MN`` holds and add to it.
    """
    rounds = out_MN is None or out_MN.dtype != torch.float32
    assert not (rounds and add)
    wide_MN = a_MK.new_empty(a_MK.shape[0], b_KN.shape[1], dtype=torch.float32) if rounds else cast("Tensor", out_MN)
    a_MK, bias_N = _widened(a_MK), None if bias_N is None else _widened(bias_N)
    for first in range(0, b_KN.shape[1], WIDENED_COLUMNS):
        columns = slice(first, first + WIDENED_COLUMNS)
        bias = None if bias_N is None else bias_N[columns]
        multiply(a_MK, _widened(b_KN[:, columns]), bias, out_MN=wide_MN[:, columns], add=add)
    if not rounds:
        return wide_MN
    return wide_MN.to(torch.bfloat16) if out_MN is None else out_MN.copy_(wide_MN)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def _strided(matrix: Tensor) -> tuple[Tensor, int, int]:
    """A matrix, copied where neither its rows nor its columns are contiguous, and its strides."""
    row, column = matrix.stride()
    if 1 not in (row, column):
        if matrix.shape[1] == 1:
            return matrix, row, 1
        if matrix.shape[0] == 1:
            return matrix, 1, column
        matrix = matrix.contiguous()
        row, column = matrix.stride()
    return matrix, row, column


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        before: Rowwise | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.before = before
        ctx.save_for_backward(x, weight, *parameters)
        return _linear(x, weight, bias, before, parameters, residual)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *parameters = ctx.saved_tensors
        need_x, need_weight, need_bias, need_residual, _, *need_parameters = ctx.needs_input_grad
        grad_MN = _as_rows(grad)
        grad_x = multiply(grad_MN, weight).view(x.shape) if need_x or any(need_parameters) else None
        before = x if ctx.before is None or not need_weight else value(ctx.before, x, *parameters)
        through = (grad_x,) if ctx.before is None or grad_x is None else ctx.before.gradients(x, grad_x, *parameters)
        return (
            through[0],
            _weight_gradient(grad_MN, _as_rows(before), like=weight) if need_weight else None,
            column_sums(grad_MN) if need_bias else None,
            grad if need_residual else None,
            None,
            *(through[1:] or [None] * len(parameters)),
        )


class _WidenedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _widened_linear(x, weight, bias)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_MN = _as_rows(grad)
        return (
            multiply_widened(grad_MN, weight).view(x.shape) if need_x else None,
            _weight_gradient(grad_MN, _as_rows(x), like=weight, product=multiply_widened) if need_weight else None,
            column_sums(grad_MN.float()).to(grad.dtype) if need_bias else None,
        )


def _as_rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _weight_gradient(
    grad_MN: Tensor, x_MK: Tensor, like: Tensor, product: Callable[[Tensor, Tensor], Tensor] = multiply
) -> Tensor:
    """Return gradᵀ x [N, K], laid out as the weight is, so that nobody has to copy it."""
    if like.t().is_contiguous():
        return product(x_MK.t(), grad_MN).t()
    return product(grad_MN.t(), x_MK)
