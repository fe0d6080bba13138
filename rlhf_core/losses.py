"""The losses: pure functions of tensors. Each is a *sum* over the mask, for the caller to divide.

Dividing by the tokens of the whole minibatch, and not of the part at hand, is what makes the gradient independent of
how a minibatch is split into micro-batches.

What lies outside the mask, NaN included, changes no bit: the sum leaves it out, and the input that carries a gradient
is replaced there on its way in, because the derivative of a NaN that was left out is 0 times NaN.

Shape suffixes: B sequences, T response positions.
"""

import torch


def masked_sum(x_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Return Σ x over the mask."""
    return torch.where(mask_BT, x_BT, 0.0).sum()


def log_ratio(new_BT: torch.Tensor, old_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Return log π_new − log π_old on the mask and 0 elsewhere.

    Both are replaced *before* the difference, so that a NaN outside the mask cannot reach the gradient either.
    """
    return torch.where(mask_BT, new_BT, 0.0) - torch.where(mask_BT, old_BT, 0.0)


def ppo_policy_loss(
    log_ratio_BT: torch.Tensor, advantages_BT: torch.Tensor, mask_BT: torch.Tensor, *, clip_range: float
) -> torch.Tensor:
    """Return Σ_t max(−ρ_t A_t, −clip(ρ_t, 1−ε, 1+ε) A_t): Schulman et al., "PPO" (2017), eq. 7, negated.

    Args:
        log_ratio_BT: [B, T] log ρ = log π_new − log π_old.
        advantages_BT: [B, T] A, a constant.
        mask_BT: [B, T] True on response tokens.
        clip_range: ε.
    """
    ratio_BT = torch.where(mask_BT, log_ratio_BT, 0.0).exp()
    clipped_BT = ratio_BT.clamp(1.0 - clip_range, 1.0 + clip_range)
    return masked_sum(torch.maximum(-ratio_BT * advantages_BT, -clipped_BT * advantages_BT), mask_BT)


def clipped_value_loss(
    values_BT: torch.Tensor,
    old_values_BT: torch.Tensor,
    returns_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    clip_range: float,
) -> torch.Tensor:
    """Return ½ Σ_t max((V−R)², (V_old + clip(V−V_old, ±ε) − R)²).

    The value clipping of Huang et al., "The N Implementation Details of RLHF with PPO" (2023).

    Args:
        values_BT: [B, T] V.
        old_values_BT: [B, T] values when the rollout was scored, a constant.
        returns_BT: [B, T] R, a constant.
        mask_BT: [B, T] True on response tokens.
        clip_range: ε, in units of value.
    """
    values_BT = torch.where(mask_BT, values_BT, 0.0)
    clipped_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip_range, clip_range)
    errors_BT = torch.maximum((values_BT - returns_BT).square(), (clipped_BT - returns_BT).square())
    return 0.5 * masked_sum(errors_BT, mask_BT)


def kl_k3(log_ratio_BT: torch.Tensor) -> torch.Tensor:
    """Return e^{−x} − 1 + x for x = log p − log q: an estimate of KL(p‖q) under p that is never negative.

    Schulman, "Approximating KL Divergence" (2020), k3; ``expm1`` keeps its digits where x is small.
    """
    return torch.expm1(-log_ratio_BT) + log_ratio_BT
