"""A step looked at closely: its completions, the log-ratio of each token, and its metrics."""

from typing import Any

import streamlit as st

from dashboard import charts, jsonl, questions
from dashboard.folder import open_plain
from dashboard.kinds import SUPERVISED
from dashboard.markup import show, split, text
from dashboard.metrics_view import verdict
from dashboard.state import Choice
from dashboard.store import Run, Store
from rlhf_core import runlog
from rlhf_core.alerting.questions import METRICS_OF
from rlhf_core.terminal import printable

MOST_SAMPLES = 200
MOST_CHARACTERS = 20_000
"""Of a completion, when one is looked at; the table shows fewer."""
TABLE_CHARACTERS = 300
MOST_TOKENS = 2000
ORDERS = {
    "sample": ("sample", False),
    "reward ↓": ("reward", True),
    "reward ↑": ("reward", False),
    "KL ↓": ("kl", True),
}


def draw(runs: Store, choice: Choice, examples: bool) -> None:
    """Draw the view of the first run."""
    name = choice.runs[0]
    run = runs.run(name)
    verdict(name, run, run.alerts())
    known = logged_steps(run)
    if known is None:
        st.text(without_completions(run.kind()))
        last_step = run.progress().last_step
        if last_step is not None:
            draw_step(run, last_step if choice.step is None else choice.step)
        return
    first, last = known
    step = min(max(last if choice.step is None else choice.step, first), last)
    if choice.step is not None and choice.step != step:
        show(f'<small class="kit-dim">Completions are logged of steps {first:,} to {last:,}.</small>')
    left, right = split()
    with left:
        draw_samples(run, step)
    with right:
        draw_step(run, step)


def without_completions(kind: str | None) -> str:
    """Return why a run has no completions."""
    if kind in SUPERVISED:
        return f"A run of rlhf {kind} draws no completions."
    return "There are no completions yet. A run logs a few of each step; --log.samples-per-step says how many."


def logged_steps(run: Run) -> tuple[int, int] | None:
    """Return the first and the last step that completions are logged of."""
    file = open_plain(run.path, runlog.SAMPLES_FILE)
    if file is None:
        return None
    with file:
        last = jsonl.decode(jsonl.last_line(file))
    first = next(jsonl.rows_from(run.path, runlog.SAMPLES_FILE, -(2**53)), None)
    return None if first is None or last is None else (first["step"], last["step"])


def samples_of(run: Run, step: int) -> list[dict[str, Any]]:
    """Return the samples of a step; what is not as a sample has to be is left out."""
    found = []
    for row in jsonl.rows_at(run.path, runlog.SAMPLES_FILE, step):
        if all(isinstance(row.get(name), str) for name in ("prompt", "completion")):
            found.append(row)
        if len(found) == MOST_SAMPLES:
            break
    return found


def draw_samples(run: Run, step: int) -> None:
    """Draw the table of a step's completions, and the one that is chosen."""
    samples = samples_of(run, step)
    with st.container(horizontal=True, vertical_alignment="center"):
        show(f'<div class="kit-question"><span>Completions of step {step:,}</span></div>')
        order = st.segmented_control(
            "Order", list(ORDERS), default="sample", key="order", bind="query-params", required=True,
            label_visibility="collapsed",
        )  # fmt: skip
    if not samples:
        st.text(f"No completion of step {step:,} is logged.")
        return
    by, falling = ORDERS[order or "sample"]
    samples.sort(key=lambda row: (number(row, by) is None, (number(row, by) or 0.0) * (-1 if falling else 1)))
    chosen = st.dataframe(
        [table_row(row) for row in samples],
        key=f"samples_{order}",  # not of the step: what is chosen stays chosen when a run that goes on has a new one
        on_select="rerun",
        selection_mode="single-row",
        hide_index=True,
        height="content" if len(samples) < 12 else 420,
        column_config={
            "reward": st.column_config.NumberColumn(format="%.3f", width=70),
            "KL": st.column_config.NumberColumn(format="%.2f", width=70),
            "tokens": st.column_config.NumberColumn(width=60),
            "sample": st.column_config.NumberColumn(width=60),
            "prompt": st.column_config.TextColumn(width="medium"),
            "completion": st.column_config.TextColumn(width="large"),
        },
    )
    rows = [row for row in chosen["selection"]["rows"] if row < len(samples)]
    draw_sample(samples[rows[0] if rows else 0], by_hand=bool(rows))


def number(row: dict[str, Any], name: str) -> float | None:
    """Return a field that is a finite number."""
    return jsonl.finite(row.get(name))


