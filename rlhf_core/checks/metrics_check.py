"""Whether a run's metrics are all there, possible, and agree with each other. Imports no torch.

What can be computed again from a kept rollout is in :mod:`rlhf_core.checks.metrics_again`.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from rlhf_core import run_folder, runlog
from rlhf_core.checks.step_log import brief, rows_by_step
from rlhf_core.config import TrainConfig
from rlhf_core.config_files import read_config_file
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
FLOAT32 = 1e-5
"""How far a log-prob of a likely token may lie above 0 by rounding."""

Rows = dict[int, dict[str, Any]]


class MetricsWrong(ValueError):
    """A metric is missing, impossible or contradicted; the message has the figures."""


def check_log(run: Path) -> Iterator[str]:
    """Check ``metrics.jsonl`` against its table, its configuration and ``timings.jsonl``; yield a line a check.

    Raises:
        MetricsWrong: a check does not hold.
        FileNotFoundError, ValueError: a file is missing or malformed.
    """
    config = read_config_file(run / run_folder.CONFIG_FILE, TrainConfig())
    steps = [row["step"] for row in runlog.read(run / runlog.METRICS_FILE)]
    if not steps:
        raise MetricsWrong(f"{run / runlog.METRICS_FILE} has no rows; the run has done no step")
    wanted = list(range(1, len(steps) + 1))
    for number, (step, expected) in enumerate(zip(steps, wanted, strict=True), start=1):
        where = f"metrics.jsonl: row {number} is of step {brief(step)}"
        _require(step == expected, f"{where}; it must be of step {expected}")
    rows = rows_by_step(run / runlog.METRICS_FILE)
    yield f"steps: 1 to {len(steps)}, each once"
    names = expected_names(config)
    for step, row in rows.items():
        _check_names(step, row, names)
    yield f"names: {len(names)} in each step, all of them finite"
    yield _check_ranges(rows, config, largest_entropy(run))
    yield _check_relations(rows, config)
    yield _check_tokens_per_second(run, rows)
    yield _check_samples(run, rows, min(config.log.samples_per_step, config.ppo.batch_size))


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
    _require(isinstance(bad, list), f"step {step}: nonfinite is {brief(bad)}; it must be a list of names")
    _require(bad == [], f"step {step}: not finite: {', '.join(map(str, bad or []))}")
    missing, more = sorted(names - row.keys()), sorted(row.keys() - names - {"step", "nonfinite"})
    _require(not missing, f"step {step}: {', '.join(missing)} missing")
    _require(not more, f"step {step}: {', '.join(more)} not in the table of metrics")
    for name in sorted(names):
        value = row[name]
        _require(is_number(value), f"step {step}: {name} is {brief(value)}; it must be a finite number")


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
            (
                "score_mean",
                row["reward_mean"] - ppo.missing_eos_penalty * (1.0 - row["eos_rate"]),
                "reward_mean less the penalty of those without an end",
            ),
            ("lr", rate, "the schedule's rate"),
            ("response_length_mean", row["response_tokens"] / ppo.batch_size, "response_tokens over the batch size"),
            ("kl_coef", expected_coef, "what the KL of the steps before makes of it"),
        ):
            off = abs(row[name] - expected)
            _require(
                off <= 3 * ROUNDING + 1e-6 * abs(expected) * (name in ("kl_coef", "score_mean")),
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
    if not is_number(value) or value <= 0:
        raise MetricsWrong(f"timings.jsonl: step {row['step']}: {name} is {brief(value)}; it must be a number above 0")
    return float(value)


def _check_samples(run: Path, rows: Rows, wanted: int) -> str:
    """Compare which samples there are with the configuration, and each one's KL with the log-probs of its tokens."""
    if not (run / runlog.SAMPLES_FILE).is_file():
        _require(wanted == 0, f"no samples.jsonl; {wanted} samples of each step belong in it")
        return "samples: none are kept"
    count, largest = 0, 0.0
    places = [(step, sample) for step in rows for sample in range(wanted)]
    for sample in runlog.read_samples(run):
        where = f"samples.jsonl: step {brief(sample['step'])} sample {brief(sample['sample'])}"
        _require(count < len(places), f"{where}: is in row {count + 1}; {wanted} of {len(rows)} steps belong there")
        place = "step {} sample {}".format(*places[count])
        _require(
            (sample["step"], sample["sample"]) == places[count],
            f"{where}: is in row {count + 1}, where {place} belongs",
        )
        _require(is_number(sample["reward"]), f"{where}: reward is {sample['reward']}; it must be finite")
        logprobs, ref_logprobs = (_log_probs(sample, name, where) for name in ("logprobs", "ref_logprobs"))
        tokens = sample.get("token_ids")
        if not isinstance(tokens, list) or not len(logprobs) == len(ref_logprobs) == len(tokens):
            lengths = f"{len(logprobs)} log-probs, {len(ref_logprobs)} of the reference"
            raise MetricsWrong(f"{where}: token_ids is {brief(tokens)}; it must be a list, as long as {lengths}")
        kl = math.fsum(logprobs) - math.fsum(ref_logprobs)
        off = abs(kl - sample["kl"])
        _require(off <= 1e-5, f"{where}: kl is {sample['kl']}; its tokens' log-probs give {kl:.8f}")
        count, largest = count + 1, max(largest, off)
    _require(count == len(places), f"samples.jsonl: {count} rows; {wanted} of {len(rows)} steps belong there")
    return f"samples: {count}, the KL of each within {largest:.1e} of its tokens' log-probs"


def _log_probs(sample: dict[str, Any], name: str, where: str) -> list[float]:
    found = sample.get(name)
    if not isinstance(found, list) or not all(is_number(value) and value <= FLOAT32 for value in found):
        raise MetricsWrong(f"{where}: {name} is {brief(found)}; it must be a list of numbers, none above 0")
    return found


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a finite number; one that no float holds is none."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise MetricsWrong(message)
