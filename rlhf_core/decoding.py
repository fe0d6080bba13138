"""One token after the other from a causal language model: its own forward pass, or a shorter way through its blocks.

A decoding step computes little, so what surrounds it counts: a model's ``forward`` makes masks, positions and cache
objects anew for each token. :class:`RowDecoder` calls the layers of GPT-2 and Llama one by one over a cache that is
allocated once, and gives the bits that training gives: float32 on a CPU. :class:`BlockDecoder` does so elsewhere, over
torch's attention; :class:`ModelDecoder` serves every model.

Shape suffixes: B sequences, P prompt positions, S cached positions, H heads, G key-value heads, K head width, V
vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, PreTrainedModel

from rlhf_core.blocks import Blocks, blocks_of
from rlhf_core.chain import Chain
from rlhf_core.layers import Projection
from rlhf_core.numerics import is_portable
from rlhf_core.packing import hidden_states, pack
from rlhf_core.policy import ForwardArguments, position_ids
from rlhf_kernels.attention import Cache, attends, read_in_place
from rlhf_kernels.native import Prepared


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
    if blocks is None:
        return ModelDecoder(model)
    if attends(next(model.parameters())):
        return RowDecoder(model, blocks, max_new_tokens)
    return BlockDecoder(model, blocks, max_new_tokens)


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


class BlockDecoder:
    """Decodes block by block over keys and values that are allocated once."""

    def __init__(self, model: PreTrainedModel, blocks: Blocks, max_new_tokens: int) -> None:
        self._model: Any = model
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
        logits_BV: torch.Tensor = self._model.lm_head(blocks.normalized(x_BD))
        return logits_BV

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone, in this order."""
        self._keys = [keys[rows] for keys in self._keys]
        self._values = [values[rows] for values in self._values]
        self._positions_B, self._mask_B11S = self._positions_B[rows], self._mask_B11S[rows]


class RowDecoder:
    """Decodes block by block, each row over a cache of its own length: what :mod:`rlhf_core.packing` does, bit for bit.

    A token goes through the same layers there and here, and its attention depends on its row alone. The first token
    writes down what is done, and those after it do that again.
    """

    def __init__(self, model: PreTrainedModel, blocks: Blocks, max_new_tokens: int) -> None:
        self._model: Any = model
        self._blocks = blocks
        self._room = max_new_tokens
        self._caches: list[Cache] = []
        self._lengths_B = torch.empty(0)
        self._step: _Step | None = None

    def read_prompts(self, ids_BP: torch.Tensor, attention_BP: torch.Tensor) -> torch.Tensor:
        """Return [B, V] the logits behind left-padded prompts."""
        packed = pack(ids_BP, attention_BP, response_length=0)

        def keep(key_NGK: torch.Tensor, value_NGK: torch.Tensor) -> None:
            self._caches.append(Cache(key_NGK, value_NGK, packed.starts, self._room))

        hidden_ND = hidden_states(self._blocks, packed, keep)
        self._lengths_B = packed.starts.diff()
        return cast("torch.Tensor", self._model.lm_head(hidden_ND[packed.starts[1:] - 1]))

    def read_tokens(self, ids_B: torch.Tensor) -> torch.Tensor:
        """Return [B, V] the logits behind one more token of each row; the next call overwrites them."""
        if self._step is None:
            self._step = _Step(self._model, ids_B, self._caches, self._lengths_B)
        else:
            self._step.again(ids_B)
        self._lengths_B += 1
        return self._step.logits_BV

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone, in this order."""
        for cache in self._caches:
            cache.keep(rows)
        self._lengths_B = self._lengths_B[rows]
        self._step = None


class _Step:
    """A token of each row through all blocks, whose lengths and caches are brought up to date from outside."""

    def __init__(self, model: Any, ids_B: torch.Tensor, caches: list[Cache], lengths_B: torch.Tensor) -> None:
        self._chain, self._lengths_B = Chain(), lengths_B
        blocks = blocks_of(model, self._chain.do)
        assert blocks is not None
        self._embed = blocks.embed
        x_BD = self._x_BD = blocks.embed(ids_B, lengths_B)
        for layer, cache in enumerate(caches):
            attention = _Attention(cache, lengths_B, blocks.scaling(layer))
            attended_BD = self._chain.do(attention, *blocks.attention_inputs(layer, x_BD))
            x_BD = blocks.rest(layer, x_BD, attended_BD)
        self.logits_BV = self._chain.do(Projection(model.lm_head), blocks.normalized(x_BD))

    def again(self, ids_B: torch.Tensor) -> None:
        """Read the next token of each row."""
        self._x_BD.copy_(self._embed(ids_B, self._lengths_B))
        self._chain.again()


@dataclass(frozen=True)
class _Attention:
    """Attention of a token of each row over a cache, in float32; what comes back has the dtype of the values."""

    cache: Cache
    lengths_B: torch.Tensor
    scale: float

    def __call__(self, query_BHK: torch.Tensor, key_BGK: torch.Tensor, value_BGK: torch.Tensor) -> torch.Tensor:
        wide = query_BHK.float(), key_BGK.float(), value_BGK.float()
        return self.cache.attend(*wide, self.lengths_B, self.scale).flatten(1).to(value_BGK.dtype)

    def prepared(self, query_BHK: torch.Tensor, key_BGK: torch.Tensor, value_BGK: torch.Tensor) -> Prepared | None:
        inputs = query_BHK, key_BGK, value_BGK
        if not all(x.dtype == torch.float32 and read_in_place(x) for x in inputs):
            return None
        attended_BHK, calls = self.cache.prepare(*inputs, self.lengths_B, self.scale)
        return attended_BHK.flatten(1), calls
