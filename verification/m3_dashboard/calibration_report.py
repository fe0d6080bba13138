"""The calibration as a document: confusion table, false alarms, and how near healthy runs came to each threshold."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from calibration_faults import FAULTS
from calibration_runs import CONFIGURATIONS, LATE, STEPS, WITHIN, Result, alerts_of, columns

from rlhf_core.alerting.rules import RULES, Rule
from rlhf_core.alerting.series import Series, derive
from rlhf_core.alerting.thresholds import default_thresholds
from rlhf_core.alerts import Alert

INTRODUCTION = """\
# Calibration of the alerts

Written by `pytest verification/m3_dashboard/test_calibration.py -m slow`; do not edit. The runs are real: the trainer's
own code on the embedded task, tiny models that learn within {steps} steps, {configurations} configurations. A healthy
run may raise nothing above `info`. A fault is planted into the trainer's functions, at step 1 or at step {late}, and
has to raise one of its right alerts within {within} steps. Thresholds: `rlhf_core/alerts.toml` (fingerprint
`{fingerprint}`).
"""

LIMITS = """\
## What no alert here can see

- **A reward that means something else.** A reward that is reversed or drawn at random is learned, or not learned,
  as any other. `reward_flat` (info) says after 40 steps that nothing was learned; whether what is learned is what was
  meant, only completions and a judge that PPO never sees can tell.
- **Gradients clipped too much or not at all**, optimizer settings, data that repeat: they change how fast a run learns,
  and not what is right.
- **What happens after the first minibatch**: clipping left out, an optimizer that forgets. The exact rules look at
  the first gradient of a step. `rlhf check-metrics` computes whole updates again, in float64 and from the weights and
  moments of a checkpoint, and names the first metric that comes out otherwise.
- The exact rules (`gradient_off_closed_form`, `targets_off_definition`, `tokens_after_end`, `not_drawn_from_policy`,
  `value_dominates`) need metrics that only this trainer logs. On the logs of others the same faults show later, through
  what they do to KL, entropy, reward and lengths.
- Thresholds on noisy curves were set on tiny models. Not calibrated here are `throughput_drop`, `memory_growth` and
  `stalled`, which look at time and memory, and `groups_without_signal`, as no configuration draws groups.
