"""Alerts: what is going wrong in a run, since when, why, and what to do; a pure function of its columns.

No clock, no file, no torch: the trainer, the command line, the tests and the dashboard call the same function.
:mod:`rlhf_core.alerting.thresholds` reads the thresholds, :mod:`rlhf_core.alerting.readers` the columns.

    >>> columns = {"step": np.arange(1, 31), "ratio_max_dev_first": np.full(30, 0.1)}
    >>> [alert.name for alert in check(columns, default_thresholds())]
    ['ratio_off_one']
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np

from rlhf_core.alerting.judges import Settings, Verdict, number
from rlhf_core.alerting.rules import RULES, STALLED, Rule
from rlhf_core.alerting.series import (
    CONTEXT,
    DERIVED,
    HEAD,
    MAD_TO_STD,
    NONFINITE,
    Series,
    derive,
    median_by_row,
    run_lengths,
)

Severity = Literal["info", "warning", "critical"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")
"""From the least to the worst."""
Thresholds = Mapping[str, Settings]
"""A table of settings for each rule, as ``alerts.toml`` has it."""

BLOCK = 1 << 16
"""Rows that are judged at a time, which bounds the memory."""
MOVED_DEVIATIONS = 5.0
"""How far, in spreads of the steps before, a metric has moved when it is named beside an alert."""
MOVED_SHARE = 0.05
"""Added to the spread, as a share of the metric: one that never varied has not moved by a rounding."""
MOST_MOVED = 5
MOST_EPISODES = 5
"""Alerts of one rule that are kept: the first, and the latest."""


@dataclass(frozen=True)
class Alert:
    """One thing that is going wrong, or was."""

    name: str
    """The rule's name."""
    severity: Severity
    metric: str
    """The metric that the rule speaks of."""
    first_step: int
    """The first bad step."""
    raised_step: int
    """The step at which it had been bad for long enough."""
    step: int
    """The last bad step."""
    value: float | None
    """The metric at the last bad step; None where it is not finite."""
    threshold: float | None
    """What it should have stayed within, as of the step at which the alert was raised."""
    moved_with: tuple[str, ...]
    """Metrics that left their range of the steps before at the same time, the farthest first."""
    cause: str
    remedy: str
    evidence: str
    """The figures, in a line."""
    standing: bool = True
    """False when the metric has been good again for long enough."""
    synthetic: bool = False
    """True when it is an example, and of no run."""

    def to_json(self) -> dict[str, Any]:
        """Return the alert as a JSON object."""
        return asdict(self) | {"moved_with": list(self.moved_with)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Alert":
        """Return the alert of a JSON object.

        Raises:
            ValueError: a field is missing, or one is unknown.
        """
        known = {item.name for item in fields(cls)}
        if row.keys() != known:
            raise ValueError(f"an alert has {', '.join(sorted(known))}; these differ: {sorted(row.keys() ^ known)}")
        return cls(**{**row, "moved_with": tuple(row["moved_with"])})


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
        self._tracks = [_Track(rule, thresholds[rule.name]) for rule in RULES]
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
        recent = _joined(self._tail, block)
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
                severity=_severity(self._stalled),
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


@dataclass
class _Episode:
    """A stretch of bad steps."""

    first_step: int
    raised_step: int
    step: int
    value: float
    limit: float
    sign: int
    level: int
    """Index of its worst severity."""
    good_rows: int = 0
    standing: bool = True
    metric: str = ""
    moved_with: tuple[str, ...] = ()
    evidence: str = ""


@dataclass
class _Track:
    """One rule's way through a log."""

    rule: Rule
    settings: Settings
    tail: dict[str, np.ndarray] = field(default_factory=dict)
    head: dict[str, np.ndarray] = field(default_factory=dict)
    rows: int = 0
    streak: int = 0
    streak_step: int = 0
    episodes: list[_Episode] = field(default_factory=list)

    def extend(
        self,
        steps: np.ndarray,
        block: Mapping[str, np.ndarray],
        finite: Mapping[str, np.ndarray],
        recent: Mapping[str, np.ndarray],
    ) -> list[Alert]:
        """Judge a block's rows and return the alerts that they raised."""
        if any(name not in block for name in self.rule.metrics):
            return []
        usable = np.logical_and.reduce([finite[name] for name in self.rule.metrics])
        new = {name: block[name][usable] for name in self.rule.metrics} | {"step": steps[usable]}
        count = len(new["step"])
        if not count:
            return []
        series = self._series(new)
        known = len(series) - count
        verdict = self.rule.judge(series, self.settings).since(known)
        bad = verdict.bad & (series.rows[known:] >= number(self.settings, "warm_up"))
        raised = self._follow(new["step"], bad, verdict, _levels(verdict, self.settings))
        self.tail = {name: column[-CONTEXT:] for name, column in series.columns.items()}
        self.rows += count
        kept = [episode for episode in raised if any(episode is one for one in self.episodes)]
        for episode in kept:
            _explain(self.rule, episode, recent)
        return [self._alert(episode) for episode in kept]

    def _series(self, new: Mapping[str, np.ndarray]) -> Series:
        for name in self.rule.metrics:
            head = self.head.get(name, np.empty(0))
            self.head[name] = np.concatenate([head, new[name][: HEAD - len(head)]])
        joined = _joined(self.tail, new)
        return Series(joined, self.rows - (len(joined["step"]) - len(new["step"])), self.head)

    def _follow(self, steps: np.ndarray, bad: np.ndarray, verdict: Verdict, levels: np.ndarray) -> list[_Episode]:
        """Walk from the start of one episode to its end to the start of the next; return those that began here."""
        raised: list[_Episode] = []
        lengths = run_lengths(bad, self.streak)
        long_enough = np.flatnonzero(lengths >= number(self.settings, "steps"))
        at = 0
        while at < len(steps):
            episode = self.episodes[-1] if self.episodes and self.episodes[-1].standing else None
            if episode is not None:
                at = self._to_the_end(episode, at, steps, verdict, levels)
                continue
            later = np.searchsorted(long_enough, at)
            if later == len(long_enough):
                break
            at = int(long_enough[later])
            begin = at - int(lengths[at]) + 1
            first = int(steps[begin]) if begin >= 0 else self.streak_step
            step, value, limit = int(steps[at]), float(verdict.value[at]), float(verdict.limit[at])
            raised.append(_Episode(first, step, step, value, limit, verdict.sign, int(levels[at])))
            self.episodes.append(raised[-1])
            del self.episodes[1 : -MOST_EPISODES + 1]
            at += 1
        if 0 < lengths[-1] <= len(steps):
            self.streak_step = int(steps[len(steps) - int(lengths[-1])])
        self.streak = int(lengths[-1])
        return raised

    def _to_the_end(self, episode: _Episode, at: int, steps: np.ndarray, verdict: Verdict, levels: np.ndarray) -> int:
        """Follow an episode, against the limit that it was raised by, and return the row behind its end."""
        clears, size = number(self.settings, "clears"), 32
        while at < len(steps) and episode.standing:
            value = verdict.value[at : at + size]
            bad = episode.sign * (value - episode.limit) > 0
            good_rows = run_lengths(~bad, episode.good_rows)
            ends = np.flatnonzero(good_rows >= clears)
            stop = int(ends[0]) + 1 if len(ends) else len(bad)
            bad_rows = np.flatnonzero(bad[:stop])
            if len(bad_rows):
                last = int(bad_rows[-1])
                episode.step, episode.value = int(steps[at + last]), float(value[last])
                episode.level = max(episode.level, int(levels[at + bad_rows].max()))
            episode.good_rows = int(good_rows[stop - 1])
            episode.standing = not len(ends)
            at, size = at + stop, 2 * size
        return at

    def alerts(self) -> list[Alert]:
        """Return this rule's alerts."""
        return [self._alert(episode) for episode in self.episodes]

    def _alert(self, episode: _Episode) -> Alert:
        return Alert(
            name=self.rule.name,
            severity=SEVERITIES[episode.level],
            metric=episode.metric,
            first_step=episode.first_step,
            raised_step=episode.raised_step,
            step=episode.step,
            value=episode.value,
            threshold=episode.limit,
            moved_with=episode.moved_with,
            cause=self.rule.cause,
            remedy=self.rule.remedy,
            evidence=episode.evidence,
            standing=episode.standing,
        )


def _levels(verdict: Verdict, settings: Settings) -> np.ndarray:
    """Return [N] the index of each row's severity, were it bad."""
    levels = np.full(len(verdict.value), SEVERITIES.index(_severity(settings)))
    for index, name in enumerate(SEVERITIES):
        if name in settings:
            levels[verdict.beyond(number(settings, name)) & (levels < index)] = index
    return levels


def _severity(settings: Settings) -> Severity:
    return next(one for one in SEVERITIES if one == settings["severity"])


def _explain(rule: Rule, episode: _Episode, recent: Mapping[str, np.ndarray]) -> None:
    """Find which metrics moved when an episode was raised, and write its figures in a line."""
    names = [name for name in recent if name != "step" and name not in DERIVED]
    until = int(np.flatnonzero(recent["step"] == episode.raised_step)[-1]) + 1
    began = np.flatnonzero(recent["step"][:until] == episode.first_step)
    since = int(began[-1]) if len(began) else 0
    shown = [name for name in rule.metrics if name in recent]
    matrix = np.stack([recent[name] for name in (*shown, *names)])
    lost = [name for name in names if np.isinf(recent[name][since:until]).any()]
    matrix[~np.isfinite(matrix)] = np.nan
    before, now = matrix[:, max(0, since - CONTEXT) : since], median_by_row(matrix[:, since:until], 1)
    usual = median_by_row(before, 3) if since else np.full(len(matrix), np.nan)
    spread = MAD_TO_STD * median_by_row(np.abs(before - usual[:, None]), 3) if since else usual
    distance = np.nan_to_num(np.abs(now - usual) / (spread + MOVED_SHARE * np.abs(usual) + 1e-9))[len(shown) :]
    order = [int(i) for i in np.argsort(-distance, kind="stable") if distance[i] > MOVED_DEVIATIONS]
    moved = [names[i] for i in order if names[i] not in rule.metrics][:MOST_MOVED]
    figures = dict(zip((*shown, *names), zip(usual.tolist(), now.tolist(), strict=True), strict=True))
    texts = [_figure(name, *figures[name]) for name in (*shown, *moved) if name != NONFINITE]
    episode.metric = lost[0] if lost and rule.metrics[0] == NONFINITE else rule.metrics[0]
    episode.moved_with = tuple(moved)
    episode.evidence = ", ".join([*(f"{name} is not finite" for name in lost), *texts])


def _figure(name: str, before: float, now: float) -> str:
    return f"{name} {now:.4g}" if np.isnan(before) else f"{name} {before:.4g} → {now:.4g}"


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


def _joined(tail: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the new columns with the tail's rows before them; a column that either lacks is NaN there."""
    if not tail:
        return dict(new)
    old_rows, new_rows = len(tail["step"]), len(new["step"])

    def both(name: str) -> np.ndarray:
        old = tail[name] if name in tail else np.full(old_rows, np.nan)
        return np.concatenate([old, new[name] if name in new else np.full(new_rows, np.nan)])

    return {name: both(name) for name in dict.fromkeys((*tail, *new))}


def nonfinite_alert(step: int, name: str, thresholds: Thresholds) -> Alert:
    """Return the alert of a step that a trainer gave up because ``name`` was not finite, and did not log."""
    rule = next(rule for rule in RULES if rule.name == "nonfinite")
    return Alert(
        name=rule.name,
        severity=_severity(thresholds[rule.name]),
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
    return [
        Alert(
            name=rule.name,
            severity=_severity(thresholds[rule.name]),
            metric=rule.metrics[0],
            first_step=10,
            raised_step=12,
            step=20,
            value=2.0,
            threshold=1.0,
            moved_with=("reward_mean", "entropy"),
            cause=rule.cause,
            remedy=rule.remedy,
            evidence=f"synthetic: {rule.metrics[0]} 0.5 → 2",
            synthetic=True,
        )
        for rule in (*RULES, STALLED)
    ]
