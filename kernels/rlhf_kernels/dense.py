"""What a training step does to whole matrices between its products: activations, norms, sums.

Native for float32 (activations for bfloat16 too) on the CPU, the same bits on every x86-64 processor, for any number of
threads and whatever rows stand beside a row; torch's own operators elsewhere, none of which promises that.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rlhf_kernels.arguments import has_data, refuse_tangent, require_tensors
from rlhf_kernels.native import asked_by_environment, differentiable_once, native_serves, shown_as

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
    require_tensors(x=x)
    return apply(GELU, x) if serves(_ACTIVATED, x) else functional.gelu(x, approximate="tanh")


def silu(x: Tensor) -> Tensor:
    """Return x σ(x), differentiable once.

    Elfwing, Uchibe and Doya, "Sigmoid-Weighted Linear Units" (2018).

    Args:
        x: any shape.
    """
    require_tensors(x=x)
    return apply(SILU, x) if serves(_ACTIVATED, x) else functional.silu(x)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Return (x − mean) / √(variance + ε) · weight + bias over the last dimension, differentiable once.

    Ba, Kiros and Hinton, "Layer Normalization" (2016), eq. 3 and 4.

    Args:
        x: [..., D].
        weight: [D].
        bias: [D].
        eps: ε.
    """
    require_tensors(x=x, weight=weight, bias=bias)
    fit = weight.shape == bias.shape == x.shape[-1:]
    if not serves((torch.float32,), x, weight, bias, fit=fit):  # torch says what does not fit
        return functional.layer_norm(x, weight.shape, weight, bias, eps)
    return apply(Norm(eps, centered=True), x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Return x / √(mean of x² + ε) · weight over the last dimension, differentiable once.

    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), eq. 4.

    Args:
        x: [..., D].
        weight: [D].
        eps: ε.
    """
    require_tensors(x=x, weight=weight)
    if not serves((torch.float32,), x, weight, fit=weight.shape == x.shape[-1:]):
        return functional.rms_norm(x, weight.shape, weight, eps)
    return apply(Norm(eps, centered=False), x, weight)


def sum_of_squares(x: Tensor) -> float:
    """Return Σ x² of a tensor of any shape, added up in float64, in an order that does not depend on the threads."""
    require_tensors(x=x)
    return sums_of_squares([x])[0]


def sums_of_squares(tensors: Iterable[Tensor]) -> list[float]:
    """Return :func:`sum_of_squares` of each tensor, at the cost of one call."""
    tensors = list(tensors)
    refuse_tangent("sums_of_squares", *tensors)
    if not serves((torch.float32,), *tensors):
        if not all(map(has_data, tensors)):
            raise ValueError("there are no squares to add up: a tensor is on the meta device, or fake")
        return [float(x.detach().double().square().sum()) for x in tensors]
    lying = [x.t() if x.dim() == 2 and x.t().is_contiguous() else x.contiguous() for x in tensors]
    addresses = np.array([x.data_ptr() for x in lying], dtype=np.int64)
    counts = np.array([x.numel() for x in lying], dtype=np.int64)
    sums = np.empty(len(lying))
    with shown_as("sums_of_squares"):
        native.sums_of_squares(addresses, counts, sums, launch.instruction_set(), launch.threads())
    return sums.tolist()


def column_sums(x_MN: Tensor) -> Tensor:
    """Return [N] the sums of a float32 matrix on the CPU over its rows, each rounded once; no gradient."""
    x_MN = x_MN if x_MN.stride(1) == 1 else x_MN.contiguous()
    (rows, columns), out_N = x_MN.shape, x_MN.new_empty(x_MN.shape[1])
    native.column_sums(
        x_MN.data_ptr(), rows, columns, x_MN.stride(0), out_N.data_ptr(), launch.instruction_set(), launch.threads()
    )
    return out_N


def serves(dtypes: tuple[torch.dtype, ...], *tensors: Tensor | None, fit: bool = True) -> bool:
    """Whether native code is built and takes all of these tensors, which fit each other.

    Raises:
        ValueError: the environment variable names no backend.
    """
    if fit and native is not None and native_serves(*tensors, dtypes=dtypes):
        return True
    asked_by_environment()  # which was not looked at if the tensors are not served anyway
    return False


def value(function: "Rowwise", x: Tensor, *parameters: Tensor) -> Tensor:
    """Return the function of every row."""
    return function.value(x.contiguous(), *(parameter.contiguous() for parameter in parameters))


class Rowwise(Protocol):
    """A function of each row of a matrix alone, and its gradients, which need nothing but what it was given."""

    def value(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """Return the function of every row; all tensors are contiguous."""
        ...

    def gradients(self, x: Tensor, grad: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of x and of the parameters."""
        ...


@dataclass(frozen=True)
class Activation:
    """GELU or SiLU, by the number that activation.h gives it."""

    kind: int

    def value(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """Return the activation of every element."""
        return self._call(x, None)

    def gradients(self, x: Tensor, grad: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Return the gradient of x."""
        return (self._call(x.contiguous(), grad.to(x.dtype).contiguous()),)

    def _call(self, x: Tensor, grad: Tensor | None) -> Tensor:
        out = torch.empty_like(x)
        native.activation(
            launch.address(x), 0 if grad is None else launch.address(grad), x.numel(), launch.ELEMENT_TYPE[x.dtype],
            x.element_size(), self.kind, launch.address(out), launch.instruction_set(), launch.threads(),
        )  # fmt: skip
        return out


GELU, SILU = Activation(_GELU), Activation(_SILU)


@dataclass(frozen=True)
class Norm:
    """Layer norm, with weight and bias, or RMS norm, which is not centered and has a weight alone."""

    epsilon: float
    centered: bool

    def value(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """Return the norm of rows."""
        weight, *rest = parameters
        out, width = torch.empty_like(x), x.shape[-1]
        native.norm(
            launch.address(x), x.shape[:-1].numel(), width, launch.address(weight),
            launch.address(rest[0]) if rest else 0, self.epsilon, self.centered, launch.address(out),
            launch.instruction_set(), launch.threads(),
        )  # fmt: skip
        return out

    def gradients(self, x: Tensor, grad: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of rows and of what they are multiplied with and moved by."""
        x, grad, weight = x.contiguous(), grad.contiguous(), parameters[0].contiguous()
        grad_x, *others = (torch.empty_like(tensor) for tensor in (x, *parameters))
        native.norm_gradients(
            launch.address(x), launch.address(grad), x.shape[:-1].numel(), x.shape[-1], launch.address(weight),
            self.epsilon, self.centered, launch.address(grad_x), *map(launch.address, others), *[0] * (2 - len(others)),
            launch.instruction_set(), launch.threads(),
        )  # fmt: skip
        return (grad_x, *others)


def apply(function: Rowwise, x: Tensor, *parameters: Tensor) -> Tensor:
    """Return the function of rows, differentiable once."""
    if not torch.is_grad_enabled():
        return value(function, x, *parameters)
    return cast("Tensor", _Apply.apply(function, x, *parameters))


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Rowwise, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x, *parameters)
        return value(function, x, *parameters)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        return (None, *ctx.function.gradients(x, grad, *parameters))
