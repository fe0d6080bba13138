"""What the models say of a rollout: log-probs, entropies, values, reference log-probs.

Shape suffixes: B sequences, T response positions, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from rlhf_core.packing import hidden_states, pack, packable, response_logprobs
from rlhf_core.parallel import together, workers
from rlhf_core.policy import ActorCritic, Outputs, Reference, autocast
from rlhf_core.rollout import Rollout
from rlhf_kernels import token_logprobs

LogitsOf = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""[B, T, V] the logits that predict the last T tokens, from token ids [B, L], attention mask [B, L] and T."""

Plan = list[list[torch.Tensor]]
"""The minibatches of an epoch, each a list of micro-batches, each the rows of a rollout."""


@dataclass(frozen=True)
class Scores:
    """What the models say of a rollout before its updates; constants of the update, all [B, T] in the model's dtype."""

    logprobs_BT: torch.Tensor
    entropies_BT: torch.Tensor
    values_BT: torch.Tensor | None
    """None where there is no value model."""
    ref_logprobs_BT: torch.Tensor


def evaluate_rows(
    model: ActorCritic,
    rollout: Rollout,
    rows: torch.Tensor,
    temperature: float,
    dtype: str,
    outputs: Outputs | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return [b, T] log-probs, entropies and values of some rows of a rollout, in float32 (float64 of such a model).

    With ``outputs``, one of the model's passes, what it does not give is None: of ``("values",)`` the first two.
    """
    ids_BL, attention_BL, length = rollout.input_ids_BL[rows], rollout.attention_mask_BL[rows], rollout.response_length
    logprobs_BT = entropies_BT = values_BT = None
    with autocast(ids_BL.device, dtype):
        for given in model.passes if outputs is None else (outputs,):
            trunk = model.lm if "logits" in given or model.value_trunk is None else model.value_trunk
            blocks = packable(trunk)
            if blocks is None:
                logits_BTV, values_BT = model(ids_BL, attention_BL, length, given)
                if logits_BTV is not None:
                    labels_BT = rollout.response_ids_BT[rows]
                    logprobs_BT, entropies_BT = token_logprobs(
                        logits_BTV, labels_BT, temperature=temperature, with_entropy=True
                    )
                continue
            packed = pack(ids_BL, attention_BL, length)
            hidden_MD = hidden_states(blocks, packed, packed.predicting_M)
            if "logits" in given:
                logprobs_BT, entropies_BT = response_logprobs(blocks, packed, hidden_MD, temperature)
            if "values" in given:
                values_BT = packed.on_responses(model.values(hidden_MD))
    return logprobs_BT, entropies_BT, values_BT


def response_scores(
    lm: PreTrainedModel,
    logits_of: LogitsOf,
    input_ids_BL: torch.Tensor,
    attention_mask_BL: torch.Tensor,
    response_length: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [B, T] log-probs and entropies of the last tokens of some rows, under the autocast of the caller.

    Args:
        lm: the language model.
        logits_of: its logits, for a model whose tokens cannot go side by side.
        input_ids_BL: left-padded prompts and right-padded responses.
        attention_mask_BL: 1 on real tokens.
        response_length: T.
        temperature: divides the logits.
    """
    blocks = packable(lm)
    if blocks is not None:
        packed = pack(input_ids_BL, attention_mask_BL, response_length)
        hidden_MD = hidden_states(blocks, packed, packed.predicting_M)
        return response_logprobs(blocks, packed, hidden_MD, temperature)
    logits_BTV = logits_of(input_ids_BL, attention_mask_BL, response_length)
    labels_BT = input_ids_BL[:, input_ids_BL.shape[1] - response_length :]
    return token_logprobs(logits_BTV, labels_BT, temperature=temperature, with_entropy=True)


def evaluate_reference(
    reference: Reference, rollout: Rollout, rows: torch.Tensor, temperature: float, dtype: str
) -> torch.Tensor:
    """Return [b, T] the reference's log-probs of some rows of a rollout."""
    ids_BL, attention_BL, length = rollout.input_ids_BL[rows], rollout.attention_mask_BL[rows], rollout.response_length
    with autocast(ids_BL.device, dtype):
        return response_scores(reference.lm, reference, ids_BL, attention_BL, length, temperature)[0]


@torch.no_grad()
def score_rollout(
    model: ActorCritic, reference: Reference, rollout: Rollout, plan: Plan, temperature: float, dtype: str
) -> Scores:
    """Return log-probs, entropies, values and reference log-probs of a rollout.

    The rows go through the models in the micro-batches of the first epoch. A row's bits may depend on the rows beside
    it; so the first update sees the very log-probs that it is compared with, and its ratio is exactly 1.
    """
    device = rollout.input_ids_BL.device

    def empty() -> torch.Tensor:
        return torch.zeros(rollout.response_mask_BT.shape, dtype=next(model.parameters()).dtype, device=device)

    logprobs_BT, entropies_BT, ref_logprobs_BT = empty(), empty(), empty()
    values_BT = empty() if model.has_value else None

    def score(rows: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (
            *evaluate_rows(model, rollout, rows, temperature, dtype),
            evaluate_reference(reference, rollout, rows, temperature, dtype),
        )

    micro_batches = [rows.to(device) for minibatch in plan for rows in minibatch]
    for rows, scored in zip(micro_batches, together(score, micro_batches, workers(device)), strict=True):
        for all_BT, some_BT in zip((logprobs_BT, entropies_BT, values_BT, ref_logprobs_BT), scored, strict=True):
            if all_BT is not None:
                assert some_BT is not None
                all_BT[rows] = some_BT
    return Scores(logprobs_BT, entropies_BT, values_BT, ref_logprobs_BT)
