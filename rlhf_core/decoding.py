"""One token after the other from a causal language model: its own forward pass, or a shorter way through its blocks.

A decoding step computes little, so what surrounds it counts: a model's ``forward`` makes masks, positions and cache
objects anew for each token. :class:`BlockDecoder` calls the same layers one by one over a cache that is allocated
once, for GPT-2 and for Llama and what is built like it; :class:`ModelDecoder` serves every model.

Shape suffixes: B sequences, P prompt positions, S cached positions, H heads, G key-value heads, K head width, V
vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from rlhf_core.numerics import is_portable
from rlhf_core.policy import ForwardArguments, position_ids


class Decoder(Protocol):
    """Reads prompts, then a token of each at a time."""

    def read_prompts(self, ids_BP: torch.Tensor, attention_BP: torch.Tensor) -> torch.Tensor:
        """Return [B, V] the logits behind left-padded prompts."""
        ...

    def read_tokens(self, ids_B: torch.Tensor) -> torch.Tensor:
        """Return [B, V] the logits behind one more token of each row."""
        ...

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone, in this order."""
        ...


CAPTURING = "transformers.utils.output_capturing"
SMALL_PRODUCT = 2**23
"""Multiplications below which a product takes less time than waking a second thread for it."""


@contextmanager
def threads_for_decoding(model: PreTrainedModel, rows: int) -> Iterator[None]:
    """Decode with one thread where all products of a step are small; rows and bits do not depend on it.

    On portable numerics and on a GPU nothing changes.
    """
    widest = max(parameter.numel() for parameter in model.parameters())
    threads = torch.get_num_threads()
    if rows * widest < SMALL_PRODUCT and not is_portable():
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def decoder_for(model: PreTrainedModel, max_new_tokens: int) -> Decoder:
    """Return the fastest decoder for a model; under portable numerics the model's own forward pass."""
    blocks = None if is_portable() else blocks_of(model)
    return ModelDecoder(model) if blocks is None else BlockDecoder(model, blocks, max_new_tokens)


class ModelDecoder:
    """Decodes through the model's ``forward``."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._arguments = ForwardArguments(model)
        self._cache = DynamicCache(config=model.config)
        self._attention_BS = torch.empty(0)

    def read_prompts(self, ids_BP: torch.Tensor, attention_BP: torch.Tensor) -> torch.Tensor:
        """Return [B, V] the logits behind left-padded prompts."""
        self._attention_BS = attention_BP
        return self._read(ids_BP)

    def read_tokens(self, ids_B: torch.Tensor) -> torch.Tensor:
        """Return [B, V] the logits behind one more token of each row."""
        one_B1 = self._attention_BS.new_ones(len(ids_B), 1)
        self._attention_BS = torch.cat([self._attention_BS, one_B1], dim=1)
        return self._read(ids_B[:, None])

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone, in this order."""
        self._attention_BS = self._attention_BS[rows]
        self._cache.batch_select_indices(rows)

    def _read(self, ids_BN: torch.Tensor) -> torch.Tensor:
        output = self._model(
            input_ids=ids_BN,
            attention_mask=self._attention_BS,
            past_key_values=self._cache,
            use_cache=True,
            **self._arguments.positions(self._attention_BS, last=ids_BN.shape[1]),
            **self._arguments.keep(1),
        )
        return output.logits[:, -1]


