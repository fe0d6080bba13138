"""How the rules of the alerts judge rows: pure functions of columns. The rules themselves are in ``rules``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from rlhf_core.alerting.series import HEAD, Series

Settings = Mapping[str, float | str]
"""A rule's table of ``alerts.toml``."""


@dataclass(frozen=True)
class Verdict:
    """What a rule says of each row: bad where ``sign · (value − limit) > 0``."""

    value: np.ndarray
    limit: np.ndarray
    """In the unit of the value; NaN where the row is not judged."""
    sign: int = 1
    """1 when too large is bad, −1 when too small is."""
    unit: np.ndarray | None = None
    """What the settings' numbers are multiples of; None for 1."""

    @property
    def bad(self) -> np.ndarray:
        """[N] bool."""
        return self.sign * (self.value - self.limit) > 0

    def since(self, row: int) -> "Verdict":
        """Return the verdict on the rows from ``row`` on."""
        unit = None if self.unit is None else self.unit[row:]
        return Verdict(self.value[row:], self.limit[row:], self.sign, unit)

    def where_finite(self) -> "Verdict":
        """Return the verdict without the rows whose value or limit lies beyond the largest number: NaN, not judged."""
        value, limit = (np.where(np.isfinite(figure), figure, np.nan) for figure in (self.value, self.limit))
        return Verdict(value, limit, self.sign, self.unit)

    def beyond(self, threshold: float) -> np.ndarray:
        """[N] bool: beyond another threshold of the same kind."""
        unit = 1.0 if self.unit is None else self.unit
        return self.sign * (self.value - unit * threshold) > 0


Judge = Callable[[Series, Settings], Verdict]


def number(settings: Settings, name: str) -> float:
    """Return a setting as a number."""
    return float(settings[name])


def above(metric: str) -> Judge:
    """Return a judge: the metric may not exceed ``threshold``."""

    def judge(series: Series, settings: Settings) -> Verdict:
        return Verdict(series[metric], np.full(len(series), number(settings, "threshold")))

    return judge


def below(metric: str) -> Judge:
    """Return a judge: the metric may not fall under ``threshold``."""

    def judge(series: Series, settings: Settings) -> Verdict:
        return Verdict(series[metric], np.full(len(series), number(settings, "threshold")), sign=-1)

    return judge


def jump(metric: str) -> Judge:
    """Return a judge: no more than ``threshold`` times the median of earlier rows, and ``deviations`` spreads above."""

    def judge(series: Series, settings: Settings) -> Verdict:
        median, spread = series.baseline(metric)
        limit = np.maximum(median * number(settings, "threshold"), median + number(settings, "deviations") * spread)
        return Verdict(series[metric], limit, unit=median)

    return judge


def drop(metric: str) -> Judge:
    """Return a judge: at least ``threshold`` times the median of earlier rows."""

    def judge(series: Series, settings: Settings) -> Verdict:
        median, _ = series.baseline(metric)
        return Verdict(series[metric], median * number(settings, "threshold"), sign=-1, unit=median)

    return judge


def lost(metric: str) -> Judge:
    """Return a judge: at least ``threshold`` times what the run began with, and ``least``."""

    def judge(series: Series, settings: Settings) -> Verdict:
        beginning = series.beginning(metric)
        limit = np.fmax(beginning * number(settings, "threshold"), number(settings, "least"))
        return Verdict(series[metric], limit, sign=-1, unit=beginning)

    return judge


def grown(metric: str) -> Judge:
    """Return a judge: at most ``threshold`` times what the run began with, and ``slack`` more."""

    def judge(series: Series, settings: Settings) -> Verdict:
        beginning = series.beginning(metric)
        return Verdict(series[metric], beginning * number(settings, "threshold") + number(settings, "slack"))

    return judge


def noise(series: Series, metric: str, rows: int) -> np.ndarray:
    """Return [N] the standard error of a median of ``rows`` less what the run began with."""
    _, spread = series.baseline(metric)
    return spread * np.sqrt(np.pi / 2 * (1 / rows + 1 / HEAD))


RECENT = 8
"""Rows that say where a noisy metric is now."""


def reward_falling(series: Series, settings: Settings) -> Verdict:
    """At most ``deviations`` standard errors under what the run began with, or has had lately if that is more."""
    now = series.recent("reward_mean", RECENT)
    median, _ = series.baseline("reward_mean")
    before = np.fmax(series.beginning("reward_mean"), median)
    return Verdict(now, before - number(settings, "deviations") * noise(series, "reward_mean", RECENT), sign=-1)


def reward_flat(series: Series, settings: Settings) -> Verdict:
    """At least ``deviations`` standard errors above what the run began with."""
    now, start = series.recent("reward_mean", RECENT), series.beginning("reward_mean")
    return Verdict(now, start + number(settings, "deviations") * noise(series, "reward_mean", RECENT), sign=-1)


def reward_is_up(series: Series, deviations: float) -> np.ndarray:
    """Return [N] whether the reward has risen from what the run began with by more than noise."""
    now, start = series.recent("reward_mean", RECENT), series.beginning("reward_mean")
    return now > start + deviations * noise(series, "reward_mean", RECENT)


def up_with_length(series: Series, settings: Settings) -> Verdict:
    """While the reward is up, lengths stay under ``threshold`` times what the run began with."""
    start = series.beginning("response_length_mean")
    up = reward_is_up(series, number(settings, "deviations"))
    limit = np.where(up, start * number(settings, "threshold"), np.nan)
    return Verdict(series.recent("response_length_mean", 3), limit, unit=start)


def up_with_kl(series: Series, settings: Settings) -> Verdict:
    """While the reward is up, the KL per token stays under ``threshold``."""
    up = reward_is_up(series, number(settings, "deviations"))
    return Verdict(series.recent("kl_per_token", 3), np.where(up, number(settings, "threshold"), np.nan))


