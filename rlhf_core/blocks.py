"""The blocks of GPT-2 and Llama: for decoding over a cache, and for tokens of many rows side by side.

What they do is said once, for tensors, whose operators are done one by one, and for matrices of a program, which is
carried out as a whole.

Shape suffixes: N tokens, D width, H heads, G key-value heads, K head width.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn
from transformers import GPT2LMHeadModel, GPT2Model, LlamaForCausalLM, LlamaModel, PreTrainedModel

from rlhf_core.layers import Projection, rowwise_of
from rlhf_kernels.native import differentiable_once
from rlhf_kernels.program import Matrix, Program, Turns, heads_in, programmable

CAPTURING = "transformers.utils.output_capturing"
RARE = ("reorder_and_upcast_attn", "add_cross_attention")
KNOWN = "_rlhf_blocks"
"""The attribute of a model under which its blocks are remembered."""

X = TypeVar("X", torch.Tensor, Matrix)
Do = Callable[..., X]
"""Does an operator to matrices: ``do(operator, *inputs)``."""


def do_at_once(operator: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """Return ``operator(*inputs)``."""
    return operator(*inputs)


class Blocks(Protocol):
    """The layers of a model's trunk; N tokens go through them side by side and meet in attention alone.

    What a block does it lets ``do`` do, to whole matrices.
    """

    count: int
    heads: int
    key_value_heads: int
    head_width: int
    program: Program | None
    """All that lies between embeddings and head, of the tokens that are read; None where a program cannot have it."""
    turns: Turns | None
    """Of the tokens embedded last, where positions turn queries and keys."""

    def embed(self, ids_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """Return [N, D] what goes into the first block."""
        ...

    def attention_inputs(self, layer: int, x_ND: X, do: Do[X]) -> tuple[X, ...]:
        """Return the matrices whose columns are the heads of a block's queries, keys and values: three, or one."""
        ...

    def rest(self, layer: int, x_ND: X, attended_ND: X, do: Do[X]) -> X:
        """Return [N, D] what a block hands on."""
        ...

    def normalized(self, x_ND: X, do: Do[X]) -> X:
        """Return [N, D] what goes into the head."""
        ...

    def head_weight(self) -> torch.Tensor:
        """Return [V, D] the weight of the language model's head, for the tokens embedded last."""
        ...

    def scaling(self, layer: int) -> float:
        """Return the factor of query times key."""
        ...

    def begin(self) -> None:
        """Forget the tokens embedded last."""
        ...


