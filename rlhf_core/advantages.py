"""From scores, log-probs and values to per-token rewards and advantages: pure functions of tensors.

Shape suffixes: B sequences, T response positions.
"""

import torch


def last_token_index(mask_BT: torch.Tensor) -> torch.Tensor:
    """Return [B] the position of each row's last True; rows without one give 0."""
    positions = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return torch.where(mask_BT, positions, 0).amax(dim=1)


def token_rewards(
    scores_B: torch.Tensor,
    logprobs_BT: torch.Tensor,
    ref_logprobs_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    kl_coef: float,
) -> torch.Tensor:
    """Return r_t = −β (log π(a_t|s_t) − log π_ref(a_t|s_t)), with the score added on the last response token.

    Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019), eq. 2, taken token by token.

    Args:
        scores_B: [B] the task's reward of each sequence.
        logprobs_BT: [B, T] log π of the sampled tokens.
        ref_logprobs_BT: [B, T] log π_ref of the same.
        mask_BT: [B, T] True on response tokens; a row without one keeps no reward.
        kl_coef: β.

    Returns:
        [B, T] rewards, 0 outside the mask.
    """
    penalty_BT = torch.where(mask_BT, -kl_coef * (logprobs_BT - ref_logprobs_BT), 0.0)
    positions = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    is_last_BT = mask_BT & (positions == last_token_index(mask_BT)[:, None])
    return torch.where(is_last_BT, penalty_BT + scores_B[:, None], penalty_BT)


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
