"""The result of a run: before against after, as JSON and as tables on the terminal."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from rlhf_core.evaluation import Evaluation, Interval, bootstrap_mean
from rlhf_core.metrics import rounded
from rlhf_core.terminal import console, printable

KL_RANGE = (0.1, 30.0)
"""KL per sequence, in nats, within which a policy has moved and still writes the language of its reference."""
ENTROPY_KEPT = 0.2
"""Share of the reference's entropy per token that a policy keeps when it has not collapsed."""
BIGRAMS_KEPT = 0.5
"""Share of the reference's distinct bigrams that a policy keeps when it has not collapsed."""


def evaluation_summary(before: Evaluation, after: Evaluation, seed: int) -> dict[str, Any]:
    """Return the evaluation as JSON: means with 95% bootstrap intervals, and whether completions stayed language."""
    rewards = {
        name: {
            "before": _interval(before.rewards[name], seed),
            "after": _interval(after.rewards[name], seed),
            "change": _interval(after.rewards[name] - before.rewards[name], seed),
        }
        for name in before.rewards
    }
    kl = _interval(after.kl, seed)
    return {
        "prompts": len(after.kl),
        "rewards": rewards,
        "kl": kl,
        "entropy": _pair(before.entropy, after.entropy),
        "distinct_bigrams": _pair(before.distinct_bigrams, after.distinct_bigrams),
        "distinct_completions": _pair(before.distinct_completions, after.distinct_completions),
        "eos_rate": _pair(before.eos_rate, after.eos_rate),
        "checks": {
            "reward_rose": all(reward["change"]["low"] > 0 for reward in rewards.values()),
            "kl_in_range": KL_RANGE[0] <= kl["mean"] <= KL_RANGE[1],
            "entropy_kept": after.entropy >= ENTROPY_KEPT * before.entropy,
            "bigrams_kept": after.distinct_bigrams >= BIGRAMS_KEPT * before.distinct_bigrams,
        },
    }


def _interval(values: np.ndarray, seed: int) -> dict[str, float]:
    interval: Interval = bootstrap_mean(values, seed)
    return {name: rounded(value) for name, value in asdict(interval).items()}


def _pair(before: float, after: float) -> dict[str, float]:
    return {"before": rounded(before), "after": rounded(after)}


def print_evaluation(summary: dict[str, Any], pairs: Sequence[tuple[str, str, str]]) -> None:
    """Print the summary, and completions before and after."""
    table = Table(title=f"{summary['prompts']} held-out prompts, before and after PPO (mean, 95% interval)")
    for column in ("", "before", "after", "change", "check"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, reward in summary["rewards"].items():
        rose = reward["change"]["low"] > 0
        table.add_row(name, *(_shown(reward[key]) for key in ("before", "after", "change")), _mark(rose, "above 0"))
    checks = summary["checks"]
    low, high = KL_RANGE
    table.add_row(
        "KL to the reference, nats",
        "0",
        _shown(summary["kl"]),
        "",
        _mark(checks["kl_in_range"], f"{low:g} to {high:g}"),
    )
    for key, title, check, wanted in (
        ("entropy", "entropy, nats a token", "entropy_kept", f"at least {ENTROPY_KEPT:.0%} kept"),
        ("distinct_bigrams", "distinct bigrams", "bigrams_kept", f"at least {BIGRAMS_KEPT:.0%} kept"),
        ("distinct_completions", "distinct completions", None, ""),
        ("eos_rate", "ended with EOS", None, ""),
    ):
        values = summary[key]
        mark = _mark(checks[check], wanted) if check else ""
        table.add_row(
            title,
            f"{values['before']:.3f}",
            f"{values['after']:.3f}",
            f"{values['after'] - values['before']:+.3f}",
            mark,
        )
    console.print(table)
    examples = Table(title="completions of the same prompts", show_lines=True)
    for column in ("prompt", "before", "after"):
        examples.add_column(column, overflow="fold")
    for row in pairs:
        examples.add_row(*(Text(printable(text)) for text in row))
    console.print(examples)


def _shown(interval: dict[str, float]) -> str:
    return f"{interval['mean']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"


def _mark(holds: bool, wanted: str) -> str:
    return f"{'yes' if holds else 'NO'}, {wanted}" if holds else f"NO, want {wanted}"
