"""What a report says of a run: alerts, curves, time, operators, memory, completions. Imports no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_core import runlog
from rlhf_core.alerting import readers
from rlhf_core.alerting.thresholds import default_thresholds
from rlhf_core.alerts import Alert, Monitor, worst_first
from rlhf_core.config import TrainConfig, read_config_file
from rlhf_core.metrics import METRICS, TIMINGS, Metric
from rlhf_core.profiles.files import (
    OPERATOR_COLUMNS,
    OPERATORS_FILE,
    PROFILES_FOLDER,
    SUMMARY_COLUMNS,
    SUMMARY_FILE,
    ProfileError,
    read_table,
)

QUESTIONS: dict[str, tuple[str, ...]] = {
    "Is it learning?": (
        "reward_mean", "reward_var", "score_mean", "explained_variance", "value_loss", "return_mean",
        "response_length_mean", "eos_rate",
    ),
    "Is it stable?": (
        "entropy", "grad_norm", "grad_norm_max", "clip_frac", "ratio_max_dev_first", "policy_loss", "adv_var", "lr",
    ),
    "Is the policy still close?": (
        "kl", "kl_k3", "kl_coef", "approx_kl", "rollout_logprob_diff_max", "sampling_z", "first_gradient_error",
        "target_error",
    ),
    "Is it fast?": ("tokens_per_second", "step_time_s", "peak_mem_bytes", "response_tokens"),
}  # fmt: skip
TOP_OPERATORS = 15
SAMPLES = 8
MIB = 2**20


@dataclass(frozen=True)
class Content:
    """Everything that the page shows."""

    name: str
    steps: int
    alerts: list[Alert]
    columns: dict[str, np.ndarray]
    summary: dict[str, dict[str, float]]
    """The stages; without a profile, calls, times and shares from timings.jsonl."""
    profiled: bool
    operators: list[dict[str, Any]]
    advice: list[str]
    samples: list[dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any]
    evaluation: dict[str, Any]
    problems: list[str]
    """Parts that cannot be shown, and why."""


def read_content(run: Path) -> Content:
    """Read a run.

    Raises:
        FileNotFoundError, ValueError: its metrics or its configuration are missing or malformed.
    """
    columns = dict(readers.read_columns(run))
    if not len(columns["step"]):
        raise ValueError(f"{run} has done no step; there is nothing to report")
    monitor = Monitor(default_thresholds())
    monitor.extend(columns)
    problems: list[str] = []
    summary, profiled = _summary(run, problems)
    config = read_config_file(run / runlog.CONFIG_FILE, TrainConfig())
    samples = list(runlog.read_samples(run)) if (run / runlog.SAMPLES_FILE).is_file() else []
    last = samples[-1]["step"] if samples else 0
    return Content(
        name=run.resolve().name,
        steps=int(columns["step"][-1]),
        alerts=worst_first(monitor.alerts(None)),
        columns=columns,
        summary=summary,
        profiled=profiled,
        operators=_operators(run, problems) if profiled else [],
        advice=memory_advice(summary, config, vocabulary(run)) if profiled else [],
        samples=[row for row in samples if row["step"] == last][:SAMPLES],
        config=_json(run / runlog.CONFIG_FILE),
        environment=_json(run / runlog.ENVIRONMENT_FILE),
        evaluation=_json(run / runlog.EVALUATION_FILE),
        problems=problems,
    )


def shown_metrics(columns: dict[str, np.ndarray]) -> dict[str, list[Metric]]:
    """Return the metrics of each question that the run has logged."""
    table = {metric.name: metric for metric in (*METRICS, *TIMINGS)}
    return {
        question: [table[name] for name in names if name in table and name in columns]
        for question, names in QUESTIONS.items()
    }


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    tree = json.loads(path.read_text(encoding="utf-8"))
    return tree if isinstance(tree, dict) else {}


def _summary(run: Path, problems: list[str]) -> tuple[dict[str, dict[str, float]], bool]:
    path = run / PROFILES_FOLDER / SUMMARY_FILE
    if path.is_file():
        try:
            return read_table(path, SUMMARY_COLUMNS), True
        except ProfileError as error:
            problems.append(str(error))
    stages: dict[str, list[float]] = {}
    whole = 0.0
    for row in runlog.read(run / runlog.TIMINGS_FILE):
        whole += row["step_time_s"]
        for name, seconds in row["stages_s"].items():
            stages.setdefault(name, []).append(seconds)
    totals = {
        name: {"calls": len(times), "total_ms": 1e3 * sum(times), "share": sum(times) / whole}
        for name, times in stages.items()
    }
    ordered = sorted(totals.items(), key=lambda item: -item[1]["total_ms"])
    return dict(ordered), False


def _operators(run: Path, problems: list[str]) -> list[dict[str, Any]]:
    try:
        rows = read_table(run / PROFILES_FOLDER / OPERATORS_FILE, OPERATOR_COLUMNS)
    except ProfileError as error:
        problems.append(str(error))
        return []
    whole = sum(row["self_cpu_ms"] + row["self_cuda_ms"] for row in rows.values()) or 1.0
    ordered = sorted(rows.items(), key=lambda item: -(item[1]["self_cpu_ms"] + item[1]["self_cuda_ms"]))
    return [
        {"operator": name, "share": (row["self_cpu_ms"] + row["self_cuda_ms"]) / whole, **row}
        for name, row in ordered[:TOP_OPERATORS]
    ]


def vocabulary(run: Path) -> int | None:
    """Return the size of the run's vocabulary, where its model says it."""
    tree = _json(run / "models" / "base" / "config.json")
    size = tree.get("vocab_size")
    return size if type(size) is int else None


