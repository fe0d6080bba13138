"""The layers of GPT-2 and Llama one by one: for decoding over a cache, and for tokens of many rows side by side.

Shape suffixes: N tokens, D width, H heads, G key-value heads, K head width.
"""

from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import GPT2LMHeadModel, GPT2Model, LlamaForCausalLM, LlamaModel, PreTrainedModel

from rlhf_core.chain import Do, do_at_once
from rlhf_core.layers import Projection

CAPTURING = "transformers.utils.output_capturing"


class Blocks(Protocol):
    """The layers of a model's trunk; N tokens go through them side by side and meet in attention alone."""

    count: int
    key_value_heads: int
    head_width: int

    def embed(self, ids_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """Return [N, D] what goes into the first block."""
        ...

    def attention_inputs(self, layer: int, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return query [N, H, K], key and value [N, G, K] of a block."""
        ...

    def rest(self, layer: int, x_ND: torch.Tensor, attended_ND: torch.Tensor) -> torch.Tensor:
        """Return [N, D] what a block hands on."""
        ...

    def normalized(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Return [N, D] what goes into the head."""
        ...

    def head_weight(self) -> torch.Tensor:
        """Return [V, D] the weight of the language model's head, for the tokens embedded last."""
        ...

    def scaling(self, layer: int) -> float:
        """Return the factor of query times key."""
        ...


def blocks_of(model: PreTrainedModel, do: Do = do_at_once) -> Blocks | None:
    """Return the blocks of transformers' GPT-2 or Llama, with its head or without, but for rare variants; else None.

    What a block does, but for looking at its tensors in another shape, it lets ``do`` do.

    A model in training mode is None, because dropout is left out here; so is one that is hooked into, as what calls its
    layers one by one would pass the hooks by. transformers' own hooks, which stay behind when hidden states were asked
    for once, are none that matter.
    """
    trunk: Any = model.base_model
    config = trunk.config
    if type(model) not in (GPT2LMHeadModel, GPT2Model, LlamaForCausalLM, LlamaModel):
        return None
    for module in model.modules():
        if module.training:
            return None
        if module._forward_hooks or module._forward_pre_hooks:
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if any(getattr(hook, "__module__", None) != CAPTURING for hook in hooks):
                return None
    head = getattr(model, "lm_head", None)
    if type(trunk) is GPT2Model:
        return None if config.reorder_and_upcast_attn or config.add_cross_attention else _GPT2Blocks(trunk, head, do)
    return _LlamaBlocks(trunk, head, do) if getattr(config, "pretraining_tp", 1) == 1 else None


class _Embeddings:
    """The embeddings of a trunk, and the weight of its head, which may be the same."""

    def __init__(self, embeddings: Any, head: Any) -> None:
        self._embeddings = embeddings
        self._weight = None if head is None else head.weight
        self._tied = self._weight is embeddings.weight

    def rows(self, ids_N: torch.Tensor) -> torch.Tensor:
        """Return [N, D] the embeddings of tokens."""
        if not (self._tied and torch.is_grad_enabled()):
            return cast("torch.Tensor", self._embeddings(ids_N))
        x_ND, self._weight = _EmbedAndPass.apply(self._embeddings.weight, ids_N, self._embeddings.padding_idx)
        return x_ND

    def head_weight(self) -> torch.Tensor:
        """Return [V, D] the head's weight, for the tokens embedded last."""
        if self._weight is None:
            raise TypeError("the model has no language model head")
        return self._weight


class _EmbedAndPass(torch.autograd.Function):
    """Embeds tokens and passes the weight on to the head, so that both gradients meet here.

    That of the embeddings is added in place to the rows of that of the head. Left to autograd they would be two
    matrices as large as the weight: to fill, to add, to copy.
    """

    @staticmethod
    def forward(
        ctx: Any, weight_VD: torch.Tensor, ids_N: torch.Tensor, padding_id: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(ids_N)
        ctx.shape, ctx.padding_id = weight_VD.shape, padding_id
        ctx.set_materialize_grads(False)
        return nn.functional.embedding(ids_N, weight_VD), weight_VD.view_as(weight_VD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_ND: torch.Tensor | None, grad_VD: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, None, None]:
        (ids_N,) = ctx.saved_tensors
        if grad_ND is None:
            return grad_VD, None, None
        if grad_VD is None:
            grad_VD = grad_ND.new_zeros(ctx.shape)
        if ctx.padding_id is not None:
            grad_ND = torch.where((ids_N == ctx.padding_id)[:, None], 0.0, grad_ND)
        return grad_VD.index_add_(0, ids_N, grad_ND), None, None


class _GPT2Blocks:
    def __init__(self, trunk: Any, head: Any, do: Do) -> None:
        self._do = do
        self._embeddings = _Embeddings(trunk.wte, head)
        self.head_weight = self._embeddings.head_weight
        self._trunk = trunk
        self._layers = [_GPT2Block(block) for block in trunk.h]
        self.count = len(self._layers)
        self.key_value_heads = trunk.config.n_head
        self.head_width = trunk.config.n_embd // trunk.config.n_head

    def embed(self, ids_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        return self._embeddings.rows(ids_N) + self._trunk.wpe(positions_N)

    def attention_inputs(self, layer: int, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        joint_N3D = self._do(self._layers[layer].joint, x_ND)
        query, key, value = joint_N3D.view(len(x_ND), 3, self.key_value_heads, self.head_width).unbind(1)
        return query, key, value

    def rest(self, layer: int, x_ND: torch.Tensor, attended_ND: torch.Tensor) -> torch.Tensor:
        block = self._layers[layer]
        x_ND = self._do(block.mix, attended_ND, x_ND)
        return self._do(block.shrink, self._do(block.widen, x_ND), x_ND)

    def normalized(self, x_ND: torch.Tensor) -> torch.Tensor:
        return self._do(self._trunk.ln_f, x_ND)

    def scaling(self, layer: int) -> float:
        return self._layers[layer].scaling


class _GPT2Block:
    """The projections of a block, each with the norm or activation before it."""

    def __init__(self, block: Any) -> None:
        self.joint = Projection(block.attn.c_attn, before=block.ln_1)
        self.mix = Projection(block.attn.c_proj)
        self.widen = Projection(block.mlp.c_fc, before=block.ln_2)
        self.shrink = Projection(block.mlp.c_proj, before=block.mlp.act)
        self.scaling: float = block.attn.scaling


class _LlamaBlocks:
    def __init__(self, trunk: Any, head: Any, do: Do) -> None:
        self._do = do
        self._embeddings = _Embeddings(trunk.embed_tokens, head)
        self.head_weight = self._embeddings.head_weight
        self._trunk = trunk
        self._layers = [_LlamaBlock(block) for block in trunk.layers]
        self.count = len(self._layers)
        self.key_value_heads = trunk.config.num_key_value_heads
        self.head_width = trunk.layers[0].self_attn.head_dim
        self._cos_N1K = self._sin_N1K = torch.empty(0)

    def embed(self, ids_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        x_ND = self._embeddings.rows(ids_N)
        cos_1NK, sin_1NK = self._trunk.rotary_emb(x_ND, positions_N[None])
        self._cos_N1K, self._sin_N1K = cos_1NK[0, :, None], sin_1NK[0, :, None]
        return x_ND

    def _rotated(self, x_NHK: torch.Tensor) -> torch.Tensor:
        """Su et al., "RoFormer" (2021), the halves paired as in Llama."""
        first, second = x_NHK.chunk(2, dim=-1)
        return x_NHK * self._cos_N1K + torch.cat([-second, first], dim=-1) * self._sin_N1K

    def attention_inputs(self, layer: int, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        block, shape = self._layers[layer], (len(x_ND), -1, self.head_width)
        h_ND = self._do(block.input_norm, x_ND)
        query, key, value = (self._do(project, h_ND).view(shape) for project in (block.query, block.key, block.value))
        return self._do(self._rotated, query), self._do(self._rotated, key), value

    def rest(self, layer: int, x_ND: torch.Tensor, attended_ND: torch.Tensor) -> torch.Tensor:
        block = self._layers[layer]
        x_ND = self._do(block.mix, attended_ND, x_ND)
        h_ND = self._do(block.inner_norm, x_ND)
        gated = self._do(block.gated, self._do(block.gate, h_ND), self._do(block.widen, h_ND))
        return self._do(block.shrink, gated, x_ND)

    def normalized(self, x_ND: torch.Tensor) -> torch.Tensor:
        return self._do(self._trunk.norm, x_ND)

    def scaling(self, layer: int) -> float:
        return self._layers[layer].scaling


class _LlamaBlock:
    """The layers of a block; three projections share a norm, and two another."""

    def __init__(self, block: Any) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.input_norm, self.inner_norm = block.input_layernorm, block.post_attention_layernorm
        self.query, self.key, self.value = map(Projection, (attention.q_proj, attention.k_proj, attention.v_proj))
        self.mix = Projection(attention.o_proj)
        self.gate, self.widen, self.shrink = map(Projection, (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self._activation = mlp.act_fn
        self.scaling: float = attention.scaling

    def gated(self, gate: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
        """Shazeer, "GLU Variants Improve Transformer" (2020), section 2."""
        product: torch.Tensor = self._activation(gate) * wide
        return product
