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
from typing import Any, Protocol, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, PreTrainedModel

from rlhf_core.blocks import Blocks, blocks_of, do_at_once, heads_of
from rlhf_core.layers import RowwiseLinear
from rlhf_core.numerics import is_portable
from rlhf_core.packing import one_by_one, pack, runnable
from rlhf_core.policy import ForwardArguments, position_ids
from rlhf_kernels.attention import Cache, attends
from rlhf_kernels.products import multiply, takes
from rlhf_kernels.program import Step


class Decoder(Protocol):
    """Reads prompts, then a token of each at a time."""

    def read_prompts(self, ids_BP: torch.Tensor, attention_BP: torch.Tensor) -> torch.Tensor:
        """Return [B, V] the logits behind left-padded prompts."""
        ...

    def read_tokens(self, ids_B: torch.Tensor) -> torch.Tensor:
        """Return [B, V] the logits behind one more token of each row, which the next call may overwrite."""
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
            query_BHK, key_BGK, value_BGK = heads_of(blocks, blocks.attention_inputs(layer, x_BD, do_at_once))
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
            x_BD = blocks.rest(layer, x_BD, attended_BH1K.reshape(len(ids_B), -1), do_at_once)
        logits_BV: torch.Tensor = self._model.lm_head(blocks.normalized(x_BD, do_at_once))
        return logits_BV

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone, in this order."""
        self._keys = [keys[rows] for keys in self._keys]
        self._values = [values[rows] for values in self._values]
        self._positions_B, self._mask_B11S = self._positions_B[rows], self._mask_B11S[rows]


class RowDecoder:
    """Decodes block by block, each row over a cache of its own length: what :mod:`rlhf_core.packing` does, bit for bit.

    A token goes through the same operators there and here, and its attention depends on its row alone.
    """

    def __init__(self, model: PreTrainedModel, blocks: Blocks, max_new_tokens: int) -> None:
        self._model: Any = model
        self._blocks = blocks
        self._room = max_new_tokens
        self._caches: list[Cache] = []
        self._lengths_B = torch.empty(0)
        self._step: Step | None = None
        self._logits_BV: torch.Tensor | None = None

    def read_prompts(self, ids_BP: torch.Tensor, attention_BP: torch.Tensor) -> torch.Tensor:
        """Return [B, V] the logits behind left-padded prompts."""
        packed = pack(ids_BP, attention_BP, response_length=0)
        x_ND = self._blocks.embed(packed.ids_N, packed.positions_N)
        program, starts = runnable(self._blocks, x_ND), packed.starts
        last_B = starts[1:] - 1

        def keep(key_NGK: torch.Tensor, value_NGK: torch.Tensor) -> None:
            self._caches.append(Cache(key_NGK.float(), value_NGK.float(), starts, self._room))

        if program is None:
            hidden_BD = one_by_one(self._blocks, packed, x_ND, last_B, keep)
        else:
            turns = self._blocks.turns
            hidden_BD, self._caches = program.run_into_caches(x_ND, starts, turns, self._room, last_B)
        self._lengths_B = starts.diff()
        return self._logits(hidden_BD)

    def read_tokens(self, ids_B: torch.Tensor) -> torch.Tensor:
        """Return [B, V] the logits behind one more token of each row."""
        blocks = self._blocks
        x_BD = blocks.embed(ids_B, self._lengths_B)
        program = runnable(blocks, x_BD)
        if program is None:
            hidden_BD = self._one_by_one(x_BD)
        else:
            self._step = self._step or program.over(self._caches, len(ids_B))
            hidden_BD = self._step(x_BD, self._lengths_B, blocks.turns)
        self._lengths_B += 1
        return self._logits(hidden_BD)

    def _logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """Return [B, V] the logits, in memory that the next call uses again: new memory costs its pages."""
        head = self._model.lm_head
        if type(head) is not RowwiseLinear or not takes(hidden_BD, head.weight, head.bias):
            return cast("torch.Tensor", head(hidden_BD))
        if self._logits_BV is None:
            self._logits_BV = hidden_BD.new_empty(len(hidden_BD), len(head.weight))
        out_BV = self._logits_BV[: len(hidden_BD)]  # rows only leave
        return multiply(hidden_BD, head.weight.t(), head.bias, out_MN=out_BV)

    def _one_by_one(self, x_BD: torch.Tensor) -> torch.Tensor:
        blocks = self._blocks
        for layer, cache in enumerate(self._caches):
            matrices = blocks.attention_inputs(layer, x_BD, do_at_once)
            query_BHK, key_BGK, value_BGK = (x.float() for x in heads_of(blocks, matrices))
            attended_BHK = cache.attend(query_BHK, key_BGK, value_BGK, self._lengths_B, blocks.scaling(layer))
            x_BD = blocks.rest(layer, x_BD, attended_BHK.flatten(1).to(matrices[-1].dtype), do_at_once)
        return blocks.normalized(x_BD, do_at_once)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone, in this order."""
        for cache in self._caches:
            cache.keep(rows)
        self._lengths_B = self._lengths_B[rows]
        self._step = None
