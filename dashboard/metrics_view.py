"""The first screen: is it healthy? Verdict, alerts, then the metrics by the question that they answer."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import streamlit as st

from dashboard import charts, kinds, questions, series
from dashboard.markup import labels, show, text, tile
from dashboard.series import Curve
from dashboard.state import Choice, go
from dashboard.store import Progress, Run, Store
from rlhf_core.alerting.alert import is_nonfinite
from rlhf_core.alerting.questions import METRICS_OF
from rlhf_core.alerting.rules import LEARNING
from rlhf_core.alerting.thresholds import default_thresholds
from rlhf_core.alerts import SEVERITIES, Alert, Severity, synthetic_alerts
from rlhf_core.terminal import printable

POINTS = 250
"""Points of a curve, each with its minimum and maximum: two pixels of a chart at most, and soon drawn."""
FIGURES = {
    "loss": "loss",
    "token_accuracy": "token accuracy",
    "accuracy": "accuracy",
    "reward_mean": "reward",
    "kl": "KL, nats",
    "entropy": "entropy, nats",
    "tokens_per_second": "tokens/s",
}
"""The figures of the verdict's line, of those that a log has."""
MOST_OPEN = 4
MOST_ALERTS = 30


def draw(runs: Store, choice: Choice, examples: bool) -> None:
    """Draw the view."""
    shown = {name: runs.run(name) for name in choice.runs if name in runs.names()}
    found = {name: run.alerts() for name, run in shown.items()}
    # Each part has a container of its own: what appears in one does not move the charts to another place of the page's
    # tree, where they would be drawn anew.
    for name, run in shown.items():
        verdict(name, run, found[name])
    with st.container(key="alerts"):
        if examples:
            draw_examples()
        for name, alerts in found.items():
            draw_alerts(alerts, name if len(shown) > 1 else "", name)
    draw_questions(shown, found, choice)


def draw_examples() -> None:
    """Show one made-up alert of each rule."""
    show("<b>Synthetic alerts</b>, one of each rule: no run has them (<code>?test_alerts=1</code>)")
    draw_alerts(synthetic_alerts(default_thresholds()), "", "synthetic")


def verdict(name: str, run: Run, alerts: Sequence[Alert]) -> None:
    """Draw the line that says whether a run is healthy, and how far it is."""
    progress = run.progress()
    words, colour = judgement(progress, alerts, judged=run.judged())
    tiles = [tile("run", name), tile(state(progress), steps_done(progress))]
    tiles += [tile(label, value) for label, value in figures(progress, run.latest())]
    with st.container(key=f"verdict_{_plain(name)}"):
        words = f'<b class="kit-verdict">{text(words)}</b>'
        show(f'<div class="kit-strip" style="--kit:{colour}">{words}{"".join(tiles)}</div>')
        notes(progress)
        if progress.last_step is not None and progress.read == 1:
            unjudged(run)


def judgement(progress: Progress, alerts: Sequence[Alert], *, judged: bool) -> tuple[str, str]:
    """Return what to say of a run, and in which colour; without a rule that fits, no alert does not mean healthy."""
    standing = Counter(alert.severity for alert in alerts if alert.standing)
    if progress.last_step is None:
        return "No step yet", charts.INFO
    if standing["critical"] or standing["warning"]:
        worst = "critical" if standing["critical"] else "warning"
        return counted(standing), charts.SEVERITY_COLOURS[worst]
    if progress.read < 1:
        return "Reading", charts.INFO
    return ("Healthy", charts.GOOD) if judged else ("Not judged", charts.INFO)


def counted(standing: Counter[Severity]) -> str:
    """Return how many critical alerts and warnings there are."""
    warnings = "warning" if standing["warning"] == 1 else "warnings"
    counts = {"critical": standing["critical"], warnings: standing["warning"]}
    return " and ".join(f"{count} {name}" for name, count in counts.items() if count)


def unjudged(run: Run) -> None:
    """Say which rules could not look, or that those for a training with PPO do not fit the run."""
    kind, missing = run.kind(), run.not_checked()
    asked = kinds.judged_questions(kind)
    if LEARNING not in asked:
        said = f"No rule judges how good a run of rlhf {kind} is. What is asked of it: {' '.join(asked)}"
        show(f'<small class="kit-dim">{text(said)}</small>')
    elif missing:
        lacking = sorted({metric for metrics in missing.values() for metric in metrics})
        names = ", ".join(rule.replace("_", " ") for rule in missing)
        show(
            f'<details class="kit-dim"><summary>{not_checked_in_words(len(missing))}</summary>'
            f"{text(names)}. The log has no {text(', '.join(lacking))}.</details>"
        )


def not_checked_in_words(rules: int) -> str:
    """Return how many rules could not look, and why."""
    if rules == 1:
        return "1 rule is not checked: the log lacks what it needs"
    return f"{rules} rules are not checked: the log lacks what they need"


