"""The metrics: one table of name, unit, definition and healthy range, and the functions that compute them.

This module does not import torch: what shows a run need not load what trains one.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Metric:
    """One logged quantity."""

    name: str
    unit: str
    definition: str
    healthy: tuple[float | None, float | None] = (None, None)
    """Where a run that learns usually lies; None leaves a side open."""
    logged: Literal["always", "with values", "with groups", "with closed form"] = "always"
    """In every run, with a value model, with several completions a prompt, or where PPO's own loss is minimised."""


EXACT: Literal["with closed form"] = "with closed form"
METRICS = (
    Metric("kl", "nats", "mean over sequences of Σ_t (log π − log π_ref) on response tokens", (0.0, 30.0)),
    Metric("kl_k3", "nats", "mean over response tokens of e^{−x} − 1 + x, x = log π − log π_ref", (0.0, 2.0)),
    Metric("kl_target_error", "nats", "|kl − kl_target|"),
    Metric("kl_coef", "1", "weight of the KL penalty in this step", (0.0, None)),
    Metric("entropy", "nats", "mean over response tokens of the entropy over the whole vocabulary", (0.1, None)),
    Metric("reward_mean", "reward", "mean over sequences of the task's reward, before any penalty"),
    Metric("reward_var", "reward²", "unbiased variance over sequences of the task's reward", (1e-6, None)),
    Metric("score_mean", "reward", "mean over sequences of the reward after the missing-EOS penalty"),
    Metric(
        "policy_loss", "1",
        "clipped surrogate, and the KL penalty if it is in the loss, mean over the minibatches of all epochs; with "
        "loss_mean token each is weighted by its tokens, else all are equal",
    ),
    Metric(
        "value_loss", "reward²", "half the clipped squared error, averaged likewise", (0.0, None), logged="with values"
    ),
    Metric("approx_kl", "nats", "k3 of updated policy against the rollout's, mean over tokens and epochs", (0.0, 0.1)),
    Metric("clip_frac", "1", "share of response tokens whose ratio left [1−ε, 1+ε], over the epochs", (0.0, 0.4)),
    Metric("ratio_max_dev_first", "1", "max |ratio − 1| in the first minibatch of the first epoch", (0.0, 0.0)),
    Metric("grad_norm", "1", "total gradient norm before clipping, mean over optimizer steps", (0.0, None)),
    Metric("grad_norm_max", "1", "total gradient norm before clipping, maximum over optimizer steps", (0.0, None)),
    Metric("adv_var", "reward²", "variance of the advantages over response tokens, before whitening", (1e-8, None)),
    Metric(
        "explained_variance", "1", "1 − var(returns − values) / var(returns) over response tokens", (None, 1.0),
        logged="with values",
    ),
    Metric(
        "value_mean", "reward", "mean over response tokens of the values when the rollout was scored",
        logged="with values",
    ),
    Metric("return_mean", "reward", "mean over response tokens of advantage + value", logged="with values"),
    Metric(
        "reward_zero_std_frac", "1", "share of prompts whose completions all score the same: nothing is learnt there",
        (0.0, 0.9), logged="with groups",
    ),
    Metric("response_length_mean", "tokens", "mean over sequences of response tokens, EOS included", (1.0, None)),
    Metric("response_tokens", "tokens", "response tokens of the step"),
    Metric("eos_rate", "1", "share of sequences that ended with EOS", (0.1, 1.0)),
    Metric("lr", "1", "the optimizer's rate in this step", (0.0, None)),
    Metric("rollout_logprob_diff_max", "nats", "largest |sampler − trainer| log-prob of a response token", (0.0, 1e-3)),
    Metric("rollout_logprob_diff_p99", "nats", "99th percentile of |sampler − trainer| log-prob", (0.0, 1e-3)),
    Metric("sampling_z", "1", "Σ x / √Σ x² over response tokens, x = −log π − entropy", (-4.0, 4.0)),
    Metric("tokens_after_eos", "tokens", "tokens that count as response after their sequence's end", (0.0, 0.0)),
    Metric("reward_length_corr", "1", "correlation of reward and response tokens over sequences", (-0.9, 0.9)),
    Metric("target_error", "1", "largest relative deviation of targets from float64", (0.0, 1e-4), EXACT),
    Metric("first_gradient_error", "1", "same of the first gradient from its closed form", (0.0, 1e-4), EXACT),
    Metric("value_gradient_share", "1", "share of the value loss in that gradient, squared", (0.0, 0.99), EXACT),
)  # fmt: skip

BY_NAME = {metric.name: metric for metric in METRICS}

TIMINGS = (
    Metric("step_time_s", "s", "wall time of the step"),
    Metric("tokens_per_second", "tokens/s", "completion tokens of the step over its wall time"),
    Metric("peak_mem_bytes", "bytes", "largest resident memory of the process, or allocated on the GPU, so far"),
)


