"""Alerts while training: what is raised goes to ``alerts.jsonl`` and the terminal, and may stop the run.

This module does not import torch.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core import runlog
from rlhf_core.alerting import readers
from rlhf_core.alerts import SEVERITIES, Alert, Monitor, Severity, Thresholds, nonfinite_alert
from rlhf_core.durable_files import write_atomically
from rlhf_core.terminal import console


@dataclass(frozen=True)
class WatchOptions:
    """How a run is watched."""

    thresholds: Thresholds
    stop_on: Severity | None
    """The least severity of an alert that stops the run; None for none."""


class Watch:
    """The alerts of a run that is being trained.

    What a resumed run has logged already is judged again, so ``alerts.jsonl`` tells what the logs up to the
    checkpoint tell; only alerts that are raised afterwards stop it.
    """

    def __init__(self, run: Path, options: WatchOptions) -> None:
        self._path = run / runlog.ALERTS_FILE
        self._options = options
        self._monitor = Monitor(options.thresholds)
        raised = self._monitor.extend(readers.columns_of(readers.run_rows(run))) if _has_rows(run) else []
        write_atomically(self._path, "".join(runlog.encode(alert.to_json()) for alert in raised).encode())

    def after_step(self, metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> Alert | None:
        """Take the rows that a step has logged; return the worst alert that it raised and that stops the run."""
        row = readers.metrics_of(timings, "timings") | readers.metrics_of(metrics, "metrics")
        raised = self._monitor.extend(readers.columns_of([row]))
        if raised:
            runlog.append(self._path, [alert.to_json() for alert in raised])
        for alert in raised:
            if alert.severity != "info":
                console.print(in_words(alert), markup=False, soft_wrap=True)
        stopping = [alert for alert in raised if self._stops(alert)]
        return max(stopping, key=lambda alert: SEVERITIES.index(alert.severity), default=None)

    def _stops(self, alert: Alert) -> bool:
        least = self._options.stop_on
        return least is not None and SEVERITIES.index(alert.severity) >= SEVERITIES.index(least)

    @contextlib.contextmanager
    def for_what_is_not_finite(self) -> Iterator[None]:
        """Record the alert of a step that the trainer gave up because something was not finite: it logs no row."""
        try:
            yield
        except FloatingPointError as error:
            step, name = getattr(error, "step", None), getattr(error, "name", None)
            if isinstance(step, int) and isinstance(name, str):
                alert = nonfinite_alert(step, name, self._options.thresholds)
                runlog.append(self._path, [alert.to_json()])
            raise


def _has_rows(run: Path) -> bool:
    return (run / runlog.METRICS_FILE).is_file()


def in_words(alert: Alert) -> str:
    """Return an alert in one line: what, since when, the figures, what to do."""
    against = "" if alert.threshold is None else f" against {number_in_words(alert.threshold)}"
    return (
        f"{alert.severity} alert {alert.name} since step {alert.first_step}: {alert.metric} is "
        f"{number_in_words(alert.value)}{against} ({alert.evidence}). {alert.remedy.removesuffix('.')}"
    )


def number_in_words(value: float | None) -> str:
    """Return a figure with four digits."""
    return "not finite" if value is None else f"{value:.4g}"
