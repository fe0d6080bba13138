"""The losses of policy-gradient training: pure functions of tensors.

Each gives a loss for every token, 0 outside the mask; :func:`loss_sum` adds them up and :func:`loss_count` says by what
the caller divides. The count is that of the whole minibatch, and not of the part at hand: that is what makes the
gradient independent of how a minibatch is split into micro-batches.

What lies outside the mask, NaN included, changes no bit: the result leaves it out, and the input that carries a
gradient is replaced there on its way in, because the derivative of a NaN that was left out is 0 times NaN.

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


def ratio(log_ratio_BT: torch.Tensor) -> torch.Tensor:
    """Return e^x as (e^x − 1) + 1: within half a unit in the last place of 1 where x ≤ 0.

    ``torch.exp`` is MKL's, whose last bits differ from one kind of processor to another; ``torch.expm1`` is not.
    """
    return torch.expm1(log_ratio_BT) + 1.0


def loss_sum(losses_BT: torch.Tensor, mask_BT: torch.Tensor, loss_mean: str) -> torch.Tensor:
    """Return the numerator of a minibatch's loss; that of a minibatch is the sum of its micro-batches'.

    Args:
        losses_BT: [B, T] losses of tokens, 0 outside the mask.
        mask_BT: [B, T] True on response tokens.
        loss_mean: ``sequence`` takes each row's mean over its tokens, the others its sum.
    """
    if loss_mean == "sequence":
        return (losses_BT.sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1)).sum()
    return losses_BT.sum()


def loss_count(mask_BT: torch.Tensor, loss_mean: str, longest: int) -> int:
    """Return the denominator of a minibatch's loss.

    - ``token``: its tokens, so that every token weighs the same (Yu et al., "DAPO" (2025), eq. 8).
    - ``sequence``: its sequences (Shao et al., "DeepSeekMath" (2024), eq. 3): a token of a long response weighs less.
    - ``sum``: its sequences, each token weighing the same (Ahmadian et al., "Back to Basics" (2024), eq. 6).
    - ``constant``: its sequences times the longest response that there can be (Liu et al., "Understanding
      R1-Zero-Like Training" (2025), section 3.2).

    Args:
        mask_BT: [B, T] True on response tokens, of the whole minibatch.
        loss_mean: which of these.
        longest: the most tokens a response can have.

    Raises:
        ValueError: ``loss_mean`` is none of these.
    """
    match loss_mean:
        case "token":
            return int(mask_BT.sum())
        case "sequence" | "sum":
            return len(mask_BT)
        case "constant":
            return len(mask_BT) * longest
    raise ValueError(f"loss_mean is {loss_mean!r}; choose from token, sequence, sum, constant")


def clipped_policy_losses(
    log_ratio_BT: torch.Tensor, advantages_BT: torch.Tensor, mask_BT: torch.Tensor, *, clip_range: float
) -> torch.Tensor:
    """Return max(−ρ_t A_t, −clip(ρ_t, 1−ε, 1+ε) A_t): Schulman et al., "PPO" (2017), eq. 7, negated.

    At ρ = 1 its gradient is −A_t ∇ log π_t, REINFORCE's.

    Args:
        log_ratio_BT: [B, T] log ρ = log π_new − log π_old.
        advantages_BT: [B, T] A, a constant.
        mask_BT: [B, T] True on response tokens.
        clip_range: ε.

    Returns:
        [B, T] losses, 0 outside the mask.
    """
    ratio_BT = ratio(torch.where(mask_BT, log_ratio_BT, 0.0))
    clipped_BT = ratio_BT.clamp(1.0 - clip_range, 1.0 + clip_range)
    return torch.where(mask_BT, torch.maximum(-ratio_BT * advantages_BT, -clipped_BT * advantages_BT), 0.0)


def clipped_value_losses(
    values_BT: torch.Tensor,
    old_values_BT: torch.Tensor,
    returns_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    clip_range: float,
) -> torch.Tensor:
    """Return ½ max((V−R)², (V_old + clip(V−V_old, ±ε) − R)²).

    The value clipping of Huang et al., "The N Implementation Details of RLHF with PPO" (2023).

    Args:
        values_BT: [B, T] V.
        old_values_BT: [B, T] values when the rollout was scored, a constant.
        returns_BT: [B, T] R, a constant.
        mask_BT: [B, T] True on response tokens.
        clip_range: ε, in units of value.

    Returns:
        [B, T] losses, 0 outside the mask.
    """
    values_BT = torch.where(mask_BT, values_BT, 0.0)
    clipped_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip_range, clip_range)
    errors_BT = torch.maximum((values_BT - returns_BT).square(), (clipped_BT - returns_BT).square())
    return 0.5 * torch.where(mask_BT, errors_BT, 0.0)


def kl_k2(log_ratio_BT: torch.Tensor) -> torch.Tensor:
    """Return ½ x² for x = log p − log q: an estimate of KL(p‖q) under p, biased, and whose gradient is not.

    Schulman, "Approximating KL Divergence" (2020), k2. With p = π_θ its gradient is x ∇ log π_θ, and
    E_π[x ∇ log π] = ∇ KL(π‖q): of one token, the states before it held fixed.
    """
    return 0.5 * log_ratio_BT.square()


def kl_k3(log_ratio_BT: torch.Tensor) -> torch.Tensor:
    """Return e^{−x} − 1 + x for x = log p − log q: an unbiased estimate of KL(p‖q) under p that is never negative.

    Schulman, "Approximating KL Divergence" (2020), k3; ``expm1`` keeps its digits where x is small.

    Its gradient, with p = π_θ, is (1 − q/π) ∇ log π, whose expectation under π is ∇ KL(q‖π): the other direction.
    """
    return torch.expm1(-log_ratio_BT) + log_ratio_BT


def kl_k3_weighted(log_ratio_to_ref_BT: torch.Tensor, log_ratio_BT: torch.Tensor) -> torch.Tensor:
    """Return ρ k3, k3 weighted by the ratio to the policy that drew the token: unbiased in value and gradient.

    E_old[ρ k3] = E_π[k3] = KL(π‖π_ref) for every π, so its derivative is right too: ρ x ∇ log π, since
    k3 + ∂k3/∂x = x. At ρ = 1 that is k2's, sample by sample. DeepSeek-AI, "DeepSeek-V3.2" (2025), section 3.1.

    Args:
        log_ratio_to_ref_BT: [B, T] x = log π_θ − log π_ref.
        log_ratio_BT: [B, T] log ρ = log π_θ − log π_old.
    """
    return ratio(log_ratio_BT) * kl_k3(log_ratio_to_ref_BT)


def kl_losses(estimator: str, log_ratio_to_ref_BT: torch.Tensor, log_ratio_BT: torch.Tensor) -> torch.Tensor:
    """Return the KL penalty of each token for the loss.

    There is no k1: the gradient of x = log π − log π_ref is ∇ log π, whose expectation is zero, so as a loss it pulls
    nowhere and only adds noise. It belongs into the reward (:func:`rlhf_core.advantages.token_rewards`).

    Args:
        estimator: ``k2``, ``k3`` or ``k3-weighted``.
        log_ratio_to_ref_BT: [B, T] log π_θ − log π_ref, 0 outside the mask.
        log_ratio_BT: [B, T] log π_θ − log π_old, 0 outside the mask.

    Raises:
        ValueError: the estimator is none of these.
    """
    match estimator:
        case "k2":
            return kl_k2(log_ratio_to_ref_BT)
        case "k3":
            return kl_k3(log_ratio_to_ref_BT)
        case "k3-weighted":
            return kl_k3_weighted(log_ratio_to_ref_BT, log_ratio_BT)
    raise ValueError(f"KL estimator {estimator!r} has no place in the loss; take k2, k3 or k3-weighted")
