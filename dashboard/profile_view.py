"""Where the time goes: stages, operators, and the trace to look into."""

import csv
import io
from typing import Any
from urllib.parse import urlencode

import pyarrow as pa
import streamlit as st

from dashboard import charts
from dashboard.api import PROFILES
from dashboard.folder import open_plain, plain_file
from dashboard.jsonl import finite
from dashboard.markup import show, split
from dashboard.metrics_view import verdict
from dashboard.state import Choice
from dashboard.store import Run, Store
from rlhf_core.terminal import printable

CSV_BYTES = 1 << 20
MOST_OPERATORS = 30
WHOLE_STEP = "step"
"""The row of a summary that is no stage, but all of them and what lies between."""
PERFETTO = "https://ui.perfetto.dev"


def draw(runs: Store, choice: Choice, examples: bool) -> None:
    """Draw the view of the first run."""
    name = choice.runs[0]
    run = runs.run(name)
    verdict(name, run, run.alerts())
    summary = read_csv(run, "summary.csv")
    profiled = stages_of(summary)
    left, right = split()
    with left:
        bars, source = (profiled, "profiles/summary.csv") if profiled else (logged_stages(run), "timings.jsonl")
        show('<div class="kit-question"><span>Stages of a step</span></div>')
        if bars:
            st.vega_lite_chart(
                pa.Table.from_pylist(bars), charts.stage_bars(), key="stages", alt="milliseconds by stage"
            )
            faint = "; faint bars lie inside the stage above them" if any(bar["inner"] for bar in bars) else ""
            show(f'<small class="kit-dim">From {source}{faint}.</small>')
        else:
            st.text("No step has been timed yet.")
        if profiled:
            st.dataframe(tidy(summary), hide_index=True, key="summary")
    with right:
        draw_operators(read_csv(run, "op_stats.csv"))
        draw_downloads(run, name)


def read_csv(run: Run, name: str) -> list[dict[str, str]]:
    """Return the rows of a profile's table; nothing when it is not there or is no such table."""
    file = open_plain(run.path, "profiles", name)
    if file is None:
        return []
    with file:
        text = file.read(CSV_BYTES).decode("utf-8", errors="replace")
    try:
        return [{key: value or "" for key, value in row.items() if key} for row in csv.DictReader(io.StringIO(text))]
    except csv.Error:
        return []


def tidy(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return the rows of a table with numbers where they are numbers, without the columns that are 0 throughout."""
    kept = [name for name in rows[0] if any(as_number(row.get(name, "")) != 0.0 for row in rows)]
    return [{printable(_heading(name)): _tidy(name, row.get(name, "")) for name in kept} for row in rows]


def _heading(name: str) -> str:
    return name.removesuffix("_bytes") + "_MiB" if name.endswith("_bytes") else name


def _tidy(name: str, text: str) -> float | str:
    number = as_number(text)
    if number is None:
        return printable(text)
    return round(number / 2**20, 1) if name.endswith("_bytes") else round(number, 3)


def as_number(text: str) -> float | None:
    """Return a finite number that is written in a table, or None."""
    try:
        return finite(float(text))
    except ValueError:
        return None


def stages_of(summary: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return the bars of a profile's summary: the mean of a step, as ``mean_ms`` is of a call."""
    totals = {row["stage"]: as_number(row.get("total_ms", "")) for row in summary if row.get("stage")}
    calls = {row["stage"]: as_number(row.get("calls", "")) or 0.0 for row in summary if row.get("stage")}
    steps = calls.get(WHOLE_STEP) or max((count for name, count in calls.items() if "/" not in name), default=0.0)
    if not steps:
        return []
    means = {name: total / steps for name, total in totals.items() if total is not None}
    whole = means.pop(WHOLE_STEP, None)
    return bars_of(means, whole)


def logged_stages(run: Run) -> list[dict[str, Any]]:
    """Return the bars of the run's own timings: the mean of all steps."""
    steps = run.count("step_time_s")
    names = [name for name in run.names() if name.startswith("stages_s/")]
    if not steps:
        return []
    milliseconds = {name.removeprefix("stages_s/"): 1000.0 * run.total(name) / steps for name in names}
    return bars_of(milliseconds, 1000.0 * run.total("step_time_s") / steps)


def bars_of(milliseconds: dict[str, float], whole: float | None) -> list[dict[str, Any]]:
    """Return bars by falling time, each stage's inner ones under it.

    Args:
        milliseconds: of a step, by stage.
        whole: those of the whole step, which shares are of; None: as long as the stages together.
    """
    whole = whole or sum(value for name, value in milliseconds.items() if "/" not in name)

    def place(name: str) -> list[tuple[float, str]]:
        parts = name.split("/")
        above = ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
        return [(-milliseconds.get(one, 0.0), one) for one in above]

    return [
        {
            "stage": "\u2003" * name.count("/") + printable(name.rpartition("/")[2] if "/" in name else name),
            "milliseconds": milliseconds[name],
            "share": milliseconds[name] / whole if whole else 0.0,
            "inner": "/" in name,
        }
        for name in sorted(milliseconds, key=place)
    ]


def draw_operators(rows: list[dict[str, str]]) -> None:
    """Draw the operators that take the most time."""
    show('<div class="kit-question"><span>Top operators</span></div>')
    if not rows:
        st.text("No operator statistics. Profile a run with:")
        st.code("rlhf train --profile", language="bash")
        return
    by = next(
        (
            name
            for name in rows[0]
            if name.startswith("self") and "cuda" in name and any(as_number(r[name]) for r in rows)
        ),
        None,
    )
    by = by or next((name for name in rows[0] if name.startswith("self")), None) or next(iter(rows[0]))
    rows.sort(key=lambda row: -(as_number(row.get(by, "")) or 0.0))
    st.dataframe(tidy(rows[:MOST_OPERATORS]), hide_index=True, height=420, key="operators")


def draw_downloads(run: Run, name: str) -> None:
    """Draw links to the files, and say how to open the trace."""
    show('<div class="kit-question"><span>Files</span></div>')
    with st.container(horizontal=True):
        st.link_button("metrics as CSV", "/api/metrics.csv?" + urlencode({"run": name}), icon=":material/download:")
        for file in PROFILES:
            if plain_file(run.path, "profiles", file):
                st.link_button(
                    file, "/api/profile?" + urlencode({"run": name, "file": file}), icon=":material/download:"
                )
    if plain_file(run.path, "profiles", "chrome_trace.json"):
        st.text(
            f"To look into the trace, open {PERFETTO} (or chrome://tracing in Chromium), choose “Open trace file” and "
            "give it chrome_trace.json. The file stays in your browser. W and S zoom, A and D move, / searches."
        )
