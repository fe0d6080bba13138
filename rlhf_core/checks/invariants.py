"""What must hold in every step whatever the model, the data and the reward: recomputed beside the trainer's own code.

Pure functions of NumPy arrays, in float64. Shape suffixes: B sequences, T response positions.
"""

import numpy as np


def target_error(
    *,
    rewards_B: np.ndarray,
    ended_B: np.ndarray,
    missing_eos_penalty: float,
    logprobs_BT: np.ndarray,
    ref_logprobs_BT: np.ndarray,
    values_BT: np.ndarray,
    mask_BT: np.ndarray,
    kl_coef: float,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
    whiten_advantages: bool,
    raw_advantages_BT: np.ndarray,
    advantages_BT: np.ndarray,
    returns_BT: np.ndarray,
) -> float:
    """Return how far the update's targets lie from their definition, relative to their largest size.

    r_t = −β (log π − log π_ref), and on the last response token the reward, less the penalty for a missing end;
    δ_t = r_t + γ V_{t+1} − V_t, A_t = δ_t + γλ A_{t+1} (Schulman et al., "GAE" (2016), eq. 16), R = A + V; A is
    whitened with the population variance.
    Whitened advantages are compared in the unit that they had before, so that a tiny variance magnifies no rounding.

    Args:
        rewards_B: the task's reward of each sequence.
        ended_B: whether it ended with EOS.
        missing_eos_penalty: what is taken from the reward of one that did not.
        logprobs_BT: log π of the sampled tokens.
        ref_logprobs_BT: the reference's.
        values_BT: V when the rollout was scored.
        mask_BT: True on response tokens.
        kl_coef: β.
        gamma: γ.
        lam: λ.
        whiten_rewards: rewards were scaled to variance 1 over the mask, about their mean.
        whiten_advantages: advantages were whitened.
        raw_advantages_BT: A before whitening, as the trainer has it.
        advantages_BT: A as the update takes it.
        returns_BT: R as the update takes it.
    """
    on = mask_BT.astype(bool)
    logprobs, reference, values = (np.where(on, x, 0.0) for x in (logprobs_BT, ref_logprobs_BT, values_BT))
    rewards = -kl_coef * (logprobs.astype(np.float64) - reference)
    last = on.shape[1] - 1 - np.argmax(on[:, ::-1], axis=1)
    rewards[np.arange(len(on)), last] += rewards_B - missing_eos_penalty * ~ended_B.astype(bool)
    if whiten_rewards:
        mean = rewards[on].mean()
        rewards = np.where(on, (rewards - mean) / np.sqrt(rewards[on].var() + 1e-8) + mean, 0.0)
    raw = _advantages(rewards, values.astype(np.float64), on, gamma, lam)
    scale = max(float(np.abs(raw[on]).max()), float(np.abs(values[on]).max()), 1e-12)
    mean, std = (raw[on].mean(), np.sqrt(raw[on].var() + 1e-8)) if whiten_advantages else (0.0, 1.0)
    deviations = (
        raw_advantages_BT[on] - raw[on],
        returns_BT[on] - (raw + values)[on],
        advantages_BT[on].astype(np.float64) * std + mean - raw[on],
    )
    return max(float(np.abs(deviation).max()) for deviation in deviations) / scale


def _advantages(rewards: np.ndarray, values: np.ndarray, on: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Return [B, T] generalised advantages; positions outside the mask are skipped."""
    out = np.zeros_like(rewards)
    next_value, next_advantage = np.zeros(len(on)), np.zeros(len(on))
    for t in reversed(range(on.shape[1])):
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        out[:, t] = np.where(on[:, t], advantage, 0.0)
        next_value = np.where(on[:, t], values[:, t], next_value)
        next_advantage = np.where(on[:, t], advantage, next_advantage)
    return out


def tokens_after_end(response_ids_BT: np.ndarray, mask_BT: np.ndarray, eos_id: int) -> int:
    """Return how many tokens count as response although they stand after their sequence's end."""
    ends = (response_ids_BT == eos_id) & mask_BT
    behind = np.cumsum(ends, axis=1) - ends > 0
    return int((behind & mask_BT).sum())