"""


def fingerprint() -> str:
    """Return a short hash of rules and thresholds: a document with another one is out of date."""
    text = json.dumps([default_thresholds(), [rule.name for rule in RULES], sorted(FAULTS)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def document(healthy: Mapping[str, Sequence[Result]], faulty: Mapping[tuple[str, str, int], Result]) -> str:
    """Return the whole document.

    Args:
        healthy: the healthy runs of each configuration.
        faulty: the run of each (fault, configuration, first step of the fault).
    """
    head = INTRODUCTION.format(
        steps=STEPS, configurations=len(CONFIGURATIONS), late=LATE, within=WITHIN, fingerprint=fingerprint()
    )
    parts = [head, healthy_table(healthy), *fault_tables(faulty), nearest_table(healthy), LIMITS]
    return "\n".join(parts)


def healthy_table(healthy: Mapping[str, Sequence[Result]]) -> str:
    """Return the false alarms by configuration, and how far the reward rose."""
    lines = [
        "## Healthy runs\n",
        "| configuration | runs | reward, first and last 5 steps | runs with an alert above info | info |",
        "|---|---|---|---|---|",
    ]
    for name, results in healthy.items():
        rewards = [[row["reward_mean"] for row in result.rows] for result in results]
        first, last = (np.mean([one[part] for one in rewards]) for part in (slice(5), slice(-5, None)))
        alarms = [[alert for alert in alerts_of(result) if alert.severity != "info"] for result in results]
        info = Counter(alert.name for result in results for alert in alerts_of(result) if alert.severity == "info")
        shown = ", ".join(f"`{rule}` in {count}" for rule, count in sorted(info.items())) or "none"
        lines.append(f"| {name} | {len(results)} | {first:+.2f} → {last:+.2f} | {sum(map(bool, alarms))} | {shown} |")
    return "\n".join(lines) + "\n"


def fault_tables(faulty: Mapping[tuple[str, str, int], Result]) -> list[str]:
    """Return the confusion tables: the faults that were asked for, and their neighbours."""
    tables = []
    for title, asked in (("## Faults", True), ("## Their neighbours", False)):
        lines = [
            f"{title}\n",
            "| fault | seen | right alert, steps after the fault | other alerts, in how many runs |",
            "|---|---|---|---|",
        ]
        lines += [_fault_row(name, faulty) for name, fault in FAULTS.items() if fault.asked == asked]
        tables.append("\n".join(lines) + "\n")
    return tables


def _fault_row(name: str, faulty: Mapping[tuple[str, str, int], Result]) -> str:
    fault, delays, others = FAULTS[name], dict[str, list[int]](), Counter[str]()
    results = [(begins, result) for (one, _, begins), result in faulty.items() if one == name]
    seen = 0
    for begins, result in results:
        first = {alert.name: alert.raised_step - begins for alert in _latest_first(result)}
        right = {rule: delay for rule, delay in first.items() if rule in fault.expected and 0 <= delay <= WITHIN}
        seen += bool(right)
        for rule, delay in right.items():
            delays.setdefault(rule, []).append(delay)
        others.update(rule for rule in first if rule not in fault.expected)
    shown = ", ".join(f"`{rule}` {_range(delays[rule])}" for rule in fault.expected if rule in delays)
    rest = ", ".join(f"`{rule}` {count}" for rule, count in others.most_common())
    return f"| {fault.title} | {seen} of {len(results)} | {shown or '**none**'} | {rest or 'none'} |"


def _latest_first(result: Result) -> list[Alert]:
    return sorted(alerts_of(result), key=lambda alert: alert.raised_step, reverse=True)


def _range(delays: Sequence[int]) -> str:
    low, high = min(delays), max(delays)
    return f"+{low}" if low == high else f"+{low} to +{high}"


def nearest_table(healthy: Mapping[str, Sequence[Result]]) -> str:
    """Return, for each rule, the healthy row that came nearest to its threshold."""
    lines = [
        "## How near healthy runs came\n",
        "The row of all healthy runs that came nearest to each threshold. A rule also asks for several bad rows in a "
        "row (`steps`), so a nearest value beyond its limit need not be an alert. *Not logged*: these runs do not log "
        "all metrics that the rule needs. *Not judged*: no row met what the rule asks before it judges, such as its "
        "warm-up.\n",
        "| rule | severity | looks for | nearest healthy value | limit there | steps |",
        "|---|---|---|---|---|---|",
    ]
    results = [result for runs in healthy.values() for result in runs]
    for rule in RULES:
        settings = default_thresholds()[rule.name]
        severity = settings["severity"] + (", then critical" if "critical" in settings else "")
        near = [found for result in results if (found := _nearest(rule, result)) is not None]
        value, limit = min(near)[1:] if near else (None, None)
        why_not = "not judged" if any(_logged(rule, result) for result in results) else "not logged"
        shown = f"{value:.4g} | {limit:.4g}" if near else f"{why_not} | "
        lines.append(f"| `{rule.name}` | {severity} | {rule.text} | {shown} | {settings['steps']} |")
    return "\n".join(lines) + "\n"


def _block(result: Result) -> dict[str, np.ndarray]:
    """Return the columns of a run, and those that rules derive from them."""
    block = columns(result.rows)
    return block | derive(block, {name: np.ones(len(block["step"]), dtype=bool) for name in block}, 0.0)


def _logged(rule: Rule, result: Result) -> bool:
    """Return whether a run has the metrics that a rule needs."""
    block = _block(result)
    return all(name in block and np.isfinite(block[name]).any() for name in rule.metrics)


def _nearest(rule: Rule, result: Result) -> tuple[float, float, float] | None:
    """Return (distance in shares of the limit, value, limit) of a run's nearest judged row."""
    if not _logged(rule, result):
        return None
    block = _block(result)
    needed = {name: block[name] for name in (*rule.metrics, "step")}
    settings = default_thresholds()[rule.name]
    series = Series(needed, 0, {name: column[:5] for name, column in needed.items()})
    verdict = rule.judge(series, settings)
    judged = np.isfinite(verdict.limit) & np.isfinite(verdict.value) & (series.rows >= float(settings["warm_up"]))
    if not judged.any():
        return None
    value, limit = verdict.value[judged], verdict.limit[judged]
    distance = verdict.sign * (limit - value) / np.maximum(np.abs(limit), 1e-12)
    at = int(np.argmin(distance))
    return float(distance[at]), float(value[at]), float(limit[at])