SFT_METRICS = (
    Metric("loss", "nats", "mean negative log-likelihood of the tokens that are learned", (0.0, None)),
    Metric("grad_norm", "1", "total gradient norm before clipping", (0.0, None)),
    Metric("lr", "1", "the optimizer's rate in this step", (0.0, None)),
    Metric("units", "tokens", "tokens of the step that are learned: those of completions, EOS included"),
    Metric("token_accuracy", "1", "share of them that are the model's likeliest", (0.0, 1.0)),
)
"""What a row of ``rlhf sft`` has."""

REWARD_METRICS = (
    Metric("loss", "nats", "mean over pairs of −log σ(r_c − r_r − margin), and the centring term", (0.0, None)),
    Metric("grad_norm", "1", "total gradient norm before clipping", (0.0, None)),
    Metric("lr", "1", "the optimizer's rate in this step", (0.0, None)),
    Metric("units", "pairs", "pairs of the step"),
    Metric("accuracy", "1", "share of pairs whose chosen one has the higher reward; equal ones count half", (0.5, 1.0)),
    Metric("gap_mean", "reward", "mean of r_c − r_r"),
    Metric("reward_mean", "reward", "mean reward of both completions"),
)
"""What a row of ``rlhf reward`` has."""


DPO_METRICS = (
    Metric("loss", "1", "mean over pairs of the preference loss", (0.0, None)),
    Metric("grad_norm", "1", "total gradient norm before clipping", (0.0, None)),
    Metric("lr", "1", "the optimizer's rate in this step", (0.0, None)),
    Metric("units", "pairs", "pairs of the step"),
    Metric("accuracy", "1", "share of pairs with reward_margin above 0; 0 itself counts half", (0.5, 1.0)),
    Metric("reward_chosen", "nats", "mean over pairs of β log π/π_ref of the chosen completion"),
    Metric("reward_rejected", "nats", "mean over pairs of β log π/π_ref of the rejected one"),
    Metric("reward_margin", "nats", "reward_chosen − reward_rejected", (0.0, None)),
    Metric("logprob_chosen", "nats", "mean over pairs of log π of the chosen completion", (None, 0.0)),
    Metric("logprob_rejected", "nats", "mean over pairs of log π of the rejected one", (None, 0.0)),
)
"""What a row of ``rlhf dpo`` has."""

EVAL_METRICS = (
    Metric("completions", "1", "completions of the batch"),
    Metric("reward_mean", "reward", "mean over completions of the weighted sum of rewards"),
    Metric("kl", "nats", "mean over completions of Σ_t (log π − log π_ref); 0 without a reference", (0.0, 30.0)),
    Metric("entropy", "nats", "mean over response tokens of the entropy over the whole vocabulary", (0.1, None)),
    Metric("response_length_mean", "tokens", "mean over completions of response tokens, EOS included", (1.0, None)),
    Metric("eos_rate", "1", "share of completions that ended with EOS", (0.1, 1.0)),
)
"""What a row of ``rlhf eval`` has; a step is a batch."""


def stage_row(step: int, values: dict[str, float], table: tuple[Metric, ...]) -> dict[str, Any]:
    """Return a row of a stage's metrics.jsonl, as :func:`log_row` does for PPO's.

    Raises:
        KeyError: a value is missing from the table, or the table names one that is not given.
    """
    names = {metric.name for metric in table}
    if values.keys() != names:
        raise KeyError(f"metrics and their table differ in {sorted(values.keys() ^ names)}")
    nonfinite = sorted(name for name, value in values.items() if not math.isfinite(value))
    row: dict[str, Any] = {name: None if name in nonfinite else rounded(value) for name, value in values.items()}
    return row | {"step": step, "nonfinite": nonfinite}


