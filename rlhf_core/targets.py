"""What an update steers to: from rewards and values to advantages and returns, by the configured estimator.

Shape suffixes: B sequences, T response positions.
"""

from dataclasses import dataclass

import torch

from rlhf_core.advantages import (
    group_mean_advantages,
    group_standard_scores,
    leave_one_out_advantages,
    sequence_returns,
)
from rlhf_core.config import PPOConfig
from rlhf_kernels import gae, whiten

GROUP_ESTIMATORS = {
    "group-mean": group_mean_advantages,
    "group-standard-score": group_standard_scores,
    "leave-one-out": leave_one_out_advantages,
}


@dataclass(frozen=True)
class Targets:
    """What the update steers to, all [B, T]: A whitened as configured, and the returns."""

    advantages_BT: torch.Tensor
    returns_BT: torch.Tensor | None
    """None where there is no value model."""


def make_targets(
    rewards_BT: torch.Tensor, values_BT: torch.Tensor | None, mask_BT: torch.Tensor, config: PPOConfig
) -> tuple[Targets, torch.Tensor]:
    """Return the update's targets, and the advantages before whitening.

    Args:
        rewards_BT: [B, T] rewards of tokens; the completions of a prompt side by side.
        values_BT: [B, T] values, for ``gae`` alone.
        mask_BT: [B, T] True on response tokens.
        config: decides the estimator.
    """
    recipe = config.recipe
    if config.whiten_rewards:
        rewards_BT = whiten(rewards_BT, mask_BT, shift_mean=False)
    returns_BT = None
    if recipe.has_value_model:
        assert values_BT is not None
        raw_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=config.gamma, lam=config.lam)
    elif recipe.advantage == "reward-to-go":
        # Σ_{t' ≥ t} γ^{t'−t} r_t' is GAE with λ = 1 and no values: Hu et al., "REINFORCE++" (2025), eq. 8.
        raw_BT, _ = gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, gamma=config.gamma, lam=1.0)
    else:
        advantages_B = GROUP_ESTIMATORS[recipe.advantage](sequence_returns(rewards_BT, mask_BT), recipe.group_size)
        raw_BT = torch.where(mask_BT, advantages_B[:, None].to(rewards_BT.dtype), 0.0)
    return Targets(whiten(raw_BT, mask_BT) if recipe.whiten_advantages else raw_BT, returns_BT), raw_BT
