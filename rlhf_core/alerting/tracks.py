"""A rule's way through a log: where its bad stretches begin and end, and what moved when they began."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from rlhf_core.alerting.alert import SEVERITIES, Alert, severity_of
from rlhf_core.alerting.judges import Settings, Verdict, number
from rlhf_core.alerting.rules import Rule
from rlhf_core.alerting.series import CONTEXT, DERIVED, HEAD, MAD_TO_STD, NONFINITE, Series, median_by_row, run_lengths

MOVED_DEVIATIONS = 5.0
"""How far, in spreads of the steps before, a metric has moved when it is named beside an alert."""
MOVED_SHARE = 0.05
"""Added to the spread, as a share of the metric: one that never varied has not moved by a rounding."""
MOST_MOVED = 5
MOST_EPISODES = 5
"""Alerts of one rule that are kept: the first, and the latest."""


@dataclass
class Episode:
    """A stretch of bad steps."""

    first_step: int
    raised_step: int
    step: int
    value: float
    limit: float
    sign: int
    level: int
    """Index of its worst severity."""
    rows_before: int
    """Rows that the rule had judged when it was raised."""
    good_rows: int = 0
    standing: bool = True
    lost: list[str] = field(default_factory=list)
    """Metrics that were not finite, the first that was not first."""
    moved: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    """Of the rule's metrics and of those that moved, before and when it was raised."""


@dataclass
class Track:
    """One rule's way through a log."""

    rule: Rule
    settings: Settings
    tail: dict[str, np.ndarray] = field(default_factory=dict)
    head: dict[str, np.ndarray] = field(default_factory=dict)
    rows: int = 0
    streak: int = 0
    streak_step: int = 0
    episodes: list[Episode] = field(default_factory=list)

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
        verdict = self.rule.judge(series, self.settings).since(known).where_finite()
        bad = verdict.bad & (series.rows[known:] >= number(self.settings, "warm_up"))
        raised = self._follow(new["step"], bad, verdict, _levels(verdict, self.settings))
        self.tail = {name: column[-CONTEXT:] for name, column in series.columns.items()}
        self.rows += count
        kept = [episode for episode in raised if any(episode is one for one in self.episodes)]
        for episode in kept:
            _explain(self.rule, episode, recent, self._beginning(episode))
        if self._counts_lost:
            for episode in self.episodes:
                _lose(episode, steps, block)
        return [self._alert(episode) for episode in kept]

    @property
    def _counts_lost(self) -> bool:
        """Whether the rule counts values that are not finite: its numbers are those of no metric."""
        return self.rule.metrics[0] == NONFINITE

    def _beginning(self, episode: Episode) -> dict[str, float]:
        """Return what the rule's metrics began with, once that was known."""
        known = episode.rows_before >= HEAD
        return {name: float(np.median(head)) for name, head in self.head.items()} if known else {}

    def _series(self, new: Mapping[str, np.ndarray]) -> Series:
        for name in self.rule.metrics:
            head = self.head.get(name, np.empty(0))
            self.head[name] = np.concatenate([head, new[name][: HEAD - len(head)]])
        columns = joined(self.tail, new)
        return Series(columns, self.rows - (len(columns["step"]) - len(new["step"])), self.head)

    def _follow(self, steps: np.ndarray, bad: np.ndarray, verdict: Verdict, levels: np.ndarray) -> list[Episode]:
        """Walk from the start of one episode to its end to the start of the next; return those that began here."""
        raised: list[Episode] = []
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
            level, before = int(levels[at]), self.rows + at
            raised.append(Episode(first, step, step, value, limit, verdict.sign, level, before))
            self.episodes.append(raised[-1])
            del self.episodes[1 : -MOST_EPISODES + 1]
            at += 1
        if 0 < lengths[-1] <= len(steps):
            self.streak_step = int(steps[len(steps) - int(lengths[-1])])
        self.streak = int(lengths[-1])
        return raised

    def _to_the_end(self, episode: Episode, at: int, steps: np.ndarray, verdict: Verdict, levels: np.ndarray) -> int:
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

    def _alert(self, episode: Episode) -> Alert:
        lost = [f"{name} is not finite" for name in episode.lost]
        return Alert(
            name=self.rule.name,
            severity=SEVERITIES[episode.level],
            metric=episode.lost[0] if self._counts_lost and episode.lost else self.rule.metrics[0],
            first_step=episode.first_step,
            raised_step=episode.raised_step,
            step=episode.step,
            value=None if self._counts_lost else episode.value,
            threshold=None if self._counts_lost else episode.limit,
            moved_with=tuple(episode.lost[1:]) if self._counts_lost else episode.moved,
            cause=self.rule.cause,
            remedy=self.rule.remedy,
            evidence=", ".join([*lost, *episode.figures]),
            standing=episode.standing,
        )