def state(progress: Progress) -> str:
    """Return what a run is doing."""
    if progress.read < 1:
        return f"reading, {progress.read:.0%}"
    if progress.last_step is None:
        return "preparing"
    if progress.ended:
        return "finished"
    return "running" if progress.running else f"no new row for {questions.duration(progress.age_s)}"


def steps_done(progress: Progress) -> str:
    """Return the last step, of how many."""
    if progress.last_step is None:
        return "step 0" + (f" of {progress.steps:,}" if progress.steps else "")
    return f"step {progress.last_step:,}" + (f" of {progress.steps:,}" if progress.steps else "")


def figures(progress: Progress, latest: dict[str, float | None]) -> list[tuple[str, str]]:
    """Return the figures of the verdict's line."""
    found = [(label, questions.number(latest[name])) for name, label in FIGURES.items() if name in latest]
    if progress.running and progress.steps and progress.last_step and progress.step_time_s:
        left = (progress.steps - progress.last_step) * progress.step_time_s
        found.append(("time left", questions.duration(left)))
    return found


def notes(progress: Progress) -> None:
    """Say what a reader has to know of the log itself."""
    said = []
    if progress.read < 1:
        said.append(
            "The log is long and still being read: until then the curves over steps are drawn from evenly spaced rows,"
            " and alerts are those of what has been read."
        )
    if progress.bad_lines:
        said.append(f"{progress.bad_lines:,} lines of the logs are no rows of steps and are left out.")
    if progress.last_step is None and not said:
        said.append("What comes before the first step, such as pre-training, is not drawn.")
    for note in said:
        show(f'<small class="kit-dim">{text(note)}</small>')


def draw_alerts(alerts: Sequence[Alert], owner: str, key: str) -> None:
    """Draw alerts, the worst first; what has passed, or stands and is no warning, folds up."""
    first = [alert for alert in alerts if alert.synthetic or (alert.standing and alert.severity != "info")]
    shown, folded = first[:MOST_OPEN], [alert for alert in alerts if alert not in first]
    folded = first[MOST_OPEN:] + folded if first and not first[0].synthetic else folded
    shown = first if first and first[0].synthetic else shown
    for number, alert in enumerate(shown):
        draw_alert(alert, owner, f"{number}_{_plain(key)}")
    if folded:
        kinds = Counter("passed" if not alert.standing else alert.severity for alert in folded)
        words = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        with st.expander(f"{words}: alerts that are folded up", key=f"folded_{_plain(key)}"):
            for number, alert in enumerate(folded[:MOST_ALERTS]):
                draw_alert(alert, owner, f"folded_{number}_{_plain(key)}")
            if len(folded) > MOST_ALERTS:
                show(f'<small class="kit-dim">and {len(folded) - MOST_ALERTS} more: rlhf alerts RUN</small>')


def draw_alert(alert: Alert, owner: str, key: str) -> None:
    """Draw an alert with links to its step among the curves, and to that step's metrics and completions."""
    with st.container(horizontal=True, vertical_alignment="center", key=f"alert_{key}", gap="small"):
        show(card(alert, owner))
        with st.container(horizontal=True, width="content", gap="small"):
            for view, label in (("Metrics", "Curves"), ("Completions", f"Step {alert.first_step}")):
                st.button(
                    label,
                    key=f"{view}_{key}",
                    on_click=go,
                    args=(view, alert.first_step),
                    help=f"{view} at step {alert.first_step}",
                )


def _plain(name: str) -> str:
    return "".join(char if char.isascii() and char.isalnum() else f"-{ord(char):x}-" for char in name)


def card(alert: Alert, owner: str) -> str:
    """Return an alert as HTML: what, since when, the figures, why, what to do."""
    colour = charts.SEVERITY_COLOURS[alert.severity]
    tags = [alert.severity] + ["synthetic"] * alert.synthetic + ["passed"] * (not alert.standing)
    spelled = "".join(f'<span class="kit-tag">{text(tag)}</span>' for tag in tags)
    steps = (
        f"step {alert.first_step}" if alert.first_step == alert.step else f"steps {alert.first_step} to {alert.step}"
    )
    of = f"{text(owner)}: " if owner else ""
    moved = f" Moved with it: {text(', '.join(alert.moved_with))}." if alert.moved_with else ""
    if is_nonfinite(alert):
        moved, figures = "", f"{', '.join((alert.metric, *alert.moved_with))} not finite"
    else:
        figures = f"{alert.metric} {questions.number(alert.value)}, threshold {questions.number(alert.threshold)}"
    return (
        f'<div class="kit-alert {"" if alert.standing else "kit-passed"}" style="--kit:{colour}">'
        f'<div class="kit-head">{spelled}{of}{text(alert.name.replace("_", " "))} · {steps} · '
        f"{text(figures)}</div>"
        f"<div>{text(alert.cause)} <b>Do:</b> {text(alert.remedy)}</div>"
        f'<div class="kit-dim">{text(alert.evidence)}.{moved}</div></div>'
    )


