"""The runs that are looked at: each is read as it grows, into curves, recent rows and alerts of bounded size."""

import collections
import functools
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dashboard import folder, jsonl, kinds, series
from dashboard.jsonl import Columns
from dashboard.series import Curve
from rlhf_core import run_folder, runlog
from rlhf_core.alerting import readers, rules
from rlhf_core.alerting.thresholds import default_thresholds
from rlhf_core.alerts import Alert, Monitor, Thresholds, worst_first

MOST_RUNS = 12
"""Runs that are held at a time; the one not asked for the longest goes."""
AT_ONCE_BYTES = 1 << 24
"""A log with less than this unread is read while the page waits; a longer one in the background."""
PREVIEW_ROWS = 400
HEAD_START_S = 3.0
"""How long the reading in the background waits, so that the page is drawn first."""
LATE_S = 1.0
"""How long a row waits for its timings, which are written a moment later."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come, and how far it has been read."""

    rows: int
    first_step: int | None
    last_step: int | None
    steps: int | None
    """What the run is to have; None when nothing says."""
    age_s: float
    """Seconds since the log was last written to."""
    step_time_s: float | None
    """Median of the latest steps."""
    ended: bool | None
    """None where nothing says when it is over."""
    bad_lines: int
    read: float
    """Share of the log that has been read; below 1, the curves are a preview made from evenly spaced rows."""

    @property
    def running(self) -> bool:
        """Return whether steps are still being written: the last is no older than 20 usual ones, or a minute."""
        return not self.ended and self.age_s < max(60.0, 20 * (self.step_time_s or 0.0))


