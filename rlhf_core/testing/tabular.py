"""A causal language model that is a table: one row of logits for each prefix of a :class:`World`.

It answers to what a trainer calls of a transformers model: ``forward`` with a key–value cache, ``config``,
``base_model``, ``hidden_states``, ``save_pretrained``. Its last hidden state is the prefix as a one-hot vector, so a
linear value head is a table of values, one for each prefix.

Because prefixes share no weights, a gradient can be read: the row of a prefix moved exactly when a loss was taken
there. The table has rows for prefixes behind the end of a response too. No loss may ever move them.

A prefix is what the attention mask leaves of the tokens so far. Positions that are given have to say the same: a token
whose ``position_ids`` entry is not the number of attended tokens before it is at row 0, which no world reaches. Without
them the mask alone decides, as in models whose positions are relative.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from rlhf_core.testing.world import Tokens, World


class TabularConfig(PreTrainedConfig):
    """As much of a configuration as a trainer and a cache ask for."""

    model_type = "tabular"

    def __init__(self, vocab_size: int = 4, hidden_size: int = 1, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.dropout = vocab_size, hidden_size, dropout
        self.num_hidden_layers = self.num_attention_heads = self.num_key_value_heads = 1


@dataclass
class TabularOutput(ModelOutput):
    """What ``forward`` returns."""

    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    past_key_values: DynamicCache | None = None


class TabularPolicy(PreTrainedModel):
    """log π(token | prefix) = log softmax(table[prefix]), with a row for every prefix of a world.

    Args:
        world: the prompts and responses that there are.
        logits: [S, V] the table, S = ``len(policy.states)``; None draws it.
        seed: of the table that is drawn: normal, of deviation ``scale``.
        scale: see ``seed``.
        dropout: probability of dropout on the logits, for checks that it stays off.
    """

    config_class = TabularConfig
    base_model_prefix = "tabular"

    def __init__(
        self, world: World, logits: Tensor | None = None, *, seed: int = 0, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        self.world = world
        self.states = tabular_states(world)
        super().__init__(
            TabularConfig(
                vocab_size=world.vocabulary,
                hidden_size=len(self.states),
                dropout=dropout,
                eos_token_id=world.eos_id,
                bos_token_id=world.eos_id,
                pad_token_id=world.pad_id,
            )
        )
        if logits is None:
            generator = torch.Generator().manual_seed(seed)
            shape = (len(self.states), world.vocabulary)
            logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.table = nn.Parameter(logits.clone())
        self.dropout = nn.Dropout(dropout)
        self._codes: Tensor
        self._rows: Tensor
        codes = [_code(state, world.vocabulary) for state in self.states]
        order = sorted(range(len(codes)), key=codes.__getitem__)
        self.register_buffer("_codes", torch.tensor([codes[row] for row in order]), persistent=False)
        self.register_buffer("_rows", torch.tensor(order), persistent=False)
        self.eval()

    def row(self, prompt: int, prefix: Tokens) -> int:
        """Return the table's row of a prefix of a response to a prompt."""
        return self.states.index((*self.world.prompts[prompt], *prefix))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | slice | Tensor = 0,
        **_: Any,
    ) -> TabularOutput:
        """Return logits [B, L, V] and hidden states [B, L, S] of the tokens given; the cache keeps the ones before."""
        new = input_ids.shape[1]
        if past_key_values is not None:
            keys_B1L1 = input_ids[:, None, :, None].to(self.table.dtype)
            input_ids = past_key_values.update(keys_B1L1, keys_B1L1, 0)[0][:, 0, :, 0].long()
        attended_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows_BL = self._lookup(input_ids, attended_BL.bool())[:, -new:]
        if position_ids is not None:
            places_BL = attended_BL.long().cumsum(dim=1)[:, -new:] - 1
            rows_BL = torch.where(position_ids == places_BL, rows_BL, 0)
        hidden_BLS = nn.functional.one_hot(rows_BL, len(self.states)).to(self.table.dtype)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BLV = self.dropout(self.table[rows_BL[:, kept]])
        return TabularOutput(
            logits=logits_BLV,
            last_hidden_state=hidden_BLS,
            hidden_states=(hidden_BLS,) if output_hidden_states else None,
            past_key_values=past_key_values,
        )

    def _lookup(self, ids_BL: Tensor, attended_BL: Tensor) -> Tensor:
        """Return [B, L] the row of what has been read at each position; row 0 is every prefix that no world has."""
        code_B = torch.zeros_like(ids_BL[:, 0])
        codes = []
        for ids_B, attended_B in zip(ids_BL.T, attended_BL.T, strict=True):
            code_B = torch.where(attended_B, code_B * (self.world.vocabulary + 1) + ids_B + 1, code_B)
            codes.append(code_B)
        codes_BL = torch.stack(codes, dim=1)
        place_BL = torch.searchsorted(self._codes, codes_BL).clamp(max=len(self._codes) - 1)
        return torch.where(self._codes[place_BL] == codes_BL, self._rows[place_BL], 0)


@cache
def tabular_states(world: World) -> tuple[Tokens, ...]:
    """Return the prefixes of the table's rows: nothing, then for each prompt its prefixes, then its whole responses."""
    prefixes = [(*prompt, *prefix) for prompt in world.prompts for prefix in world.prefixes]
    whole = [(*prompt, *response) for prompt in world.prompts for response in world.responses]
    return ((), *prefixes, *whole)


def _code(tokens: Tokens, vocabulary: int) -> int:
    """Return a whole number that belongs to these tokens alone."""
    code = 0
    for token in tokens:
        code = code * (vocabulary + 1) + token + 1
    return code