def table_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a sample's row of the table."""
    ids = row.get("token_ids")
    return {
        "sample": number(row, "sample"),
        "reward": number(row, "reward"),
        "KL": number(row, "kl"),
        "tokens": len(ids) if isinstance(ids, list) else None,
        "prompt": shortened(row["prompt"], TABLE_CHARACTERS),
        "completion": shortened(row["completion"], TABLE_CHARACTERS),
    }


def shortened(words: str, most: int) -> str:
    """Return a text that is safe to show, cut with a word on how much is left out."""
    cut = words[:most]
    spelled = "\n".join(printable(line) for line in cut.split("\n"))
    return spelled if len(words) <= most else f"{spelled} … [{len(words) - most:,} characters more]"


def draw_sample(row: dict[str, Any], *, by_hand: bool) -> None:
    """Draw one completion: its tokens over their log-ratio, its text, and the tokens as a table."""
    tokens = tokens_of(row)
    hint = "" if by_hand else "; select a row above to see another"
    show(f'<small class="kit-label">Sample {text(row.get("sample", ""))} of step {text(row["step"])}{hint}</small>')
    if tokens is None:
        show('<small class="kit-dim">This log has no log-probs of single tokens; rlhf train logs them.</small>')
    else:
        ratios = [p - q for _, p, q in tokens]
        limit = max(1.0, *(abs(ratio) for ratio in ratios)) if ratios else 1.0
        show(
            f'<small class="kit-dim">log π − log π_ref of each token: '
            f'<b style="color:{charts.TOKEN_COLOURS[2]}">red</b> is likelier under the policy, '
            f'<b style="color:{charts.TOKEN_COLOURS[0]}">blue</b> under the reference; full colour at {limit:.2f} nats'
            f"{'' if len(tokens) < MOST_TOKENS else f'; the first {MOST_TOKENS:,} tokens'}</small>"
        )
        data = charts.token_rows(*zip(*tokens, strict=True)) if tokens else None
        if data is not None:
            with st.container(key="token_map"):
                st.vega_lite_chart(
                    data, charts.token_map(limit), key="tokens", width="content", alt="log-ratio of each token"
                )
    for name in ("prompt", "completion"):
        show(f'<small class="kit-label">{name.capitalize()}</small>')
        st.code(shortened(row[name], MOST_CHARACTERS), language=None, wrap_lines=True)
    if tokens:
        with st.expander("Tokens as a table"):
            st.dataframe(
                [
                    {"position": at, "token": printable(token), "log π": p, "log π_ref": q, "log-ratio": p - q}
                    for at, (token, p, q) in enumerate(tokens)
                ],
                hide_index=True,
                key="token_table",
            )


def tokens_of(row: dict[str, Any]) -> list[tuple[str, float, float]] | None:
    """Return a sample's tokens with the policy's and the reference's log-prob; None where the log lacks them."""
    columns = [column for name in ("tokens", "logprobs", "ref_logprobs") if isinstance(column := row.get(name), list)]
    if len(columns) != 3 or len({len(column) for column in columns}) != 1:
        return None
    found = []
    for token, logprob, reference in zip(*(column[:MOST_TOKENS] for column in columns), strict=True):
        p, q = jsonl.finite(logprob), jsonl.finite(reference)
        if not isinstance(token, str) or p is None or q is None:
            return None
        found.append((token, p, q))
    return found


def draw_step(run: Run, step: int) -> None:
    """Draw the metrics of a step beside their healthy ranges."""
    show(f'<div class="kit-question"><span>Metrics of step {step:,}</span></div>')
    row = next(jsonl.rows_at(run.path, runlog.METRICS_FILE, step), None)
    if row is None:
        st.text(f"The log has no step {step:,}.")
        return
    timing = next(jsonl.rows_at(run.path, runlog.TIMINGS_FILE, step), {})
    numbers = jsonl.numbers(timing) | jsonl.numbers(row)
    order = [name for metrics in METRICS_OF.values() for name in metrics if name in numbers]
    order += [name for name in numbers if name not in order and name != "step" and "/" not in name]
    st.dataframe(
        [step_row(name, numbers[name]) for name in order],
        hide_index=True,
        height=min(38 + 35 * len(order), 900),
        key="step_metrics",
        column_config={
            "metric": st.column_config.TextColumn(width="medium"),
            "value": st.column_config.NumberColumn(format="%.4g"),
        },
    )


def step_row(name: str, value: float) -> dict[str, str | float | None]:
    """Return a metric's row of the table; its value is a number, so that the table is sorted by it."""
    low, high = questions.healthy(name)
    sides = ("" if low is None else f"≥ {low:g}", "" if high is None else f"≤ {high:g}")
    finite = value if value == value else None
    mark = "⚠ " if questions.outside(name, finite) else ""
    return {
        "metric": mark + printable(questions.title(name)) + ("" if finite is not None else ": not finite"),
        "value": finite,
        "healthy": " and ".join(side for side in sides if side),
    }
