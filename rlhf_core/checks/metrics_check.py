"""Whether a run's metrics are all there, possible, and agree with each other. Imports no torch.

What can be computed again from a kept rollout is in :mod:`rlhf_core.checks.metrics_again`.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_core import runlog
from rlhf_core.checks.step_log import brief, rows_by_step
from rlhf_core.config import TrainConfig, read_config_file
from rlhf_core.metrics import METRICS

POSSIBLE: dict[str, tuple[float | None, float | None]] = {
    "kl": (None, None),  # an estimate from samples can be negative
    "kl_k3": (0.0, None),
    "kl_target_error": (0.0, None),
    "kl_coef": (0.0, None),
    "entropy": (0.0, None),
    "reward_mean": (None, None),
    "reward_var": (0.0, None),
    "score_mean": (None, None),
    "policy_loss": (None, None),
    "value_loss": (0.0, None),
    "approx_kl": (0.0, None),
    "clip_frac": (0.0, 1.0),
    "ratio_max_dev_first": (0.0, None),
    "grad_norm": (0.0, None),
    "grad_norm_max": (0.0, None),
    "adv_var": (0.0, None),
    "explained_variance": (None, 1.0),
    "value_mean": (None, None),
    "return_mean": (None, None),
    "reward_zero_std_frac": (0.0, 1.0),
    "response_length_mean": (1.0, None),
    "response_tokens": (1.0, None),
    "eos_rate": (0.0, 1.0),
    "lr": (0.0, None),
    "rollout_logprob_diff_max": (0.0, None),
    "rollout_logprob_diff_p99": (0.0, None),
    "sampling_z": (None, None),
    "tokens_after_eos": (0.0, None),
    "reward_length_corr": (-1.0, 1.0),
    "target_error": (0.0, None),
    "first_gradient_error": (0.0, None),
    "value_gradient_share": (0.0, 1.0),
}
"""What a metric can be at all; None leaves a side open. What is healthy is narrower, and in the table."""
ROUNDING = 1e-8
"""The log keeps eight decimals."""

Rows = dict[int, dict[str, Any]]


class MetricsWrong(ValueError):
    """A metric is missing, impossible or contradicted; the message has the figures."""


def check_log(run: Path) -> Iterator[str]:
    """Check ``metrics.jsonl`` against its table, its configuration and ``timings.jsonl``; yield a line a check.

    Raises:
        MetricsWrong: a check does not hold.
        FileNotFoundError, ValueError: a file is missing or malformed.
    """
    config = read_config_file(run / runlog.CONFIG_FILE, TrainConfig())
    listed = list(runlog.read(run / runlog.METRICS_FILE))
    if not listed:
        raise MetricsWrong(f"{run / runlog.METRICS_FILE} has no rows; the run has done no step")
    steps = [row["step"] for row in listed]
    wanted = list(range(1, len(steps) + 1))
    for number, (step, expected) in enumerate(zip(steps, wanted, strict=True), start=1):
        _require(step == expected, f"metrics.jsonl: row {number} is of step {step}; it must be of step {expected}")
    rows = {row["step"]: row for row in listed}
    yield f"steps: 1 to {len(steps)}, each once"
    names = expected_names(config)
    for step, row in rows.items():
        _check_names(step, row, names)
    yield f"names: {len(names)} in each step, all of them finite"
    yield _check_ranges(rows, config, largest_entropy(run))
    yield _check_relations(rows, config)
    yield _check_tokens_per_second(run, rows)
    yield _check_samples(run, rows)


def expected_names(config: TrainConfig) -> set[str]:
    """Return the metrics that each step of a run with this configuration has."""
    recipe = config.ppo.recipe
    kinds = {"always"}
    kinds |= {"with values"} if recipe.has_value_model else set()
    kinds |= {"with groups"} if recipe.group_size > 1 else set()
    kinds |= {"with closed form"} if recipe.has_closed_form else set()
    return {metric.name for metric in METRICS if metric.logged in kinds}


def _check_names(step: int, row: dict[str, Any], names: set[str]) -> None:
    bad = row.get("nonfinite")
    _require(isinstance(bad, list), f"step {step}: nonfinite is {bad!r}; it must be a list of names")
    _require(bad == [], f"step {step}: not finite: {', '.join(map(str, bad or []))}")
    missing, more = sorted(names - row.keys()), sorted(row.keys() - names - {"step", "nonfinite"})
    _require(not missing, f"step {step}: {', '.join(missing)} missing")
    _require(not more, f"step {step}: {', '.join(more)} not in the table of metrics")
    for name in names:
        value = row[name]
        good = type(value) in (int, float) and math.isfinite(value)
        _require(good, f"step {step}: {name} is {value!r}; it must be a finite number")


def largest_entropy(run: Path) -> float | None:
    """Return ln V, the entropy of a uniform choice from the vocabulary; None where the run's model says no V."""
    path = run / "models" / "base" / "config.json"
    if not path.is_file():
        return None
    tree = json.loads(path.read_text(encoding="utf-8"))
    size = tree.get("vocab_size", tree.get("text_config", {}).get("vocab_size"))
    return math.log(size) if type(size) is int and size > 0 else None


