"""Runs beside each other: what their configurations differ in, and where their logs first part."""

import shlex
from pathlib import Path
from typing import Any

import streamlit as st

from dashboard import folder
from dashboard.markup import labels, show, text
from dashboard.metrics_view import verdict
from dashboard.state import Choice
from dashboard.store import Store
from rlhf_core import run_folder, runlog
from rlhf_core.terminal import printable

MOST_BYTES = 1 << 24
"""Logs longer than this are for the command line to compare."""


def draw(runs: Store, choice: Choice, examples: bool) -> None:
    """Draw the view."""
    shown = {name: runs.run(name) for name in choice.runs}
    for name, run in shown.items():
        verdict(name, run, run.alerts())
    if len(shown) < 2:
        st.text("Choose two or more runs above to see what they differ in.")
        return
    for title, file in (
        ("Configuration: what differs", run_folder.CONFIG_FILE),
        ("Environment: what differs", "environment.json"),
    ):
        show(f'<div class="kit-question"><span>{text(title)}</span></div>')
        rows = differences({name: flat(folder.read_json(run.path, file)) for name, run in shown.items()})
        if rows:
            st.dataframe(rows, hide_index=True, key=f"differences_{file}")
        else:
            st.text("Nothing differs.")
    show('<div class="kit-question"><span>First divergence</span></div>')
    (first_name, first), *others = shown.items()
    for name, run in others:
        found = divergence((first_name, first.path), (name, run.path))
        st.text(f"{printable(first_name)} and {printable(name)}: {found}")


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
    columns = labels(by_run, "name")
    return [
        {"name": name} | {columns[run]: leaves.get(name, "absent") for run, leaves in by_run.items()}
        for name in names
        if len({leaves.get(name) for leaves in by_run.values()}) > 1
    ]


def divergence(*runs: tuple[str, Path]) -> str:
    """Return where the deterministic logs of two runs, each a name with a folder, first differ, in a sentence."""
    (name_a, path_a), (name_b, path_b) = runs
    stamps = []
    for name, path in runs:
        for log in runlog.deterministic_logs(path_a, path_b):
            file = folder.plain_file(path, log)
            if file is None:
                return f"{printable(name)} has no {log} yet."
            stamps.append((file.stat().st_size, file.stat().st_mtime_ns))
    if sum(size for size, _ in stamps) > MOST_BYTES:
        names = f"{shlex.quote(printable(name_a))} {shlex.quote(printable(name_b))}"
        return f"the logs are long; compare them with: rlhf compare {names}"
    return _divergence(str(path_a), str(path_b), tuple(stamps))


@st.cache_data(max_entries=32, show_spinner=False)
def _divergence(a: str, b: str, stamps: tuple[tuple[int, int], ...]) -> str:
    try:
        found = runlog.compare(Path(a), Path(b))
    except (OSError, ValueError) as error:
        return printable(str(error))
    return "identical" if found is None else printable(str(found))[:1000]