def pays_for_length(series: Series, settings: Settings) -> Verdict:
    """The median correlation of recent rows stays under ``threshold``, unless batches are too small to tell."""
    rows = 5
    sequences = series["response_tokens"] / np.maximum(series["response_length_mean"], 1e-9)
    fisher = np.arctanh(np.clip(series["reward_length_corr"], -0.999, 0.999)) * np.sqrt(np.maximum(sequences - 3, 0))
    certain = series.recent_mean(fisher, rows) * np.sqrt(rows) > number(settings, "deviations")
    now = series.recent("reward_length_corr", rows)
    return Verdict(now, np.where(certain, number(settings, "threshold"), np.nan))


def reward_variance_gone(series: Series, settings: Settings) -> Verdict:
    """At least ``threshold`` of the squared mean, or of what the run began with."""
    start = np.nan_to_num(series.beginning("reward_var"))
    scale = np.maximum(series["reward_mean"] ** 2, start)
    return Verdict(series["reward_var"], np.maximum(number(settings, "threshold") * scale, 1e-14), sign=-1)


def mismatch(series: Series, settings: Settings) -> Verdict:
    """At most ``threshold``, and ``times`` the median of earlier rows where that is less."""
    median, _ = series.baseline("rollout_logprob_diff")
    own = np.maximum(median * number(settings, "times"), number(settings, "least"))
    return Verdict(series["rollout_logprob_diff"], np.fmin(own, number(settings, "threshold")))


def controller(series: Series, settings: Settings) -> Verdict:
    """The targets that the last 4 changes of the KL coefficient imply differ by at most ``threshold`` of their mean.

    A coefficient that grows says kl > target, so target = kl − |kl − target|; one that falls says target = kl +
    |kl − target|. A controller that steers the right way implies its one target each time, exactly.
    """
    rows = 4
    change = np.diff(series["kl_coef"])
    implied = series["kl"][:-1] - np.sign(change) * series["kl_target_error"][:-1]
    # A log has 8 decimals: of a smaller change they do not tell the sign. Between rows with a gap there are several.
    told = (np.abs(change) > 1e-7) & (np.diff(series["step"]) == 1)
    targets = np.concatenate([np.full(rows, np.nan), np.where(told, implied, np.nan)])
    windows = sliding_window_view(targets, rows)
    least = np.where(np.isnan(windows), np.inf, windows).min(axis=1)
    most = np.where(np.isnan(windows), -np.inf, windows).max(axis=1)
    some = most >= least
    least, most = np.where(some, least, 1.0), np.where(some, most, 1.0)
    spread = (most - least) / np.maximum(np.abs(least + most) / 2, 1e-3)
    return Verdict(spread, np.full(len(series), number(settings, "threshold")))


COLLAPSED = 0.05
"""Nats a token. Below, every draw but a rare one is a little likelier than the mean: z is no longer normal."""


def not_drawn_from_the_policy(series: Series, settings: Settings) -> Verdict:
    """The z of the last 4, and of the last 8 rows together stays within ``threshold``, unless the policy has collapsed.

    Σ z / √rows is standard normal too (Stouffer): few rows show a large bias soon, many a small one at all.
    """
    tells = series["entropy"] > COLLAPSED
    z = np.where(tells, series["sampling_z"], 0.0)
    pooled = [np.abs(series.recent_mean(z, rows)) * np.sqrt(rows) for rows in (4, 8)]
    return Verdict(np.fmax(*pooled), np.where(tells, number(settings, "threshold"), np.nan))


def kl_blow_up(series: Series, settings: Settings) -> Verdict:
    """At most ``threshold`` nats a token."""
    return Verdict(series["kl_per_token"], np.full(len(series), number(settings, "threshold")))


def kl_jump(series: Series, settings: Settings) -> Verdict:
    """As a jump, and no less than ``least``: a KL that starts at 0 has to grow."""
    verdict = jump("kl")(series, settings)
    return Verdict(verdict.value, np.maximum(verdict.limit, number(settings, "least")), unit=verdict.unit)


def kl_collapse(series: Series, settings: Settings) -> Verdict:
    """At least ``threshold`` times the median of earlier rows where that was above ``least``; never 0."""
    median, _ = series.baseline("kl_per_token")
    own = np.where(median > number(settings, "least"), median * number(settings, "threshold"), 0.0)
    return Verdict(np.abs(series.recent("kl_per_token", 2)), np.fmax(own, number(settings, "zero")), sign=-1)


def policy_frozen(series: Series, settings: Settings) -> Verdict:
    """At least ``threshold``, once updates have moved the policy: one that updates once a rollout shows 0 always."""
    median, _ = series.baseline("approx_kl")
    moved = np.fmax(median, series.largest_at_first("approx_kl")) > number(settings, "least")
    limit = np.where(moved, number(settings, "threshold"), np.nan)
    # Other trainers log the mean of −log ratio as theirs, which has either sign.
    return Verdict(np.abs(series["approx_kl"]), limit, sign=-1)


def value_bias(series: Series, settings: Settings) -> Verdict:
    """The share of the values' squared error that is one constant offset stays under ``threshold``."""
    offset = (series["return_mean"] - series["value_mean"]) ** 2
    share = offset / np.maximum(offset + series["adv_var"], 1e-30)
    return Verdict(series.recent_mean(share, 3), np.full(len(series), number(settings, "threshold")))


def recent_below(metric: str, rows: int) -> Judge:
    """Return a judge: the median of the last rows may not fall under ``threshold``."""

    def judge(series: Series, settings: Settings) -> Verdict:
        return Verdict(series.recent(metric, rows), np.full(len(series), number(settings, "threshold")), sign=-1)

    return judge
