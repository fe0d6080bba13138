"""The real tokens of some rows side by side: nothing is computed for padding, and logits are never held.

What a model does to a token depends on that token alone, but in attention. So the tokens go through its blocks as one
matrix, and only queries, keys and values are laid out by rows. The head sees the positions that predict a response, in
parts of the vocabulary. For transformers' GPT-2 and Llama; other models go the way through their own ``forward``.

Shape suffixes: B rows, L positions, T response positions, N real tokens, M real response tokens, D width, H heads,
G key-value heads, K head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from rlhf_core.blocks import Blocks, blocks_of, do_at_once, heads_of
from rlhf_core.numerics import is_portable
from rlhf_kernels import linear_token_logprobs
from rlhf_kernels.attention import attend, attends
from rlhf_kernels.program import Program


@dataclass(frozen=True)
class PackedRows:
    """Rows of left-padded prompts and right-padded responses, without their padding."""

    ids_N: torch.Tensor
    """Tokens, row after row."""
    positions_N: torch.Tensor
    """Each token's place in its row."""
    starts: torch.Tensor
    """[B + 1] where each row begins, and N."""
    rows: int
    """B."""
    longest: int
    """Tokens of the longest row."""
    places_N: torch.Tensor | None
    """Where the real tokens stand in [B · longest] left-aligned rows; None where those have no padding."""
    response_length: int
    """T."""
    responses_M: torch.Tensor
    """Where the response tokens stand in [B · T]."""
    labels_M: torch.Tensor
    """The response tokens."""
    predicting_M: torch.Tensor
    """Which of the N tokens stands before each."""

    def by_rows(self, x_NHK: torch.Tensor) -> torch.Tensor:
        """Return [B, H, longest, K], zero behind the end of a row."""
        if self.places_N is not None:
            x_NHK = x_NHK.new_zeros(self.rows * self.longest, *x_NHK.shape[1:]).index_copy(0, self.places_N, x_NHK)
        return x_NHK.view(self.rows, self.longest, *x_NHK.shape[1:]).transpose(1, 2)

    def side_by_side(self, x_BHLK: torch.Tensor) -> torch.Tensor:
        """Return [N, H · K], the inverse of :meth:`by_rows`."""
        flat = x_BHLK.transpose(1, 2).reshape(self.rows * self.longest, -1)
        return flat if self.places_N is None else flat[self.places_N]

    def on_responses(self, x_M: torch.Tensor) -> torch.Tensor:
        """Return [B, T], zero where there is no token."""
        grid = x_M.new_zeros(self.rows * self.response_length).index_copy(0, self.responses_M, x_M)
        return grid.view(self.rows, self.response_length)


def pack(input_ids_BL: torch.Tensor, attention_mask_BL: torch.Tensor, response_length: int) -> PackedRows:
    """Return the real tokens of rows whose last ``response_length`` columns are the responses.

    Args:
        input_ids_BL: [B, L] tokens.
        attention_mask_BL: [B, L] 1 on real tokens, which stand together; each row begins with one of its prompt.
        response_length: T.
    """
    real_BL = attention_mask_BL.bool()
    rows, length = real_BL.shape
    lengths_B = real_BL.sum(dim=1)
    row_N, column_N = real_BL.nonzero(as_tuple=True)
    positions_N = (real_BL.cumsum(dim=1) - 1)[row_N, column_N]
    response_N = column_N - (length - response_length)
    token_M = (response_N >= 0).nonzero()[:, 0]
    ids_N = input_ids_BL[row_N, column_N]
    longest = int(lengths_B.max())
    return PackedRows(
        ids_N=ids_N,
        positions_N=positions_N,
        starts=nn.functional.pad(lengths_B.cumsum(0), (1, 0)),
        rows=rows,
        longest=longest,
        places_N=None if len(ids_N) == rows * longest else row_N * longest + positions_N,
        response_length=response_length,
        responses_M=row_N[token_M] * response_length + response_N[token_M],
        labels_M=ids_N[token_M],
        predicting_M=token_M - 1,
    )


