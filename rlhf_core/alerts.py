"""Alerts: what is going wrong in a run, since when, why, and what to do; a pure function of its columns.

No clock, no file, no torch: the trainer, the command line, the tests and the dashboard call the same function.
:mod:`rlhf_core.alerting.thresholds` reads the thresholds, :mod:`rlhf_core.alerting.readers` the columns.

    >>> columns = {"step": np.arange(1, 31), "ratio_max_dev_first": np.full(30, 0.1)}
    >>> [alert.name for alert in check(columns, default_thresholds())]
    ['ratio_off_one']
"""

from collections.abc import Iterable, Mapping

import numpy as np

from rlhf_core.alerting.alert import SEVERITIES, Alert, Severity, Thresholds, severity_of
from rlhf_core.alerting.judges import number
from rlhf_core.alerting.rules import RULES, STALLED, Rule
from rlhf_core.alerting.series import CONTEXT, NONFINITE, derive
from rlhf_core.alerting.tracks import Track, joined

__all__ = [
    "SEVERITIES",
    "Alert",
    "Monitor",
    "Severity",
    "Thresholds",
    "check",
    "nonfinite_alert",
    "synthetic_alerts",
    "worst_first",
]

BLOCK = 1 << 16
"""Rows that are judged at a time, which bounds the memory."""


def check(
    columns: Mapping[str, np.ndarray], thresholds: Thresholds, *, age_of_last_row_s: float | None = None
) -> list[Alert]:
    """Return the alerts of a log, the worst first and the standing before the passed.

    Args:
        columns: ``step`` and metrics, [N] each, in the order of the log. NaN and infinity are values that were not
            finite; what was not logged in a row is masked (:class:`numpy.ma.MaskedArray`).
        thresholds: of :func:`rlhf_core.alerting.thresholds.default_thresholds`.
        age_of_last_row_s: seconds since the last row was written, when the run has not ended; None leaves out the
            one rule that needs the present time.

    Raises:
        ValueError: there is no ``step``, or columns differ in length or are not one-dimensional.
    """
    monitor = Monitor(thresholds)
    monitor.extend(columns)
    return monitor.alerts(age_of_last_row_s)


def worst_first(alerts: Iterable[Alert]) -> list[Alert]:
    """Return the standing alerts before the passed, and each from the worst severity to the least."""
    return sorted(alerts, key=lambda one: (not one.standing, -SEVERITIES.index(one.severity), one.first_step))


