"""What the models say of a rollout: log-probs, entropies, values, reference log-probs.

Shape suffixes: B sequences, T response positions, V vocabulary.
"""

from dataclasses import dataclass

import torch

from rlhf_core.policy import ActorCritic, Reference, autocast
from rlhf_core.rollout import Rollout
from rlhf_kernels import token_logprobs

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
    model: ActorCritic, rollout: Rollout, rows: torch.Tensor, temperature: float, dtype: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return [b, T] log-probs, entropies and values of some rows of a rollout, in float32 (float64 of such a model)."""
    with autocast(rollout.input_ids_BL.device, dtype):
        logits_BTV, values_BT = model(
            rollout.input_ids_BL[rows], rollout.attention_mask_BL[rows], rollout.response_length
        )
    logprobs_BT, entropies_BT = token_logprobs(
        logits_BTV, rollout.response_ids_BT[rows], temperature=temperature, with_entropy=True
    )
    return logprobs_BT, entropies_BT, values_BT


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
    for rows in (rows.to(device) for minibatch in plan for rows in minibatch):
        logprobs_BT[rows], entropies_BT[rows], row_values_BT = evaluate_rows(model, rollout, rows, temperature, dtype)
        if values_BT is not None and row_values_BT is not None:
            values_BT[rows] = row_values_BT
        with autocast(device, dtype):
            ref_logits_BTV = reference(
                rollout.input_ids_BL[rows], rollout.attention_mask_BL[rows], rollout.response_length
            )
        ref_logprobs_BT[rows] = token_logprobs(ref_logits_BTV, rollout.response_ids_BT[rows], temperature=temperature)
    return Scores(logprobs_BT, entropies_BT, values_BT, ref_logprobs_BT)