def _check_ranges(rows: Rows, config: TrainConfig, ln_vocabulary: float | None) -> str:
    for step, row in rows.items():
        limits = dict(POSSIBLE)
        limits["entropy"] = (0.0, ln_vocabulary)
        limits["lr"] = (0.0, config.ppo.learning_rate)
        limits["response_length_mean"] = (1.0, config.sampling.max_new_tokens)
        limits["response_tokens"] = (config.ppo.batch_size, config.ppo.batch_size * config.sampling.max_new_tokens)
        for name, (low, high) in limits.items():
            if name not in row:
                continue
            value = row[name]
            _require(
                low is None or value >= low - ROUNDING, f"step {step}: {name} is {value}; it cannot be below {low}"
            )
            _require(
                high is None or value <= high + ROUNDING, f"step {step}: {name} is {value}; it cannot be above {high}"
            )
    return f"ranges: {len(rows)} steps, every metric within what is possible"


def _check_relations(rows: Rows, config: TrainConfig) -> str:
    """Compare the metrics that follow from others or from the configuration alone."""
    ppo = config.ppo
    compared = 0
    expected_coef = ppo.kl_coef
    for step, row in rows.items():
        rate = ppo.learning_rate * (1.0 - (step - 1) / ppo.steps if ppo.schedule == "linear" else 1.0)
        for name, expected, why in (
            ("kl_target_error", abs(row["kl"] - ppo.kl_target), "|kl - kl_target|"),
            ("lr", rate, "the schedule's rate"),
            ("response_length_mean", row["response_tokens"] / ppo.batch_size, "response_tokens over the batch size"),
            ("kl_coef", expected_coef, "what the KL of the steps before makes of it"),
        ):
            off = abs(row[name] - expected)
            _require(
                off <= 3 * ROUNDING + 1e-6 * abs(expected) * (name == "kl_coef"),
                f"step {step}: {name} is {row[name]}; {why} is {expected:.8f}",
            )
            compared += 1
        for small, large in (("grad_norm", "grad_norm_max"), ("rollout_logprob_diff_p99", "rollout_logprob_diff_max")):
            _require(
                row[small] <= row[large] + ROUNDING, f"step {step}: {small} {row[small]} is above {large} {row[large]}"
            )
        if ppo.kl_control == "adaptive":
            error = min(max(row["kl"] / ppo.kl_target - 1.0, -0.2), 0.2)
            expected_coef *= 1.0 + error * ppo.batch_size / ppo.kl_horizon
    return f"relations: {compared} metrics follow from others or from the configuration"


def _check_tokens_per_second(run: Path, rows: Rows) -> str:
    timings = rows_by_step(run / runlog.TIMINGS_FILE)
    missing = sorted(rows.keys() ^ timings.keys())
    _require(not missing, f"metrics.jsonl and timings.jsonl differ in the steps {missing[:5]}")
    slowest, fastest = math.inf, 0.0
    for step, row in rows.items():
        rate, seconds = (_positive(timings[step], name) for name in ("tokens_per_second", "step_time_s"))
        measured = row["response_tokens"] / seconds
        _require(
            math.isclose(rate, measured, rel_tol=1e-6),
            f"timings.jsonl: step {step}: tokens_per_second is {rate}; {row['response_tokens']} tokens in "
            f"{seconds} s are {measured}",
        )
        slowest, fastest = min(slowest, rate), max(fastest, rate)
    return f"tokens_per_second: {slowest:.0f} to {fastest:.0f}, the logged tokens over the measured time"


def _positive(row: dict[str, Any], name: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise MetricsWrong(f"timings.jsonl: step {row['step']}: {name} is {value!r}; it must be a number above 0")
    return float(value)


def _check_samples(run: Path, rows: Rows) -> str:
    """Compare each sample's KL with the log-probs of its tokens."""
    if not (run / runlog.SAMPLES_FILE).is_file():
        return "samples: none are kept"
    count, largest = 0, 0.0
    for sample in runlog.read_samples(run):
        where = f"samples.jsonl: step {sample['step']} sample {sample['sample']}"
        _require(sample["step"] in rows, f"{where}: metrics.jsonl has no such step")
        parts = [sample.get(name) for name in ("logprobs", "ref_logprobs", "token_ids")]
        if any(not isinstance(part, list) for part in parts):
            raise MetricsWrong(f"{where}: token_ids, logprobs and ref_logprobs must be lists")
        logprobs, ref_logprobs, token_ids = (part for part in parts if part is not None)
        _require(
            len(logprobs) == len(ref_logprobs) == len(token_ids),
            f"{where}: {len(token_ids)} tokens, {len(logprobs)} log-probs, {len(ref_logprobs)} of the reference",
        )
        kl = math.fsum(logprobs) - math.fsum(ref_logprobs)
        off = abs(kl - sample["kl"])
        _require(off <= 1e-5, f"{where}: kl is {sample['kl']}; its tokens' log-probs give {kl:.8f}")
        count, largest = count + 1, max(largest, off)
    return f"samples: {count}, the KL of each within {largest:.1e} of its tokens' log-probs"


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise MetricsWrong(message)
