"""Matrix products whose rows stand alone: y = x Wᵀ + b through oneDNN.

A row of the result has the same bits whatever rows stand beside it, however many threads compute it and however the
weight lies in memory, and so have the gradients for any number of threads. The BLAS behind `torch.nn.functional.linear`
promises none of that: its rows depend on their number. (oneDNN gives a single row, and a single column, to another
routine; they are computed as two.) oneDNN also uses AVX-512 on processors of every maker.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from rlhf_kernels.dense import transposed


def available() -> bool:
    """Whether this torch has oneDNN's product of float32 matrices."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def filling(rows: int) -> int:
    """Return how many rows are missing to a multiple of 64, or of 16 while they are few.

    oneDNN makes code for every number of rows that it meets, and keeps it: whoever may choose the number fills it up.
    """
    return -rows % (64 if rows > 256 else 16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b, differentiable once, with rows that stand alone where both are float32 on the CPU.

    Other dtypes and devices, and the inside of autocast, take `torch.nn.functional.linear`.

    Args:
        x: [..., K].
        weight: [N, K], of any strides.
        bias: [N] or None.

    Returns:
        [..., N].
    """
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    if not plain or not available() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return functional.linear(x, weight, bias)
    return cast("Tensor", _Linear.apply(x, weight, bias))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b of float32 matrices [M, K] and [N, K] on the CPU, without a gradient."""
    rows, columns = x.shape[0], weight.shape[0]
    if 0 in (rows, columns, x.shape[1]):
        return functional.linear(x, weight, bias)
    if rows == 1:
        x = x.expand(2, -1).contiguous()
    if columns == 1:
        weight = weight.expand(2, -1).contiguous()
        bias = None if bias is None else bias.expand(2).contiguous()
    bias = None if bias is None else bias.contiguous()  # oneDNN reads it as if it were
    result = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return cast("Tensor", result[:rows, :columns])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        return product(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = x.shape[:-1].numel()
        grad, x_rows = grad.reshape(rows, weight.shape[0]), x.reshape(rows, x.shape[-1])
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()).view(x.shape) if need_x else None,
            _weight_gradient(grad, x_rows, like=weight) if need_weight else None,
            grad.sum(dim=0) if need_bias else None,
        )


def _weight_gradient(grad: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """Return gradᵀ x [N, K] of matrices [M, N] and [M, K], laid out as the weight is, so that nobody has to copy it."""
    if like.t().is_contiguous():
        return product(transposed(x), grad.t()).t()
    return product(transposed(grad), x.t())
