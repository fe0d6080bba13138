"""Runs beside each other: what their configurations differ in, and where their logs first part."""

from pathlib import Path
from typing import Any

import streamlit as st

from dashboard import folder
from dashboard.markup import show, text
from dashboard.metrics_view import verdict
from dashboard.state import Choice
from dashboard.store import Run, Store, read_json
from rlhf_core import runlog
from rlhf_core.terminal import printable

MOST_BYTES = 1 << 24
"""Logs longer than this are for the command line to compare."""


def draw(runs: Store, choice: Choice, examples: bool) -> None:
    """Draw the view."""
    shown = {name: runs.run(name) for name in choice.runs}
    for name, run in shown.items():
        verdict(name, run, run.alerts(), many=True)
    if len(shown) < 2:
        st.text("Choose two or more runs above to see what they differ in.")
        return
    for title, file in (
        ("Configuration: what differs", runlog.CONFIG_FILE),
        ("Environment: what differs", "environment.json"),
    ):
        show(f'<div class="kit-question"><span>{text(title)}</span></div>')
        rows = differences({name: flat(read_json(run.path, file)) for name, run in shown.items()})
        if rows:
            st.dataframe(rows, hide_index=True, key=f"differences_{file}")
        else:
            st.text("Nothing differs.")
    show('<div class="kit-question"><span>First divergence</span></div>')
    (first_name, first), *others = shown.items()
    for name, run in others:
        st.text(f"{printable(first_name)} and {printable(name)}: {divergence(first, run)}")


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the leaves of nested tables by their dotted names."""
    found: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[printable(f"{prefix}{name}")] = "–" if value is None else printable(str(value))[:200]
    return found


def differences(by_run: dict[str, dict[str, str]]) -> list[dict[str, str]]:
    """Return a row for each name in which the runs differ."""
    names = dict.fromkeys(name for leaves in by_run.values() for name in leaves)
    rows = [
        {"name": name} | {printable(run): leaves.get(name, "absent") for run, leaves in by_run.items()}
        for name in names
    ]
    return [
        row for row, name in zip(rows, names, strict=True) if len({leaves.get(name) for leaves in by_run.values()}) > 1
    ]


def divergence(a: Run, b: Run) -> str:
    """Return where the deterministic logs of two runs first differ, in a sentence."""
    stamps = []
    for run in (a, b):
        for name in runlog.DETERMINISTIC_LOGS:
            path = folder.plain_file(run.path, name)
            if path is None:
                return f"{run.path.name} has no {name} yet."
            stamps.append((path.stat().st_size, path.stat().st_mtime_ns))
    if sum(size for size, _ in stamps) > MOST_BYTES:
        return f"the logs are long; compare them with: rlhf compare {a.path.name} {b.path.name}"
    return _divergence(str(a.path), str(b.path), tuple(stamps))


@st.cache_data(max_entries=32, show_spinner=False)
def _divergence(a: str, b: str, stamps: tuple[tuple[int, int], ...]) -> str:
    try:
        found = runlog.compare(Path(a), Path(b))
    except (OSError, ValueError) as error:
        return printable(str(error))
    return "identical" if found is None else printable(str(found))[:1000]
