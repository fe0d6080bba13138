"""Layers of transformers' models in arithmetic that does not depend on the number of rows or threads, and is faster.

:func:`exchange_layers` changes the class of a model's layers and nothing of its parameters, names or shapes: it saves
and loads as before.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import NewGELUActivation, SiLUActivation
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from rlhf_kernels import gelu, layer_norm, linear, rms_norm, silu
from rlhf_kernels.dense import GELU, SILU, Norm, Rowwise, serves
from rlhf_kernels.native import differentiable_once
from rlhf_kernels.products import linear_between, takes
from rlhf_kernels.program import Matrix, Program


class RowwiseLinear(nn.Linear):
    """A linear layer each of whose rows stands alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ + b."""
        return linear(x, self.weight, self.bias)


class RowwiseConv1D(Conv1D):
    """GPT-2's linear layer, whose weight is [in, out]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W + b."""
        return linear(x, self.weight.t(), self.bias)


class FusedGELU(NewGELUActivation):
    """GPT-2's approximate GELU in one operator instead of eight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
        return gelu(x)


class LanewiseSiLU(SiLUActivation):
    """Llama's activation, each element of which stands alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x σ(x)."""
        return silu(x)


class RowwiseLayerNorm(nn.LayerNorm):
    """Layer norm in one order, the sums over rows in its gradients too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (x − mean) / √(var + ε) · weight + bias."""
        if self.weight is None or self.bias is None or len(self.normalized_shape) > 1:
            return super().forward(x)
        return layer_norm(x, self.weight, self.bias, self.eps)


class RowwiseRMSNorm(LlamaRMSNorm):
    """RMS norm in one order, the sums over rows in its gradient too."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return x / √(mean x² + ε) · weight."""
        if not serves((torch.float32,), hidden_states, self.weight):
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class Projection:
    """residual + project(before(x)); in one operator that keeps x alone where all are layers of this module.

    Looks at the layers once: what they hold, and not what they are, may change between its calls.
    """

    def __init__(self, project: nn.Module, before: nn.Module | None = None) -> None:
        """Take a linear layer, and what comes before it if anything does."""
        self._project, self._before = project, before
        self._function, self._parameters = rowwise_of(before)
        self._joins = before is None or self._function is not None

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return [N, out] of x [N, in] and a residual [N, out]."""
        weight, bias = _weights_of(self._project)  # each time: a view that is made without gradients has none
        if weight is not None and self._joins and takes(x, weight, bias):
            return linear_between(
                x, weight, bias, before=self._function, parameters=self._parameters, residual=residual
            )
        y: torch.Tensor = self._project(x if self._before is None else self._before(x))
        return y if residual is None else residual + y

    def add_to(self, program: Program, x: Matrix, residual: Matrix | None = None) -> Matrix | None:
        """Add this to a program; None if that cannot have it."""
        if not (self._joins and isinstance(self._project, RowwiseConv1D | RowwiseLinear)):
            return None
        project: Any = self._project
        return program.linear(
            x,
            project.weight,
            project.bias,
            transposed=isinstance(project, RowwiseConv1D),
            before=self._function,
            parameters=self._parameters,
            residual=residual,
        )


def _weights_of(module: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The weight [N, K] and the bias of a linear layer of this module."""
    if isinstance(module, RowwiseConv1D):
        return module.weight.t(), module.bias
    return (module.weight, module.bias) if isinstance(module, RowwiseLinear) else (None, None)


def rowwise_of(module: nn.Module | None) -> tuple[Rowwise | None, tuple[nn.Parameter, ...]]:
    """Return what a layer of this module does to rows, and with which parameters; None of any other."""
    if isinstance(module, RowwiseLayerNorm) and module.bias is not None and len(module.normalized_shape) == 1:
        return Norm(module.eps, centered=True), (module.weight, module.bias)
    if isinstance(module, RowwiseRMSNorm):
        return Norm(module.variance_epsilon, centered=False), (module.weight,)
    if isinstance(module, FusedGELU):
        return GELU, ()
    return (SILU if isinstance(module, LanewiseSiLU) else None), ()


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = x.softmax(dim=-1)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor]:
        # torch's own derivative adds a row up in an order that depends on the number of threads.
        (out,) = ctx.saved_tensors
        weighted = out * grad
        return (weighted.sub_(out * weighted.sum(dim=-1, keepdim=True)),)


def rowwise_attention(
    module: nn.Module,
    query_BHQK: torch.Tensor,
    key_BGLK: torch.Tensor,
    value_BGLK: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax(s Q Kᵀ + mask) V, [B, Q, H, K], and the weights, as transformers' eager attention does.

    Vaswani et al., "Attention Is All You Need" (2017), eq. 1. The kit itself
    trains without dropout.
    """
    groups = query_BHQK.shape[1] // key_BGLK.shape[1]
    if groups > 1:
        key_BGLK, value_BGLK = (x.repeat_interleave(groups, dim=1) for x in (key_BGLK, value_BGLK))
    scores_BHQL = torch.matmul(query_BHQK, key_BGLK.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores_BHQL = scores_BHQL + attention_mask
    weights_BHQL = cast("torch.Tensor", _Softmax.apply(scores_BHQL))
    if dropout:
        weights_BHQL = nn.functional.dropout(weights_BHQL, dropout, training=module.training)
    mixed_BHQK = torch.matmul(weights_BHQL.to(value_BGLK.dtype), value_BGLK)
    return mixed_BHQK.transpose(1, 2).contiguous(), weights_BHQL


ROWWISE = "rowwise"
AttentionInterface.register(ROWWISE, rowwise_attention)
AttentionMaskInterface.register(ROWWISE, eager_mask)

EXCHANGES = {
    nn.Linear: RowwiseLinear,
    Conv1D: RowwiseConv1D,
    NewGELUActivation: FusedGELU,
    SiLUActivation: LanewiseSiLU,
    nn.LayerNorm: RowwiseLayerNorm,
    LlamaRMSNorm: RowwiseRMSNorm,
}


def exchange_layers(model: nn.Module) -> None:
    """Change the layers of a model, in place, to those of this module; layers of other kinds stay."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == "eager":
            module.set_attn_implementation(ROWWISE)
        if type(module) in EXCHANGES:
            module.__class__ = EXCHANGES[type(module)]
