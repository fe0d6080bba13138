"""From scores, log-probs and values to per-token rewards and advantages: pure functions of tensors.

Shape suffixes: B sequences, T response positions.
"""

import math

import torch

STANDARD_SCORE_EPSILON = 1e-6


def last_token_index(mask_BT: torch.Tensor) -> torch.Tensor:
    """Return [B] the position of each row's last True; rows without one give 0."""
    positions = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return torch.where(mask_BT, positions, 0).amax(dim=1)


def kl_penalties(logprobs_BT: torch.Tensor, ref_logprobs_BT: torch.Tensor, estimator: str = "k1") -> torch.Tensor:
    """Return the KL penalty of each token for the reward, a constant of the update.

    With x = log π − log π_ref: k1 is x, k2 is ½ x², k3 is e^{−x} − 1 + x (Schulman, "Approximating KL Divergence",
    2020). A reward's gradient is E[k ∇ log π], not E[∇k]: for k1 it is ∇ KL(π‖π_ref), exactly; for k3 it is
    ∇ KL(π‖π_ref) − ∇ KL(π_ref‖π), and for k2 no KL's. Near the reference, where the two directions of the KL agree,
    k2 and k3 hardly pull at all: take k1.

    Args:
        logprobs_BT: [B, T] log π of the sampled tokens.
        ref_logprobs_BT: [B, T] log π_ref of the same.
        estimator: ``k1``, ``k2`` or ``k3``.

    Raises:
        ValueError: the estimator is none of these.
    """
    x_BT = logprobs_BT - ref_logprobs_BT
    match estimator:
        case "k1":
            return x_BT
        case "k2":
            return 0.5 * x_BT.square()
        case "k3":
            return torch.expm1(-x_BT) + x_BT
    raise ValueError(f"KL estimator {estimator!r} has no place in the reward; take k1, k2 or k3")


def token_rewards(
    scores_B: torch.Tensor,
    logprobs_BT: torch.Tensor,
    ref_logprobs_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
) -> torch.Tensor:
    """Return r_t = −β kl_t, with the score added on the last response token; kl_t = log π − log π_ref under ``k1``.

    Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019), eq. 2, taken token by token.

    Args:
        scores_B: [B] the task's reward of each sequence.
        logprobs_BT: [B, T] log π of the sampled tokens.
        ref_logprobs_BT: [B, T] log π_ref of the same.
        mask_BT: [B, T] True on response tokens; a row without one keeps no reward.
        kl_coef: β; 0 where the penalty is part of the loss.
        estimator: of :func:`kl_penalties`.

    Returns:
        [B, T] rewards, 0 outside the mask.
    """
    penalty_BT = torch.where(mask_BT, -kl_coef * kl_penalties(logprobs_BT, ref_logprobs_BT, estimator), 0.0)
    positions = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    is_last_BT = mask_BT & (positions == last_token_index(mask_BT)[:, None])
    return torch.where(is_last_BT, penalty_BT + scores_B[:, None], penalty_BT)


def sequence_returns(rewards_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Return [B] float64 R = Σ_t r_t over the mask: the whole response as one action."""
    return torch.where(mask_BT, rewards_BT, 0.0).double().sum(dim=1)


def group_mean_advantages(returns_B: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return R_i − mean(R of its group): Liu et al., "Understanding R1-Zero-Like Training" (2025), Dr. GRPO.

    The mean holds R_i itself, so the expected gradient is (k − 1)/k of the policy gradient, in its very direction.

    Args:
        returns_B: [B] R, the completions of a prompt side by side.
        group_size: k, completions a prompt; divides B.
    """
    groups_GK = returns_B.reshape(-1, group_size)
    return (groups_GK - groups_GK.mean(dim=1, keepdim=True)).flatten()


def leave_one_out_advantages(returns_B: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return R_i − mean(R_j, j ≠ i, of its group): Ahmadian et al., "Back to Basics" (2024), eq. 8, RLOO.

    The baseline does not depend on sample i, so the expected gradient is the policy gradient (Kool et al., 2019).

    Args:
        returns_B: [B] R, the completions of a prompt side by side.
        group_size: k ≥ 2, completions a prompt; divides B.
    """
    return group_mean_advantages(returns_B, group_size) * (group_size / (group_size - 1))


def group_standard_scores(returns_B: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return (R_i − mean) / (std + 1e-6) within its group: Shao et al., "DeepSeekMath" (2024), section 4.1.2, GRPO.

    The deviation is the sample's, Σ (R − mean)² / (k − 1). Dividing by it weighs a prompt by one over the spread of its
    rewards, which is a bias: prompts whose completions nearly agree count most. A group that agrees wholly gives 0.

    Args:
        returns_B: [B] R, the completions of a prompt side by side.
        group_size: k ≥ 2, completions a prompt; divides B.
    """
    deviations_GK = group_mean_advantages(returns_B, group_size).reshape(-1, group_size)
    variances_G = deviations_GK.square().sum(dim=1) / (group_size - 1)
    # Python's square root: torch's is not correctly rounded and differs by processor.
    scales = [math.sqrt(variance) + STANDARD_SCORE_EPSILON for variance in variances_G.tolist()]
    return (deviations_GK / deviations_GK.new_tensor(scales)[:, None]).flatten()


def penalize_missing_eos(scores_B: torch.Tensor, ended_B: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return the scores, less ``penalty`` where a response did not end with the end-of-sequence token."""
    return torch.where(ended_B, scores_B, scores_B - penalty)


def adapt_kl_coef(kl_coef: float, kl: float, *, target: float, n: int, horizon: int) -> float:
    """Return β (1 + clip(kl/target − 1, ±0.2) · n/horizon): Ziegler et al. (2019), section 2.2.

    Args:
        kl_coef: β.
        kl: the KL per sequence that was measured, in nats.
        target: the KL per sequence to steer to.
        n: sequences in this step.
        horizon: sequences over which the controller reacts.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * n / horizon)