def rollout_metrics(
    *,
    rewards: np.ndarray,
    scores: np.ndarray,
    ended: np.ndarray,
    mask: np.ndarray,
    logprobs: np.ndarray,
    ref_logprobs: np.ndarray,
    sampler_logprobs: np.ndarray,
    entropies: np.ndarray,
    values: np.ndarray | None,
    advantages: np.ndarray,
    returns: np.ndarray | None,
    kl_coef: float,
    kl_target: float,
    group_size: int = 1,
) -> dict[str, float]:
    """Return the metrics that a rollout determines, in float64, from response tokens only.

    Args:
        rewards: [B] the task's reward.
        scores: [B] the same after the missing-EOS penalty.
        ended: [B] bool, whether the response ended with EOS.
        mask: [B, T] bool, True on response tokens.
        logprobs: [B, T] the trainer's log π of the sampled tokens.
        ref_logprobs: [B, T] the reference's.
        sampler_logprobs: [B, T] what the sampler said they were.
        entropies: [B, T] the policy's entropy at each position.
        values: [B, T] values when the rollout was scored; None without a value model, which leaves their metrics out.
        advantages: [B, T] before whitening.
        returns: [B, T] advantages + values; None without a value model.
        kl_coef: weight of the KL penalty in this step.
        kl_target: what the adaptive coefficient steers to.
        group_size: completions a prompt, which stand side by side.
    """
    on = mask.astype(bool)
    ratio = logprobs[on].astype(np.float64) - ref_logprobs[on].astype(np.float64)
    kl = float(ratio.sum() / len(rewards))
    sampler_diff = np.abs(sampler_logprobs[on].astype(np.float64) - logprobs[on].astype(np.float64))
    surprise = -logprobs[on].astype(np.float64) - entropies[on]
    surprise_norm = float(np.sqrt((surprise**2).sum()))
    found = {
        "kl": kl,
        "kl_k3": float((np.expm1(-ratio) + ratio).mean()),
        "kl_target_error": abs(kl - kl_target),
        "kl_coef": kl_coef,
        "entropy": float(entropies[on].astype(np.float64).mean()),
        "reward_mean": float(rewards.astype(np.float64).mean()),
        "reward_var": float(rewards.astype(np.float64).var(ddof=1)) if len(rewards) > 1 else 0.0,
        "score_mean": float(scores.astype(np.float64).mean()),
        "adv_var": float(advantages[on].astype(np.float64).var()),
        "response_length_mean": float(on.sum() / len(rewards)),
        "response_tokens": int(on.sum()),
        "eos_rate": float(ended.astype(np.float64).mean()),
        "rollout_logprob_diff_max": float(sampler_diff.max()),
        "rollout_logprob_diff_p99": float(np.percentile(sampler_diff, 99)),
        "sampling_z": float(surprise.sum()) / surprise_norm if surprise_norm > 0 else 0.0,
        "reward_length_corr": correlation(rewards.astype(np.float64), on.sum(axis=1).astype(np.float64)),
    }
    if values is not None and returns is not None:
        found |= value_metrics(values[on].astype(np.float64), returns[on].astype(np.float64))
    if group_size > 1:
        found["reward_zero_std_frac"] = float((np.ptp(scores.reshape(-1, group_size), axis=1) == 0).mean())
    return found


def value_metrics(values: np.ndarray, returns: np.ndarray) -> dict[str, float]:
    """Return what values and returns [N] of the response tokens say of the value model."""
    return_var = float(returns.var())
    return {
        # A step whose returns are all equal has nothing to explain: 0, as for a value model that knows nothing.
        "explained_variance": 1.0 - float((returns - values).var()) / return_var if return_var > 0 else 0.0,
        "value_mean": float(values.mean()),
        "return_mean": float(returns.mean()),
    }


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Pearson's correlation of [N] and [N]; 0 where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    return float((x * y).sum()) / norm if norm > 1e-12 else 0.0


def log_row(step: int, values: dict[str, float]) -> dict[str, Any]:
    """Return a row of metrics.jsonl: floats rounded to 8 decimals, NaN and Inf as null and named in ``nonfinite``.

    Raises:
        KeyError: a value is missing from the table of metrics, or the table names one that is not given; of those that
            only some runs log, either all or none are given.
    """
    kinds = {"always"} | {BY_NAME[name].logged for name in values if name in BY_NAME}
    expected = {metric.name for metric in METRICS if metric.logged in kinds}
    if values.keys() != expected:
        raise KeyError(f"metrics and their table differ in {sorted(values.keys() ^ expected)}")
    nonfinite = sorted(name for name, value in values.items() if not math.isfinite(value))
    row: dict[str, Any] = {name: None if name in nonfinite else rounded(value) for name, value in values.items()}
    return row | {"step": step, "nonfinite": nonfinite}


def rounded(value: float) -> float:
    """Return the value at the log's precision: 8 decimals, and 0.0 rather than -0.0."""
    return value if isinstance(value, int) else round(float(value), 8) + 0.0


def markdown_table() -> str:
    """Return the table of metrics for the documentation."""
    lines = ["| name | unit | definition |", "|---|---|---|"]
    lines += [f"| `{metric.name}` | {metric.unit} | {documented(metric)} |" for metric in (*METRICS, *TIMINGS)]
    return "\n".join(lines)


def documented(metric: Metric) -> str:
    """Return a metric's definition as a cell of a table, and where it is logged if that is not everywhere."""
    where = {
        "always": "",
        "with values": " (only with a value model)",
        "with groups": " (only with ppo.group_size > 1)",
        "with closed form": " (only PPO, KL in the reward)",
    }
    return metric.definition.replace("|", r"\|") + where[metric.logged]