def draw_questions(shown: dict[str, Run], found: dict[str, list[Alert]], choice: Choice) -> None:
    """Draw the metrics by question, side by side where there is room."""
    if len(shown) > 1:
        dots = zip(labels(shown).values(), charts.COLOURS, strict=False)
        legend = [f'<span><i class="kit-dot" style="background:{c}"></i>{text(name)}</span>' for name, c in dots]
        show(f'<div class="kit-runs">{"".join(legend)}</div>')
    names = list(dict.fromkeys(name for run in shown.values() for name in run.names()))
    with st.container(horizontal=True, key="questions", gap="medium"):
        for number, (question, metrics) in enumerate(questions.grouped(names, everything=choice.everything).items()):
            with st.container(key=f"question_{number}"):
                heading(question, metrics, shown, found)
                for name in metrics:
                    draw_metric(name, shown, found, choice)


def heading(question: str, metrics: Sequence[str], shown: dict[str, Run], found: dict[str, list[Alert]]) -> None:
    """Draw a question with its answer: the alerts on its metrics, or how many of those lie in their healthy range."""
    words, colour = answer(question, metrics, [run.latest() for run in shown.values()], list(chain(*found.values())))
    answered = f'<small style="--kit:{colour}">{text(words)}</small>'  # empty too, so that the charts stand in rows
    show(f'<div class="kit-question"><span>{text(question)}</span>{answered}</div>')


def answer(
    question: str, metrics: Sequence[str], latest: Sequence[dict[str, float | None]], alerts: Sequence[Alert]
) -> tuple[str, str]:
    """Return what to say of a question, and in which colour: an alert weighs more than a range, in any of the runs."""
    about = {*metrics, *METRICS_OF.get(question, ())}
    standing = [one for one in alerts if one.standing and one.severity != "info" and about & curve_names(one)]
    judged = [
        (name, row[name])
        for row in latest
        for name in metrics
        if name in row and (row[name] is None or questions.healthy(name) != (None, None))
    ]
    outside = list(dict.fromkeys(name for name, value in judged if questions.outside(name, value)))
    if standing:
        worst = max(standing, key=lambda one: SEVERITIES.index(one.severity)).severity
        return f"{len(standing)} alert{'s' * (len(standing) > 1)}", charts.SEVERITY_COLOURS[worst]
    if outside:
        return f"outside its range: {', '.join(outside)}", charts.WARNING
    names = len({name for name, _ in judged})
    return (f"{names} of {names} in range" if judged else ""), charts.GOOD


def curve_names(alert: Alert) -> set[str]:
    """Return the metrics that an alert speaks of, by whose curve it shows on."""
    others = alert.moved_with if is_nonfinite(alert) else ()
    return {questions.CURVE_OF.get(alert.metric, alert.metric), *others}


def draw_metric(name: str, shown: dict[str, Run], found: dict[str, list[Alert]], choice: Choice) -> None:
    """Draw one metric over all runs."""
    names = labels(shown)
    curves = {names[run_name]: curve_of(run, name, choice) for run_name, run in shown.items()}
    marks = [
        (place, alert.severity)
        for run_name, run in shown.items()
        for alert in found[run_name]
        if alert.severity != "info" and name in {*curve_names(alert), *alert.moved_with}
        if (place := _inside(run, alert.first_step, choice, curves)) is not None
    ]
    first = next(iter(shown.values()))
    chosen = None if choice.step is None else _inside(first, choice.step, choice, curves)
    latest = first.latest()
    rows = charts.metric_rows(
        curves,
        log=choice.log,
        latest=questions.number(latest[name]) if name in latest and len(shown) == 1 else "",
        alerts=marks,
        chosen=chosen,
    )
    spec = charts.metric_chart(
        printable(questions.title(name)),
        questions.healthy(name),
        list(curves),
        axis=choice.axis,
        log=choice.log,
    )
    key = f"chart_{_plain(name)}_{choice.axis}_{choice.log}_{len(shown)}"
    st.vega_lite_chart(rows, spec, key=key, width="stretch", alt=f"{printable(name)} over {choice.axis}")


def curve_of(run: Run, name: str, choice: Choice) -> Curve:
    """Return a metric's curve as it is to be drawn."""
    return series.smooth(run.curve(name, choice.axis, choice.last, POINTS), choice.smoothing)


def _inside(run: Run, step: int, choice: Choice, curves: dict[str, Curve]) -> float | None:
    place = run.place(step, choice.axis)
    ends = [curve.x[[0, -1]] for curve in curves.values() if len(curve.x)]
    if place is None or not ends or not min(low for low, _ in ends) <= place <= max(high for _, high in ends):
        return None
    return place