class Monitor:
    """The same alerts for a log that grows: each row is looked at once, and memory stays bounded."""

    def __init__(self, thresholds: Thresholds) -> None:
        self._stalled = thresholds[STALLED.name]
        self._tracks = [Track(rule, thresholds[rule.name]) for rule in RULES]
        self._tail: dict[str, np.ndarray] = {}
        self._seen: set[str] = set()
        self._last_step = 0
        self._rows = 0
        self._step_times = np.empty(0)

    def extend(self, columns: Mapping[str, np.ndarray]) -> list[Alert]:
        """Take further rows of the log and return the alerts that they raised.

        Args:
            columns: as for :func:`check`; metrics may appear that were not there before.

        Raises:
            ValueError: as for :func:`check`.
        """
        rows = _row_count(columns)
        raised: list[Alert] = []
        for start in range(0, rows, BLOCK):
            raised += self._extend({name: column[start : start + BLOCK] for name, column in columns.items()})
        return raised

    def _extend(self, columns: Mapping[str, np.ndarray]) -> list[Alert]:
        block = {name: _float64(column) for name, column in columns.items()}
        logged = {name: ~np.ma.getmaskarray(columns[name]) for name in block if name != "step"}
        steps = block["step"].astype(np.int64)
        block |= derive(block, logged, self._last_step if self._rows else steps[0] - 1)
        for name, has in logged.items():
            block[name] = np.where(has & ~np.isfinite(block[name]), np.inf, block[name])
        finite = {name: np.isfinite(block[name]) for name in block}
        self._seen |= {name for name in finite if finite[name].any()}
        self._last_step, self._rows = int(steps[-1]), self._rows + len(steps)
        if "step_time_s" in block:
            self._step_times = np.concatenate([self._step_times, block["step_time_s"][finite["step_time_s"]]])[-20:]
        recent = joined(self._tail, block)
        # A limit, or a spread, that lies beyond the largest number is infinite, and not judged by.
        with np.errstate(over="ignore", invalid="ignore"):
            found = [alert for track in self._tracks for alert in track.extend(steps, block, finite, recent)]
        self._tail = {name: column[-2 * CONTEXT :] for name, column in recent.items()}
        return found

    def alerts(self, age_of_last_row_s: float | None = None) -> list[Alert]:
        """Return all alerts so far, the worst first and the standing before the passed."""
        found = [alert for track in self._tracks for alert in track.alerts()]
        if age_of_last_row_s is not None and self._rows:
            found += self._judge_age(age_of_last_row_s)
        return worst_first(found)

    def not_checked(self) -> dict[str, tuple[str, ...]]:
        """Return the rules that could not look, and the metrics that the log lacks for each."""
        missing = {
            track.rule.name: tuple(m for m in track.rule.metrics if m not in self._seen) for track in self._tracks
        }
        return {name: metrics for name, metrics in missing.items() if metrics}

    def _judge_age(self, age_s: float) -> list[Alert]:
        usual = float(np.median(self._step_times)) if len(self._step_times) else 0.0
        limit = max(number(self._stalled, "threshold") * usual, number(self._stalled, "least_s"))
        if not age_s > limit:
            return []
        return [
            Alert(
                name=STALLED.name,
                severity=severity_of(self._stalled),
                metric=STALLED.metrics[0],
                first_step=self._last_step,
                raised_step=self._last_step,
                step=self._last_step,
                value=age_s,
                threshold=limit,
                moved_with=(),
                cause=STALLED.cause,
                remedy=STALLED.remedy,
                evidence=f"the last row is {age_s:.0f} s old; a step takes {usual:.3g} s",
            )
        ]


def _row_count(columns: Mapping[str, np.ndarray]) -> int:
    if "step" not in columns:
        raise ValueError(f"the columns have no 'step'; they are {', '.join(columns) or 'empty'}")
    shapes = {name: np.shape(column) for name, column in columns.items()}
    rows = shapes["step"][0] if len(shapes["step"]) == 1 else -1
    for name, shape in shapes.items():
        if shape != (rows,):
            raise ValueError(f"column {name!r} has shape {shape}, and step {shapes['step']}; all have to be [N]")
    return rows


def _float64(column: np.ndarray) -> np.ndarray:
    return np.ma.filled(np.ma.asarray(column, dtype=np.float64), np.nan)


def nonfinite_alert(step: int, name: str, thresholds: Thresholds) -> Alert:
    """Return the alert of a step that a trainer gave up because ``name`` was not finite, and did not log."""
    rule = next(rule for rule in RULES if rule.name == "nonfinite")
    return Alert(
        name=rule.name,
        severity=severity_of(thresholds[rule.name]),
        metric=name,
        first_step=step,
        raised_step=step,
        step=step,
        value=None,
        threshold=None,
        moved_with=(),
        cause=rule.cause,
        remedy=rule.remedy,
        evidence=f"{name} is not finite; the trainer stopped in this step and did not log it",
    )


def synthetic_alerts(thresholds: Thresholds) -> list[Alert]:
    """Return one made-up alert of each rule, marked synthetic: to see what they look like."""
    return [_synthetic(rule, severity_of(thresholds[rule.name])) for rule in (*RULES, STALLED)]


def _synthetic(rule: Rule, severity: Severity) -> Alert:
    lost = rule.metrics[0] == NONFINITE
    metric = "grad_norm" if lost else rule.metrics[0]
    return Alert(
        name=rule.name,
        severity=severity,
        metric=metric,
        first_step=10,
        raised_step=12,
        step=20,
        value=None if lost else 2.0,
        threshold=None if lost else 1.0,
        moved_with=("reward_mean", "entropy"),
        cause=rule.cause,
        remedy=rule.remedy,
        evidence=f"synthetic: {metric} is not finite" if lost else f"synthetic: {metric} 0.5 → 2",
        synthetic=True,
    )
