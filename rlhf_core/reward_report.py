"""How good a reward model is on pairs it has not seen: accuracy, calibration, and whether it likes length.

This module does not import torch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

from rlhf_core.metrics import rounded

BINS = 10


@dataclass(frozen=True)
class JudgedPairs:
    """A reward model's verdicts, [N] each."""

    chosen: np.ndarray
    """Rewards of the chosen completions."""
    rejected: np.ndarray
    tie: np.ndarray
    """1 where neither is better."""
    chosen_length: np.ndarray
    """Tokens."""
    rejected_length: np.ndarray


def pair_report(pairs: JudgedPairs) -> dict[str, Any]:
    """Return the report; ties count in ``mean_tie_gap`` alone, and figures without a pair to stand on are None.

    - ``accuracy``: share of pairs with d = r_c − r_r > 0; d = 0 counts half.
    - ``log_loss``: mean −log σ(d), nats; ln 2 for a model that knows nothing.
    - ``ece``: expected calibration error Σ_b n_b/N |accuracy_b − confidence_b| over ten bins of equal width of the
      confidence σ(|d|) in [½, 1] (Guo et al., 2017, eq. 3), and ``reliability``, the bins.
    - ``length``: Pearson's and Spearman's correlation of reward and length over all completions, and the accuracy where
      the chosen one is longer, shorter, and equally long.
    """
    decided = pairs.tie == 0
    d = (pairs.chosen - pairs.rejected)[decided]
    right = np.where(d > 0, 1.0, np.where(d == 0, 0.5, 0.0))
    confidence = 1 / (1 + np.exp(-np.abs(d)))
    longer = (pairs.chosen_length - pairs.rejected_length)[decided]
    rewards = np.concatenate([pairs.chosen, pairs.rejected])
    lengths = np.concatenate([pairs.chosen_length, pairs.rejected_length])
    ties = np.abs(pairs.chosen - pairs.rejected)[~decided]
    return {
        "pairs": int(decided.sum()),
        "ties": int((~decided).sum()),
        "accuracy": _mean(right),
        "log_loss": _mean(np.logaddexp(0.0, -d)),
        "reward_mean": _mean(rewards),
        "reward_std": rounded(rewards.std()) if len(rewards) else None,
        "mean_gap": _mean(d),
        "mean_tie_gap": _mean(ties),
        "ece": _calibration_error(confidence, right),
        "reliability": reliability(confidence, right),
        "length": {
            "pearson": _correlation(scipy.stats.pearsonr, rewards, lengths),
            "spearman": _correlation(scipy.stats.spearmanr, rewards, lengths),
            "chosen_longer": _share(right, longer > 0),
            "chosen_shorter": _share(right, longer < 0),
            "equally_long": _share(right, longer == 0),
        },
    }


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    """Return the bins of confidence that hold a pair: bounds, pairs, mean confidence and accuracy."""
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    return [
        {
            "from": rounded(0.5 + one / (2 * BINS)),
            "to": rounded(0.5 + (one + 1) / (2 * BINS)),
            "pairs": int((place == one).sum()),
            "confidence": _mean(confidence[place == one]),
            "accuracy": _mean(right[place == one]),
        }
        for one in range(BINS)
        if (place == one).any()
    ]


def _calibration_error(confidence: np.ndarray, right: np.ndarray) -> float | None:
    if not len(right):
        return None
    bins = reliability(confidence, right)
    return rounded(sum(one["pairs"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / len(right))


def _mean(values: np.ndarray) -> float | None:
    return rounded(values.mean()) if len(values) else None


def _share(right: np.ndarray, among: np.ndarray) -> dict[str, Any]:
    return {"pairs": int(among.sum()), "accuracy": _mean(right[among])}


def _correlation(measure: Any, a: np.ndarray, b: np.ndarray) -> float | None:
    """Return a correlation, or None where one of the two does not vary."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return rounded(measure(a, b).statistic)