class Blocks(Protocol):
    """The layers of a model, as far as decoding needs them."""

    count: int
    key_value_heads: int
    head_width: int
    head: Any

    def embed(self, ids_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
        """Return [B, D] what goes into the first block."""
        ...

    def attention_inputs(self, layer: int, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return query [B, H, K], key and value [B, G, K] of a block."""
        ...

    def rest(self, layer: int, x_BD: torch.Tensor, attended_BD: torch.Tensor) -> torch.Tensor:
        """Return [B, D] what a block hands on."""
        ...

    def normalized(self, x_BD: torch.Tensor) -> torch.Tensor:
        """Return [B, D] what goes into the head."""
        ...

    def scaling(self, layer: int) -> float:
        """Return the factor of query times key."""
        ...


class BlockDecoder:
    """Decodes block by block over keys and values that are allocated once."""

    def __init__(self, model: PreTrainedModel, blocks: Blocks, max_new_tokens: int) -> None:
        self._model = model
        self._arguments = ForwardArguments(model)
        self._blocks = blocks
        self._room = max_new_tokens
        self._length = 0

    def read_prompts(self, ids_BP: torch.Tensor, attention_BP: torch.Tensor) -> torch.Tensor:
        """Return [B, V] the logits behind left-padded prompts."""
        cache = DynamicCache(config=self._model.config)
        output = self._model(
            input_ids=ids_BP,
            attention_mask=attention_BP,
            past_key_values=cache,
            use_cache=True,
            **self._arguments.positions(attention_BP),
            **self._arguments.keep(1),
        )
        blocks, (rows, self._length) = self._blocks, ids_BP.shape
        filled: list[Any] = cache.layers
        first: torch.Tensor = filled[0].keys
        shape = (rows, blocks.key_value_heads, self._length + self._room, blocks.head_width)
        self._keys = [first.new_empty(shape) for _ in range(blocks.count)]
        self._values = [first.new_empty(shape) for _ in range(blocks.count)]
        for layer in range(blocks.count):
            self._keys[layer][:, :, : self._length] = filled[layer].keys
            self._values[layer][:, :, : self._length] = filled[layer].values
        self._positions_B = position_ids(attention_BP)[:, -1]
        self._mask_B11S = first.new_zeros(rows, 1, 1, self._length + self._room)
        self._mask_B11S[:, 0, 0, : self._length].masked_fill_(attention_BP == 0, -torch.inf)
        return output.logits[:, -1]

    def read_tokens(self, ids_B: torch.Tensor) -> torch.Tensor:
        """Return [B, V] the logits behind one more token of each row."""
        blocks, at = self._blocks, self._length
        self._length += 1
        self._positions_B = self._positions_B + 1
        mask_B11S = self._mask_B11S[..., : self._length]
        x_BD = blocks.embed(ids_B, self._positions_B)
        for layer in range(blocks.count):
            query_BHK, key_BGK, value_BGK = blocks.attention_inputs(layer, x_BD)
            keys, values = self._keys[layer], self._values[layer]
            keys[:, :, at] = key_BGK
            values[:, :, at] = value_BGK
            attended_BH1K = scaled_dot_product_attention(
                query_BHK[:, :, None].to(keys.dtype),
                keys[:, :, : self._length],
                values[:, :, : self._length],
                attn_mask=mask_B11S,
                scale=blocks.scaling(layer),
                enable_gqa=query_BHK.shape[1] != blocks.key_value_heads,
            )
            x_BD = blocks.rest(layer, x_BD, attended_BH1K.reshape(len(ids_B), -1))
        logits_BV: torch.Tensor = blocks.head(blocks.normalized(x_BD))
        return logits_BV

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone, in this order."""
        self._keys = [keys[rows] for keys in self._keys]
        self._values = [values[rows] for values in self._values]
        self._positions_B, self._mask_B11S = self._positions_B[rows], self._mask_B11S[rows]


def blocks_of(model: PreTrainedModel) -> Blocks | None:
    """Return the blocks of a model that is transformers' GPT-2 or Llama, without what only some variants do; else None.

    A model whose forward passes are hooked into is None too: what calls its layers one by one would pass the hooks by.
    transformers' own hooks, which stay behind when hidden states were asked for once, are none that decoding needs.
    """
    hooked = [
        hooks.values() for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)
    ]
    if any(getattr(hook, "__module__", None) != CAPTURING for hooks in hooked for hook in hooks):
        return None
    config = model.config
    if type(model) is GPT2LMHeadModel and not config.reorder_and_upcast_attn and not config.add_cross_attention:
        return _GPT2Blocks(model)
    if type(model) is LlamaForCausalLM and getattr(config, "pretraining_tp", 1) == 1:
        return _LlamaBlocks(model)
    return None


class _GPT2Blocks:
    def __init__(self, model: Any) -> None:
        self._trunk, self._layers, self.head = model.transformer, list(model.transformer.h), model.lm_head
        self.count = len(self._layers)
        self.key_value_heads = model.config.n_head
        self.head_width = model.config.n_embd // model.config.n_head

    def embed(self, ids_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
        return self._trunk.wte(ids_B) + self._trunk.wpe(positions_B)

    def attention_inputs(self, layer: int, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        block = self._layers[layer]
        joint = block.attn.c_attn(block.ln_1(x_BD)).view(len(x_BD), 3, self.key_value_heads, self.head_width)
        query, key, value = joint.unbind(1)
        return query, key, value

    def rest(self, layer: int, x_BD: torch.Tensor, attended_BD: torch.Tensor) -> torch.Tensor:
        block = self._layers[layer]
        x_BD = x_BD + block.attn.c_proj(attended_BD)
        mlp = block.mlp
        return x_BD + mlp.c_proj(mlp.act(mlp.c_fc(block.ln_2(x_BD))))

    def normalized(self, x_BD: torch.Tensor) -> torch.Tensor:
        return self._trunk.ln_f(x_BD)

    def scaling(self, layer: int) -> float:
        return self._layers[layer].attn.scaling


class _LlamaBlocks:
    def __init__(self, model: Any) -> None:
        self._trunk, self._layers, self.head = model.model, list(model.model.layers), model.lm_head
        self.count = len(self._layers)
        self.key_value_heads = model.config.num_key_value_heads
        self.head_width = self._layers[0].self_attn.head_dim
        self._cos_B1K = self._sin_B1K = torch.empty(0)

    def embed(self, ids_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
        x_BD = self._trunk.embed_tokens(ids_B)
        cos_1BK, sin_1BK = self._trunk.rotary_emb(x_BD, positions_B[None])
        self._cos_B1K, self._sin_B1K = cos_1BK[0, :, None], sin_1BK[0, :, None]
        return x_BD

    def _rotated(self, x_BHK: torch.Tensor) -> torch.Tensor:
        """Su et al., "RoFormer" (2021), the halves paired as in Llama."""
        first, second = x_BHK.chunk(2, dim=-1)
        return x_BHK * self._cos_B1K + torch.cat([-second, first], dim=-1) * self._sin_B1K

    def attention_inputs(self, layer: int, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        block = self._layers[layer]
        attention, h_BD = block.self_attn, block.input_layernorm(x_BD)
        shape = (len(x_BD), -1, self.head_width)
        query, key, value = (
            project(h_BD).view(shape) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return self._rotated(query), self._rotated(key), value

    def rest(self, layer: int, x_BD: torch.Tensor, attended_BD: torch.Tensor) -> torch.Tensor:
        block = self._layers[layer]
        x_BD = x_BD + block.self_attn.o_proj(attended_BD)
        return x_BD + block.mlp(block.post_attention_layernorm(x_BD))

    def normalized(self, x_BD: torch.Tensor) -> torch.Tensor:
        return self._trunk.norm(x_BD)

    def scaling(self, layer: int) -> float:
        return self._layers[layer].self_attn.scaling