def peak(row: dict[str, float]) -> float:
    """Return a stage's peak: on the GPU where there was one, else of the process."""
    return row["cuda_peak_bytes"] or row["cpu_peak_bytes"]


def memory_advice(summary: dict[str, dict[str, float]], config: TrainConfig, tokens: int | None) -> list[str]:
    """Return what to change when memory runs out, the most promising first.

    The logits of a micro-batch are [b, T, V] in float32, and the update holds them and their gradient; they are
    compared with what the update takes beyond the stage that takes least.
    """
    stages = {name: peak(row) for name, row in summary.items() if name != "step"}
    if not stages:
        return []
    top = max((name for name in stages if "/" not in name), key=lambda name: stages[name])
    grown = max(stages[top] - min(stages.values()), 0.0)
    rows, positions = config.ppo.micro_batch_size, config.sampling.max_new_tokens
    logits = rows * positions * (tokens or 0) * 4
    halved = max(rows // 2, 1)
    micro = (
        f"Lower --ppo.micro-batch-size from {rows} to {halved}: activations and logits shrink in proportion, and the "
        "gradient stays the same."
        if rows > 1
        else "The micro-batch is one sequence already: lower --sampling.max-new-tokens, or take a smaller model."
    )
    linear = (
        f"Take linear_token_logprobs of rlhf_kernels in the update: it never holds the logits, [{rows}, {positions}, "
        f"{tokens or 'V'}] in float32, nor their gradient, {2 * logits / MIB:.1f} MiB together."
    )
    head = (
        "The head is computed for response positions alone wherever the model takes logits_to_keep; a model that does "
        "not pays for the prompt's logits too."
    )
    first = (
        f"{top} takes most: {stages[top] / MIB:.0f} MiB, {grown / MIB:.0f} MiB above the stage that takes least."
        if grown >= MIB
        else f"No stage takes 1 MiB more than another: the {stages[top] / MIB:.0f} MiB are weights, libraries and "
        "what the allocator keeps."
    )
    best = [linear, micro] if 2 * logits > 0.25 * grown and logits > MIB else [micro, linear]
    return [first, *best, head]
