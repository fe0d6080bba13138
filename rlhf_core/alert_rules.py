"""The rules of the alerts: one table of what each looks for, and pure functions of columns that look for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from rlhf_core.alert_series import Series

Settings = Mapping[str, float | str]
"""A rule's table of ``alerts.toml``."""

NONFINITE = "nonfinite"
STEP_ADVANCE = "step_advance"
"""Columns that the monitor derives: non-finite values of a row, and its step less the one before."""


@dataclass(frozen=True)
class Verdict:
    """What a rule says of each row: bad where ``sign · (value − limit) > 0``."""

    value: np.ndarray
    limit: np.ndarray
    """In the unit of the value; NaN where the row is not judged."""
    sign: int = 1
    """1 when too large is bad, −1 when too small is."""

    @property
    def bad(self) -> np.ndarray:
        """[N] bool."""
        return self.sign * (self.value - self.limit) > 0


@dataclass(frozen=True)
class Rule:
    """One thing that can go wrong."""

    name: str
    question: str
    """The question of a reader that it answers."""
    text: str
    """What it looks for, in a sentence."""
    metrics: tuple[str, ...]
    """What it needs; the first is the metric that it speaks of. A log without one of them is not checked by it."""
    judge: Callable[[Series, Settings], Verdict]
    cause: str
    remedy: str


LEARNING = "Is it learning?"
STABLE = "Is it stable?"
CLOSE = "Is the policy still close?"
FAST = "Is it fast?"
EXACT = "Is it computing what it should?"


def above(metric: str) -> Callable[[Series, Settings], Verdict]:
    """Return a judge: the metric may not exceed ``threshold``."""

    def judge(series: Series, settings: Settings) -> Verdict:
        return Verdict(series[metric], constant(series, metric, settings["threshold"]))

    return judge


def below(metric: str) -> Callable[[Series, Settings], Verdict]:
    """Return a judge: the metric may not fall under ``threshold``."""

    def judge(series: Series, settings: Settings) -> Verdict:
        return Verdict(series[metric], constant(series, metric, settings["threshold"]), sign=-1)

    return judge


def constant(series: Series, metric: str, value: float | str) -> np.ndarray:
    """Return [N] the same limit for every row."""
    return np.full(len(series[metric]), float(value))


def grad_norm_spike(series: Series, settings: Settings) -> Verdict:
    """``threshold`` times the median of earlier rows, and ``deviations`` of their spread above it."""
    median, spread = series.baseline("grad_norm")
    limit = np.maximum(median * float(settings["threshold"]), median + float(settings["deviations"]) * spread)
    return Verdict(series["grad_norm"], limit)


def throughput_drop(series: Series, settings: Settings) -> Verdict:
    """``threshold`` times the median of earlier rows."""
    median, _ = series.baseline("tokens_per_second")
    return Verdict(series["tokens_per_second"], median * float(settings["threshold"]), sign=-1)


RULES = (
    Rule(
        "nonfinite", STABLE, "A logged value is NaN or infinite.", (NONFINITE,), above(NONFINITE),
        "An overflow: too high a learning rate, a reward that is not finite, or a division by nothing.",
        "Go back to the last checkpoint, lower the learning rate, and look at the rewards of that step.",
    ),
    Rule(
        "grad_norm_spike", STABLE, "The gradient norm is many times that of the steps before.", ("grad_norm",),
        grad_norm_spike,
        "A batch unlike the others, a loss term on another scale, or the start of a divergence.",
        "Look at that step's completions and rewards; clip gradients, or lower the learning rate.",
    ),
    Rule(
        "clip_frac_high", STABLE, "The ratio leaves the clip range on a large share of tokens.", ("clip_frac",),
        above("clip_frac"),
        "Updates too large for one rollout: learning rate, epochs or minibatches too many.",
        "Lower the learning rate, or do fewer epochs on each rollout.",
    ),
    Rule(
        "kl_blow_up", CLOSE, "The policy runs away from its reference.", ("kl_k3",), above("kl_k3"),
        "The KL penalty is too weak for the learning rate, or the reward is being exploited.",
        "Raise kl_coef or lower kl_target, lower the learning rate; read the completions.",
    ),
    Rule(
        "ratio_off_one", EXACT, "Before any update the policy's probabilities are not those of the rollout.",
        ("ratio_max_dev_first",), above("ratio_max_dev_first"),
        "Dropout left on, stale rollouts, another temperature, or other weights in the old log-probs.",
        "Call eval() on the policy, and take old log-probs from the same forward pass as the update.",
    ),
    Rule(
        "reward_variance_gone", LEARNING, "All completions of a step get the same reward.", ("reward_var",),
        below("reward_var"),
        "A constant reward, a reward that cannot tell completions apart, or a policy that writes one thing.",
        "Score a good and a bad completion by hand; check that the reward reads the completion.",
    ),
    Rule(
        "throughput_drop", FAST, "Tokens per second fall far below those of the steps before.", ("tokens_per_second",),
        throughput_drop,
        "Another process on the machine, memory that is swapped out, or longer responses.",
        "Look at the step's stages in timings.jsonl, and at what else runs on the machine.",
    ),
)  # fmt: skip

BY_NAME = {rule.name: rule for rule in RULES}

STALLED = Rule(
    "stalled", FAST, "No new step for far longer than a step takes.", ("age_of_last_row_s",),
    above("age_of_last_row_s"),
    "The process died, waits for something, or the machine sleeps.",
    "Look whether the process lives and what it printed last; continue with --resume.",
)  # fmt: skip
"""The one rule that needs the present time; the caller measures it."""