def packable(model: PreTrainedModel) -> Blocks | None:
    """Return the blocks through which a model's tokens can go side by side; None where only its ``forward`` will do.

    Under portable numerics that is so for every model.
    """
    head: Any = getattr(model, "lm_head", None)
    if is_portable() or (head is not None and (not isinstance(head, nn.Linear) or head.bias is not None)):
        return None
    return blocks_of(model)


Keep = Callable[[torch.Tensor, torch.Tensor], None]
"""Hears of a layer's keys and values [N, G, K], the layers in order."""


def hidden_states(blocks: Blocks, packed: PackedRows, read_M: torch.Tensor) -> torch.Tensor:
    """Return [M, D] what goes into the head at the tokens that are read, each of which is named once.

    Of the others the last block makes keys and values alone.
    """
    x_ND = blocks.embed(packed.ids_N, packed.positions_N)
    program = runnable(blocks, x_ND)
    if program is None:
        return one_by_one(blocks, packed, x_ND, read_M)
    return program.run(x_ND, packed.starts, blocks.turns, read_M)


def runnable(blocks: Blocks, x_ND: torch.Tensor) -> Program | None:
    """Return the blocks' program if it can take what goes into them; otherwise they are done one by one."""
    return None if torch.is_autocast_enabled(x_ND.device.type) or not attends(x_ND) else blocks.program


def one_by_one(
    blocks: Blocks,
    packed: PackedRows,
    x_ND: torch.Tensor,
    read_M: torch.Tensor,
    keep: Keep = lambda key, value: None,
) -> torch.Tensor:
    """Return [M, D] what goes into the head, from what goes into the first block."""
    for layer in range(blocks.count):
        matrices = blocks.attention_inputs(layer, x_ND, do_at_once)
        _, key_NGK, value_NGK = heads_of(blocks, matrices)
        keep(key_NGK, value_NGK)
        attended_ND = _attended(blocks, packed, layer, matrices)
        if layer == blocks.count - 1:
            x_ND, attended_ND = x_ND.index_select(0, read_M), attended_ND.index_select(0, read_M)
        x_ND = blocks.rest(layer, x_ND, attended_ND, do_at_once)
    return blocks.normalized(x_ND, do_at_once)


def _attended(blocks: Blocks, packed: PackedRows, layer: int, matrices: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return [N, H · K] what each query attends to; on the CPU in float32 at least, as the native kernel is."""
    narrow = matrices[-1].dtype
    dtype = narrow if matrices[-1].device.type != "cpu" else torch.promote_types(narrow, torch.float32)
    query_NHK, key_NGK, value_NGK = (x.to(dtype) for x in heads_of(blocks, matrices))
    if attends(query_NHK):
        mixed_NHK = attend(query_NHK, key_NGK, value_NGK, packed.starts, blocks.scaling(layer))
        return mixed_NHK.flatten(1).to(narrow)
    with torch.autocast(query_NHK.device.type, enabled=False):
        mixed_BHLK = scaled_dot_product_attention(
            packed.by_rows(query_NHK),
            packed.by_rows(key_NGK),
            packed.by_rows(value_NGK),
            is_causal=True,  # what lies behind the end of a row is seen by nobody in it
            scale=blocks.scaling(layer),
            enable_gqa=blocks.heads != blocks.key_value_heads,
        )
    return packed.side_by_side(mixed_BHLK).to(narrow)


def response_logprobs(
    blocks: Blocks, packed: PackedRows, hidden_MD: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [B, T] log-probs and entropies of response tokens, from the :func:`hidden_states` that predict them."""
    weight_VD = blocks.head_weight()
    if torch.is_autocast_enabled(hidden_MD.device.type):
        dtype = torch.get_autocast_dtype(hidden_MD.device.type)
        hidden_MD, weight_VD = hidden_MD.to(dtype), weight_VD.to(dtype)
    logprobs_M, entropies_M = linear_token_logprobs(
        hidden_MD, weight_VD, packed.labels_M, temperature=temperature, with_entropy=True, keep_logits=True
    )
    return packed.on_responses(logprobs_M), packed.on_responses(entropies_M)