class Run:
    """One run's logs, as far as they have been read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._reader: threading.Thread | None = None
        self._closed = False
        self._metrics = jsonl.Tail(path, runlog.METRICS_FILE)
        self._timings = jsonl.Tail(path, runlog.TIMINGS_FILE)
        self._begin()

    def _begin(self) -> None:
        self._metrics.rewind()
        self._timings.rewind()
        self._held: Columns = {}
        self._timed: Columns = {}
        self._totals = {"time_s": 0.0, "tokens": 0.0}
        self._monitor = Monitor(_thresholds())
        self._buckets = series.Buckets()
        self._recent: Columns = {}
        self._previews: list[series.Buckets] = []
        self._preview_last: Columns = {}
        self._first_step: int | None = None
        self._bad_lines = 0

    def refresh(self) -> None:
        """Read what has been added; a long log in the background, with a preview of its whole length meanwhile."""
        with self._lock:
            if self._reader is not None and self._reader.is_alive():
                if self._previews and self._metrics.grown():
                    self._make_previews()
                return
            if self._metrics.restarted() or self._timings.restarted():
                self._begin()
                self._metrics.restarted()
                self._timings.restarted()
            if self._metrics.size - self._metrics.offset <= AT_ONCE_BYTES:
                while self._read_block():
                    pass
                self._previews = []
                return
            self._make_previews()
            self._reader = threading.Thread(target=self._read_on, name=f"read {self.path.name}", daemon=True)
            self._reader.start()

    def close(self) -> None:
        """Stop reading in the background."""
        self._closed = True

    def _read_on(self) -> None:
        time.sleep(HEAD_START_S)
        more = True
        while more and not self._closed:
            with self._lock:
                more = self._read_block()
                if not more:
                    self._previews = []
            time.sleep(0.0005)  # a lock is not fair: let the page have it

    def _make_previews(self) -> None:
        self._previews, self._preview_last = [], {}
        for log in (runlog.METRICS_FILE, runlog.TIMINGS_FILE):
            rows, _ = jsonl.parse(lines) if (lines := jsonl.skim(self.path, log, PREVIEW_ROWS)) else ({}, 0)
            if "step" in rows:
                self._previews.append(series.Buckets(PREVIEW_ROWS + 1))
                self._previews[-1].extend(rows)
                self._preview_last = {name: column[-1:] for name, column in rows.items()} | self._preview_last

    def _holder(self, name: str) -> series.Buckets:
        """Return what has the curve of a metric at present."""
        return next((preview for preview in self._previews if name in preview.names), self._buckets)

    def _read_block(self) -> bool:
        """Read some rows with their timings; return whether there may be more."""
        lines = self._metrics.block()
        new, bad = jsonl.parse(lines) if lines else ({}, 0)
        self._bad_lines += bad
        rows, self._held = jsonl.concatenated(self._held, new), {}
        if not len(rows.get("step", ())):
            return bool(lines)
        last = float(rows["step"].max())
        while (not self._timed or self._timed["step"][-1] < last) and (timings := self._timings.block()):
            timed, bad = jsonl.parse(timings)
            self._bad_lines += bad
            if "step" in timed:
                self._timed = jsonl.concatenated(self._timed, timed)
        rows, waits = self._with_timings(rows)
        if waits and self._metrics.age_s() < LATE_S:
            self._held = {name: column[-1:] for name, column in rows.items()}
            rows = {name: column[:-1] for name, column in rows.items()}
        if len(rows["step"]):
            self._take(rows)
        return bool(lines)

    def _with_timings(self, rows: Columns) -> tuple[Columns, bool]:
        """Return the rows with the columns of their timings, and whether those of the last row have yet to come."""
        if not self._timed:
            return rows, self._timings.size > 0
        steps, timed = np.ma.getdata(rows["step"]), np.ma.getdata(self._timed["step"])
        order = np.argsort(timed, kind="stable")
        place = order[np.minimum(np.searchsorted(timed, steps, sorter=order), len(timed) - 1)]
        found = timed[place] == steps
        joined = dict(rows)
        for name, column in self._timed.items():
            if name != "step":
                taken = column[place]
                joined[name] = np.ma.array(np.ma.getdata(taken), mask=np.ma.getmaskarray(taken) | ~found)
        behind = timed > steps.max()
        self._timed = {name: column[behind] for name, column in self._timed.items()} if behind.any() else {}
        return joined, not found[-1]

    def _take(self, rows: Columns) -> None:
        if self._first_step is None:
            self._first_step = int(rows["step"][0])
        self._monitor.extend({name: column for name, column in rows.items() if "/" not in name})
        for name, source in (("time_s", "step_time_s"), ("tokens", "response_tokens")):
            amounts = np.nan_to_num(np.ma.filled(rows[source], 0.0)) if source in rows else np.zeros(len(rows["step"]))
            total = self._totals[name] + np.cumsum(np.maximum(amounts, 0.0))
            rows[name], self._totals[name] = np.ma.array(total), float(total[-1])
        self._buckets.extend(rows)
        joined = jsonl.concatenated(self._recent, rows)
        self._recent = {name: column[-series.RECENT :].copy() for name, column in joined.items()}

    def names(self) -> list[str]:
        """Return the metrics that the log has, the seconds of stages as ``stages_s/NAME``."""
        with self._lock:
            names = dict.fromkeys(name for held in (*self._previews, self._buckets) for name in held.names)
        return [name for name in names if name not in ("step", *series.AXES)]

    def curve(self, name: str, axis: str, last: int | None, points: int) -> Curve:
        """Return a metric's curve of at most ``points`` points, of the last steps or, with None, of all."""
        with self._lock:
            if (
                last is not None
                and not self._previews
                and len(self._recent.get("step", ())) >= min(last, self._buckets.rows)
            ):
                curve = series.recent_curve(self._recent, name, axis)
                behind = series.recent_curve(self._recent, "step", axis)
            else:
                held = self._holder(name)
                curve, behind = held.curve(name, axis), held.curve("step", axis)
        if last is not None and len(curve.x):
            inside = behind.high > behind.high[-1] - last
            curve = series.clip(curve, curve.x[inside][0])
        return series.decimate(curve, points)

    def total(self, name: str) -> float:
        """Return the sum of a metric over what has been read."""
        with self._lock:
            return self._buckets.sums(name)[0]

    def count(self, name: str) -> int:
        """Return how many rows that have been read have a finite value of a metric."""
        with self._lock:
            return self._buckets.sums(name)[1]

    def place(self, step: int, axis: str) -> float | None:
        """Return where on an axis a step lies, among the points that are held."""
        with self._lock:
            steps = self._holder("step").curve("step", axis)
        if not len(steps.x):
            return None
        return float(steps.x[min(int(np.searchsorted(steps.high, step)), len(steps.x) - 1)])

    def latest(self) -> dict[str, float | None]:
        """Return the last row's numbers, with its timings; None for what was not finite."""
        with self._lock:
            rows = self._preview_last if self._previews else self._recent
            last = {name: column[-1] for name, column in rows.items() if len(column)}
        present = {name: float(value) for name, value in last.items() if value is not np.ma.masked}
        return {name: value if np.isfinite(value) else None for name, value in present.items()}

    def alerts(self) -> list[Alert]:
        """Return the alerts of what has been read, the worst first."""
        progress = self.progress()
        with self._lock:
            waiting = progress.ended is False and progress.read == 1.0
            found = self._monitor.alerts(progress.age_s if waiting else None)
        questions = kinds.judged_questions(self.kind())
        fitting = [alert for alert in found if rules.BY_NAME[alert.name].question in questions]
        return worst_first([*fitting, *self._unlogged_alerts(progress.last_step or 0)])

    def _unlogged_alerts(self, last_step: int) -> list[Alert]:
        """Return the alert of a step that the trainer gave up, and so did not log."""
        path = folder.plain_file(self.path, runlog.ALERTS_FILE)
        if path is None or path.stat().st_size > folder.JSON_BYTES:
            return []
        try:
            return readers.unlogged_alerts(self.path, last_step)
        except (OSError, ValueError):
            return []

    def not_checked(self) -> dict[str, tuple[str, ...]]:
        """Return the rules that fit this kind of run and cannot look at its log, with the metrics that each lacks."""
        questions = kinds.judged_questions(self.kind())
        with self._lock:
            missing = self._monitor.not_checked()
        return {name: metrics for name, metrics in missing.items() if rules.BY_NAME[name].question in questions}

    def judged(self) -> bool:
        """Return whether a rule looks at whether the run learns; without one, no alert does not mean healthy."""
        learning = {rule.name for rule in rules.RULES if rule.question == rules.LEARNING}
        fits = rules.LEARNING in kinds.judged_questions(self.kind())
        return fits and bool(learning - self.not_checked().keys())

    def progress(self) -> Progress:
        """Return how far the run is."""
        config = self.config()
        steps = kinds.planned_steps(self.path, config)
        with self._lock:
            reading = bool(self._previews)
            last = self.latest().get("step")
            times = self._recent.get("step_time_s", np.ma.array([]))[-20:].compressed()
            rows, size = self._buckets.rows, self._metrics.size
            read = self._metrics.offset / size if reading and size else 1.0
            age_s = self._metrics.age_s()
        finite = times[np.isfinite(times)]
        last_step = None if last is None else int(last)
        return Progress(
            rows=rows,
            first_step=self._first_step,
            last_step=last_step,
            steps=steps,
            age_s=age_s,
            step_time_s=float(np.median(finite)) if len(finite) else None,
            ended=kinds.ended(self.path, kinds.our_kind(config), last_step, steps),
            bad_lines=self._bad_lines,
            read=min(read, 1.0),
        )

    def kind(self) -> str | None:
        """Return the command that made the run; None when its configuration is none of ours."""
        return kinds.our_kind(self.config())

    def config(self) -> dict[str, Any]:
        """Return ``config.json``; empty when it is not there or is none."""
        return folder.read_json(self.path, run_folder.CONFIG_FILE)


class Store:
    """The runs of one folder, held while they are looked at."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._runs: collections.OrderedDict[str, Run] = collections.OrderedDict()

    def names(self) -> list[str]:
        """Return the runs, the newest first."""
        return folder.list_runs(self.path)

    def run(self, name: str) -> Run:
        """Return a run, read up to now.

        Raises:
            NoSuchRun: the folder's listing does not have it.
        """
        path = folder.find(self.path, name)
        with self._lock:
            run = self._runs.get(name)
            if run is None:
                run = self._runs[name] = Run(path)
            self._runs.move_to_end(name)
            while len(self._runs) > MOST_RUNS:
                self._runs.popitem(last=False)[1].close()
        run.refresh()
        return run


@functools.cache
def _thresholds() -> Thresholds:
    return default_thresholds()


@functools.cache
def of_folder(path: Path) -> Store:
    """Return the one store of a folder: the page's sessions and the JSON routes share it."""
    return Store(path)


def current() -> Store:
    """Return the store of the folder that the dashboard shows."""
    return of_folder(folder.runs_folder())