def heads_of(blocks: Blocks, matrices: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query [N, H, K], key and value [N, G, K] in what :meth:`Blocks.attention_inputs` returned."""
    return heads_in(matrices, blocks.heads, blocks.key_value_heads, blocks.head_width)


def blocks_of(model: PreTrainedModel) -> Blocks | None:
    """Return the blocks of transformers' GPT-2 or Llama, with its head or without, but for rare variants; else None.

    A model in training mode is None, because dropout is left out here; so is one that is hooked into, as what calls its
    layers one by one would pass the hooks by. transformers' own hooks, which stay behind when hidden states were asked
    for once, are none that matter.
    """
    if type(model) not in (GPT2LMHeadModel, GPT2Model, LlamaForCausalLM, LlamaModel):
        return None
    # Of which modules and parameters the blocks are made, and where those lie. Nothing that is remembered refers to the
    # model: it would live on until cycles are collected.
    signature: list[object] = []
    modules: list[nn.Module] = [model]
    for module in modules:
        if module.training:
            return None
        if module._forward_hooks or module._forward_pre_hooks:
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if any(getattr(hook, "__module__", None) != CAPTURING for hook in hooks):
                return None
        parameters = [p for p in module._parameters.values() if p is not None]
        signature += [id(module), type(module), *parameters, *(p.data_ptr() for p in parameters)]
        modules += [child for child in module._modules.values() if child is not None]
    config = model.config
    rare = getattr(config, "pretraining_tp", 1) != 1 or any(getattr(config, name, False) for name in RARE)
    if rare or config.num_hidden_layers == 0:
        return None
    known = model.__dict__.get(KNOWN)
    if known is None or not _same(known.signature, signature):
        known = model.__dict__[KNOWN] = _Known(signature, _new_blocks(model))
    blocks = cast("Blocks", copy.copy(known.blocks))
    blocks.begin()
    return blocks


class _Known:
    """What is remembered of a model; a copy of the model, or one that is saved and loaded, remembers nothing."""

    def __init__(self, signature: Sequence[object] = (), blocks: Blocks | None = None) -> None:
        self.signature, self.blocks = signature, blocks

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Known, ()


def _same(known: Sequence[object], signature: Sequence[object]) -> bool:
    """Whether all are the very same objects, or for numbers the same."""
    return len(known) == len(signature) and all(
        one is other or (isinstance(one, int) and one == other) for one, other in zip(known, signature, strict=True)
    )


def _new_blocks(model: PreTrainedModel) -> Blocks:
    trunk: Any = model.base_model
    head = getattr(model, "lm_head", None)
    blocks: Blocks = _GPT2Blocks(trunk, head) if type(trunk) is GPT2Model else _LlamaBlocks(trunk, head)
    blocks.program = _program(blocks, trunk.config.hidden_size)
    return blocks


def _program(blocks: Blocks, width: int) -> Program | None:
    """Say what the blocks do to a program; None if it cannot have one of their layers or parameters."""
    program = Program(width)

    def do(operator: Any, *inputs: Matrix) -> Matrix:
        if isinstance(operator, nn.Module):
            function, parameters = rowwise_of(operator)
            added = None if function is None else program.rowwise(function, inputs[0], *parameters)
        else:
            added = operator.add_to(program, *inputs)
        if added is None:
            raise _NotInAProgram
        return added

    x = program.input
    try:
        for layer in range(blocks.count):
            matrices = blocks.attention_inputs(layer, x, do)
            shape = blocks.heads, blocks.key_value_heads, blocks.head_width
            attended = program.attended(matrices, *shape, blocks.scaling(layer))
            if layer == blocks.count - 1:
                x, attended = program.selected(x), program.selected(attended)
            x = blocks.rest(layer, x, attended, do)
        blocks.normalized(x, do)
    except _NotInAProgram:
        return None
    return program if programmable(program.parameters) else None


class _NotInAProgram(Exception):
    """A layer is of a kind that a program does not know."""


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
    @differentiable_once
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
    def __init__(self, trunk: Any, head: Any) -> None:
        self._tokens, self._positions, self._last_norm, self._head = trunk.wte, trunk.wpe, trunk.ln_f, head
        self._layers = [_GPT2Block(block) for block in trunk.h]
        self.count = len(self._layers)
        self.heads = self.key_value_heads = trunk.config.n_head
        self.head_width = trunk.config.n_embd // trunk.config.n_head
        self.program: Program | None = None
        self.turns: Turns | None = None
        self.begin()

    def begin(self) -> None:
        self._embeddings = _Embeddings(self._tokens, self._head)

    def embed(self, ids_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        return self._embeddings.rows(ids_N) + self._positions(positions_N)

    def head_weight(self) -> torch.Tensor:
        return self._embeddings.head_weight()

    def attention_inputs(self, layer: int, x_ND: X, do: Do[X]) -> tuple[X, ...]:
        return (do(self._layers[layer].joint, x_ND),)

    def rest(self, layer: int, x_ND: X, attended_ND: X, do: Do[X]) -> X:
        block = self._layers[layer]
        x_ND = do(block.mix, attended_ND, x_ND)
        return do(block.shrink, do(block.widen, x_ND), x_ND)

    def normalized(self, x_ND: X, do: Do[X]) -> X:
        return do(self._last_norm, x_ND)

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
    def __init__(self, trunk: Any, head: Any) -> None:
        self._tokens, self._angles, self._last_norm, self._head = trunk.embed_tokens, trunk.rotary_emb, trunk.norm, head
        self._layers = [_LlamaBlock(block) for block in trunk.layers]
        self.count = len(self._layers)
        self.heads = trunk.config.num_attention_heads
        self.key_value_heads = trunk.config.num_key_value_heads
        self.head_width = trunk.layers[0].self_attn.head_dim
        self.program: Program | None = None
        self.begin()

    def begin(self) -> None:
        self._embeddings = _Embeddings(self._tokens, self._head)
        self.turns: Turns | None = None

    def embed(self, ids_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        x_ND = self._embeddings.rows(ids_N)
        cos_1NK, sin_1NK = self._angles(x_ND, positions_N[None])
        self.turns = cos_1NK[0], sin_1NK[0]
        return x_ND

    def head_weight(self) -> torch.Tensor:
        return self._embeddings.head_weight()

    def attention_inputs(self, layer: int, x_ND: X, do: Do[X]) -> tuple[X, ...]:
        block, rotation = self._layers[layer], _Rotation(self.turns, self.head_width)
        h_ND = do(block.input_norm, x_ND)
        query, key, value = (do(project, h_ND) for project in (block.query, block.key, block.value))
        return do(rotation, query), do(rotation, key), value

    def rest(self, layer: int, x_ND: X, attended_ND: X, do: Do[X]) -> X:
        block = self._layers[layer]
        x_ND = do(block.mix, attended_ND, x_ND)
        h_ND = do(block.inner_norm, x_ND)
        gated = do(block.gated, do(block.gate, h_ND), do(block.widen, h_ND))
        return do(block.shrink, gated, x_ND)

    def normalized(self, x_ND: X, do: Do[X]) -> X:
        return do(self._last_norm, x_ND)

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
        self.gated = _Gate(mlp.act_fn)
        self.scaling: float = attention.scaling


class _Rotation:
    """Su et al., "RoFormer" (2021), the halves of a head paired as in Llama."""

    def __init__(self, turns: Turns | None, head_width: int) -> None:
        self._turns, self._head_width = turns, head_width

    def __call__(self, x_NC: torch.Tensor) -> torch.Tensor:
        assert self._turns is not None
        cos_N1K, sin_N1K = (turn[:, None] for turn in self._turns)
        x_NHK = x_NC.view(len(x_NC), -1, self._head_width)
        first, second = x_NHK.chunk(2, dim=-1)
        return (x_NHK * cos_N1K + torch.cat([-second, first], dim=-1) * sin_N1K).view(x_NC.shape)

    def add_to(self, program: Program, x: Matrix) -> Matrix:
        return program.rotated(x, self._head_width)


class _Gate:
    """Shazeer, "GLU Variants Improve Transformer" (2020), section 2."""

    def __init__(self, activation: nn.Module) -> None:
        self._activation = activation

    def __call__(self, gate: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self._activation(gate) * wide
        return product

    def add_to(self, program: Program, gate: Matrix, wide: Matrix) -> Matrix | None:
        function, parameters = rowwise_of(self._activation)
        return None if function is None or parameters else program.gated(function, gate, wide)
