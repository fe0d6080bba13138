"""What a report says of a run: alerts, curves, time, operators, memory, completions. Imports no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_core import run_folder, runlog
from rlhf_core.alerting import readers
from rlhf_core.alerting.questions import METRICS_OF
from rlhf_core.alerting.thresholds import default_thresholds
from rlhf_core.alerts import Alert, Monitor, worst_first
from rlhf_core.checks.metrics_check import is_number
from rlhf_core.config import TrainConfig
from rlhf_core.config_files import read_config_file
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

PACKED = ("gpt2", "llama")
"""The model types whose native updates hold no logits: see :mod:`rlhf_core.packing`."""
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
    config = read_config_file(run / run_folder.CONFIG_FILE, TrainConfig())
    return Content(
        name=run.resolve().name,
        steps=int(columns["step"][-1]),
        alerts=worst_first(monitor.alerts(None)),
        columns=columns,
        summary=summary,
        profiled=profiled,
        operators=_operators(run, problems) if profiled else [],
        advice=memory_advice(summary, config, _json(run / "models" / "base" / "config.json")) if profiled else [],
        samples=last_samples(runlog.read_samples(run)) if (run / runlog.SAMPLES_FILE).is_file() else [],
        config=_json(run / run_folder.CONFIG_FILE),
        environment=_json(run / run_folder.ENVIRONMENT_FILE),
        evaluation=_json(run / run_folder.EVALUATION_FILE),
        problems=problems,
    )


def last_samples(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first samples of the last step, without holding those of the others."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        if kept and kept[0]["step"] != row["step"]:
            kept = []
        if len(kept) < SAMPLES:
            kept.append(row)
    return kept


def shown_metrics(columns: dict[str, np.ndarray]) -> dict[str, list[Metric]]:
    """Return the metrics of each question that the run has logged."""
    table = {metric.name: metric for metric in (*METRICS, *TIMINGS)}
    return {
        question: [table[name] for name in names if name in table and name in columns]
        for question, names in METRICS_OF.items()
    }


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = runlog.parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}; the file was damaged or changed") from None
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
        wall, seconds_of = row.get("step_time_s"), row.get("stages_s")
        if not (
            is_number(wall) and wall > 0 and isinstance(seconds_of, dict) and all(map(is_number, seconds_of.values()))
        ):
            raise ValueError(
                f"{run / runlog.TIMINGS_FILE}: step {row['step']} has no step_time_s above 0 with a table stages_s of "
                "numbers; the file was damaged or changed"
            )
        whole += wall
        for name, seconds in seconds_of.items():
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


def peak(row: dict[str, float]) -> float:
    """Return a stage's peak: on the GPU where there was one, else of the process."""
    return row["cuda_peak_bytes"] or row["cpu_peak_bytes"]


def memory_advice(summary: dict[str, dict[str, float]], config: TrainConfig, model: Mapping[str, Any]) -> list[str]:
    """Return what to change when memory runs out, the most promising first.

    Native runs of GPT-2 and Llama hold no logits. In other runs those of a micro-batch are [b, T, V] in float32, and
    the update holds them and their gradient; they are compared with what the update takes beyond the stage that takes
    least.

    Args:
        summary: the stages of the profile.
        config: the run's configuration.
        model: the ``config.json`` of the run's language model.
    """
    stages = {name: peak(row) for name, row in summary.items() if name != "step"}
    if not stages:
        return []
    top = max((name for name in stages if "/" not in name), key=lambda name: stages[name])
    grown = max(stages[top] - min(stages.values()), 0.0)
    rows, positions = config.ppo.micro_batch_size, config.sampling.max_new_tokens
    halved = max(rows // 2, 1)
    micro = (
        f"Lower --ppo.micro-batch-size from {rows} to {halved}: what the update keeps of a micro-batch shrinks in "
        "proportion, and the gradient stays the same."
        if rows > 1
        else "The micro-batch is one sequence already: lower --sampling.max-new-tokens, or take a smaller model."
    )
    first = (
        f"{top} takes most: {stages[top] / MIB:.0f} MiB, {grown / MIB:.0f} MiB above the stage that takes least."
        if grown >= MIB
        else f"No stage takes 1 MiB more than another: the {stages[top] / MIB:.0f} MiB are weights, libraries and "
        "what the allocator keeps."
    )
    if config.numerics == "native" and model.get("model_type") in PACKED:
        return [first, micro]
    size = model.get("vocab_size")
    tokens = size if type(size) is int else None
    logits = rows * positions * (tokens or 0) * 4
    linear = (
        f"The update holds the logits, [{rows}, {positions}, {tokens or 'V'}] in float32, and their gradient, "
        f"{2 * logits / MIB:.1f} MiB together; --numerics native with a GPT-2 or Llama shape holds neither, by "
        "linear_token_logprobs of rlhf_kernels."
    )
    head = (
        "The head is computed for response positions alone wherever the model takes logits_to_keep; a model that does "
        "not pays for the prompt's logits too."
    )
    best = [linear, micro] if 2 * logits > 0.25 * grown and logits > MIB else [micro, linear]
    return [first, *best, head]