def _levels(verdict: Verdict, settings: Settings) -> np.ndarray:
    """Return [N] the index of each row's severity, were it bad."""
    levels = np.full(len(verdict.value), SEVERITIES.index(severity_of(settings)))
    for index, name in enumerate(SEVERITIES):
        if name in settings:
            levels[verdict.beyond(number(settings, name)) & (levels < index)] = index
    return levels


def _explain(rule: Rule, episode: Episode, recent: Mapping[str, np.ndarray], beginning: Mapping[str, float]) -> None:
    """Find which metrics moved when an episode was raised, and write its figures in a line."""
    names = [name for name in recent if name != "step" and name not in DERIVED]
    until = int(np.flatnonzero(recent["step"] == episode.raised_step)[-1]) + 1
    began = np.flatnonzero(recent["step"][:until] == episode.first_step)
    since = int(began[-1]) if len(began) else 0
    shown = [name for name in rule.metrics if name in recent]
    matrix = np.stack([recent[name] for name in (*shown, *names)])
    episode.lost = [name for name in names if np.isinf(recent[name][since:until]).any()]
    matrix[~np.isfinite(matrix)] = np.nan
    before, now = matrix[:, max(0, since - CONTEXT) : since], median_by_row(matrix[:, since:until], 1)
    usual = median_by_row(before, 3) if since else np.full(len(matrix), np.nan)
    spread = MAD_TO_STD * median_by_row(np.abs(before - usual[:, None]), 3) if since else usual
    distance = np.nan_to_num(np.abs(now - usual) / (spread + MOVED_SHARE * np.abs(usual) + 1e-9))[len(shown) :]
    order = [int(i) for i in np.argsort(-distance, kind="stable") if distance[i] > MOVED_DEVIATIONS]
    moved = [names[i] for i in order if names[i] not in rule.metrics][:MOST_MOVED]
    figures = dict(zip((*shown, *names), zip(usual.tolist(), now.tolist(), strict=True), strict=True))
    episode.moved = tuple(moved)
    named = [name for name in (*shown, *moved) if name != NONFINITE]
    episode.figures = tuple(_figure(name, *figures[name], beginning.get(name)) for name in named)


def _lose(episode: Episode, steps: np.ndarray, block: Mapping[str, np.ndarray]) -> None:
    """Add the metrics of a block that were not finite during an episode and have not been named."""
    inside = (steps >= episode.first_step) & (steps <= episode.step)
    if not inside.any():
        return
    unnamed = [name for name in block if name != "step" and name not in DERIVED and name not in episode.lost]
    lost = {name: np.flatnonzero(inside & np.isinf(block[name])) for name in unnamed}
    episode.lost += sorted((name for name in unnamed if len(lost[name])), key=lambda name: int(lost[name][0]))


def _figure(name: str, before: float, now: float, beginning: float | None) -> str:
    """Return a metric's values in a few words: what moved slowly is set against what the run began with."""
    was, shown = f"{before:.4g}", f"{now:.4g}"
    if was == shown and beginning is not None and f"{beginning:.4g}" != shown:
        return f"{name} {shown}, {beginning:.4g} at the beginning"
    return f"{name} {shown}" if np.isnan(before) else f"{name} {was} → {shown}"


def joined(tail: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the new columns with the tail's rows before them; a column that either lacks is NaN there."""
    if not tail:
        return dict(new)
    old_rows, new_rows = len(tail["step"]), len(new["step"])

    def both(name: str) -> np.ndarray:
        old = tail[name] if name in tail else np.full(old_rows, np.nan)
        return np.concatenate([old, new[name] if name in new else np.full(new_rows, np.nan)])

    return {name: both(name) for name in dict.fromkeys((*tail, *new))}
