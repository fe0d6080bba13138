"""What a training step does to whole matrices between its products: activations, transposition, sums of squares.

Native for float32 (activations for bfloat16 too) on the CPU, the same bits on every x86-64 processor and for any number
of threads; torch's own operators elsewhere. torch's activations take another exponential for what is left over behind
the last whole vector of a thread's part, so there bits depend on the width and on the threads.
"""

import os
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from rlhf_kernels.dispatch import ENVIRONMENT_VARIABLE

native: Any
try:
    from rlhf_kernels.cpu import _dense as native
    from rlhf_kernels.cpu import launch
except ImportError:  # not built
    native = None

_GELU, _SILU = 0, 1
_ACTIVATED = (torch.float32, torch.bfloat16)


def gelu(x: Tensor) -> Tensor:
    """Return x σ(2 √(2/π) (x + 0.044715 x³)) = ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))), differentiable once.

    Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), the approximation that GPT-2 uses.

    Args:
        x: any shape.
    """
    if not _is_native(x, _ACTIVATED):
        return functional.gelu(x, approximate="tanh")
    return cast("Tensor", _Activation.apply(x, _GELU))


def silu(x: Tensor) -> Tensor:
    """Return x σ(x), differentiable once.

    Elfwing, Uchibe and Doya, "Sigmoid-Weighted Linear Units" (2018).

    Args:
        x: any shape.
    """
    return cast("Tensor", _Activation.apply(x, _SILU)) if _is_native(x, _ACTIVATED) else functional.silu(x)


def sum_of_squares(x: Tensor) -> float:
    """Return Σ x² of a tensor of any shape, added up in float64, in an order that does not depend on the threads."""
    x = x.detach()
    if not _is_native(x, (torch.float32,)):
        return float(x.double().square().sum())
    x = x.t() if x.dim() == 2 and x.t().is_contiguous() else x.contiguous()
    return float(native.sum_of_squares(launch.address(x), x.numel(), launch.instruction_set(), launch.threads()))


def transposed(x: Tensor) -> Tensor:
    """Return a contiguous copy of the transpose of a matrix [M, N], without a gradient."""
    if not (_is_native(x, (torch.float32,)) and x.is_contiguous()):
        return x.t().contiguous()
    out = x.new_empty(x.shape[1], x.shape[0])
    sizes, how = x.shape, (launch.instruction_set(), launch.threads())
    native.turn(launch.address(x), *sizes, launch.address(out), *how)
    return out


def _is_native(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether native code is built and serves this tensor."""
    return (
        native is not None
        and x.device.type == "cpu"
        and x.dtype in dtypes
        and os.environ.get(ENVIRONMENT_VARIABLE) != "reference"
        and not torch.compiler.is_compiling()
    )


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: int) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(x)
        return _run(x, None, kind)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _run(x, grad, ctx.kind), None


def _run(x: Tensor, grad: Tensor | None, kind: int) -> Tensor:
    x = x.contiguous()
    grad = None if grad is None else grad.to(x.dtype).contiguous()
    out = torch.empty_like(x)
    native.activation(
        launch.address(x),
        0 if grad is None else launch.address(grad),
        x.numel(),
        launch.ELEMENT_TYPE[x.dtype],
        x.element_size(),
        kind,
        launch.address(out),
        launch.instruction_set(),
        launch.threads(),
    )
    return out
