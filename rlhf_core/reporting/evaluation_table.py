"""The result of a run: before against after, as JSON and as tables on the terminal."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich import box
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

CHECKS = {
    "reward_rose": "every judge's change lies above 0 with its whole interval",
    "kl_in_range": f"the KL lies between {KL_RANGE[0]:g} and {KL_RANGE[1]:g} nats a sequence",
    "entropy_kept": f"at least {ENTROPY_KEPT:.0%} of the entropy is left",
    "bigrams_kept": f"at least {BIGRAMS_KEPT:.0%} of the distinct bigrams are left",
}


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
    """Print the summary, what it says of health, and completions before and after."""
    table = Table(title=f"{summary['prompts']} held-out prompts: mean, and its 95% interval", box=box.SIMPLE_HEAD)
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, reward in summary["rewards"].items():
        table.add_row(name, *(_shown(reward[key]) for key in ("before", "after", "change")))
    table.add_row("KL to reference, nats", "0", _shown(summary["kl"]))
    for key, title in (
        ("entropy", "entropy, nats/token"),
        ("distinct_bigrams", "distinct bigrams"),
        ("distinct_completions", "distinct completions"),
        ("eos_rate", "ended with EOS"),
    ):
        before, after = summary[key]["before"], summary[key]["after"]
        table.add_row(title, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    console.print(table)
    for name, text in CHECKS.items():
        holds = summary["checks"][name]
        console.print(Text(f"  {'yes' if holds else 'NO '}  {text}", style="green" if holds else "bold red"))
    examples = Table(title="completions of the same prompts, same random numbers", box=box.SIMPLE_HEAD, show_lines=True)
    for column in ("prompt", "before", "after"):
        examples.add_column(column, overflow="fold")
    for row in pairs:
        examples.add_row(*(Text(printable(text)) for text in row))
    console.print(examples)


def _shown(interval: dict[str, float]) -> str:
    return f"{interval['mean']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"
