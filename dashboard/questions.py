"""The questions that a run's metrics answer."""

import dataclasses

from dashboard.series import AXES
from rlhf_core.alerting.questions import METRICS_OF
from rlhf_core.alerting.rules import LEARNING
from rlhf_core.metrics import DPO_METRICS, EVAL_METRICS, METRICS, REWARD_METRICS, SFT_METRICS, TIMINGS, Metric

TABLES = (METRICS, TIMINGS, SFT_METRICS, REWARD_METRICS, DPO_METRICS, EVAL_METRICS)


def _by_name() -> dict[str, Metric]:
    """Return the metrics of all commands; one whose unit is another in each has none."""
    found: dict[str, Metric] = {}
    for metric in (metric for table in TABLES for metric in table):
        known = found.setdefault(metric.name, metric)
        if known.unit != metric.unit:
            found[metric.name] = dataclasses.replace(known, unit="1")
    return found


BY_NAME = _by_name()

CURVE_OF = {"kl_per_token": "kl", "rollout_logprob_diff": "rollout_logprob_diff_max"}
"""The curve on which an alert shows whose rule speaks of a figure that no log has."""
FIRST = 4
"""Metrics of a question that are shown before all are asked for."""
LARGEST_SPELLED = 1e15
"""From here on numbers are written with an exponent: no letter is left that anybody knows."""
OTHER = "Also in this log"


def grouped(names: list[str], *, everything: bool) -> dict[str, list[str]]:
    """Return the metrics of a log by question; what belongs to none stands last, under ``OTHER``.

    That is shown unasked where nothing else says whether the run learns: another trainer's loss may be among it.
    """
    groups = {
        question: [name for name in metrics if name in names][: None if everything else FIRST]
        for question, metrics in METRICS_OF.items()
    }
    known = {name for metrics in METRICS_OF.values() for name in metrics} | {"step", *AXES}
    others = [name for name in names if name not in known and "/" not in name]
    if others and (everything or not groups[LEARNING]):
        groups[OTHER] = others
    return {question: metrics for question, metrics in groups.items() if metrics}


def outside(name: str, value: float | None) -> bool:
    """Return whether a metric's value lies outside its healthy range; what is not finite does."""
    low, high = healthy(name)
    if value is None:
        return True
    return (low is not None and value < low) or (high is not None and value > high)


def healthy(name: str) -> tuple[float | None, float | None]:
    """Return a metric's healthy range; None leaves a side open."""
    return BY_NAME[name].healthy if name in BY_NAME else (None, None)


def title(name: str) -> str:
    """Return a metric's name with its unit."""
    unit = BY_NAME[name].unit if name in BY_NAME else "1"
    return name if unit == "1" else f"{name}, {unit}"


def number(value: float | None) -> str:
    """Return a number as a person reads it: four digits, thousands and millions as k and M; 1e15 and more as that."""
    if value is None or value != value:
        return "not finite"
    size = abs(value)
    if size >= LARGEST_SPELLED:
        return f"{value:.4g}"
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return a duration in the two largest units that it has."""
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min {int(seconds % 60)} s"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
