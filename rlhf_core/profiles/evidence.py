"""The files of a profile and the logs of its run, and how a check that does not hold says so. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core import run_folder, runlog
from rlhf_core.checks.step_log import brief, rows_by_step
from rlhf_core.profiles.files import (
    LARGEST,
    OPERATOR_COLUMNS,
    OPERATORS_FILE,
    PROFILES_FOLDER,
    SUMMARY_COLUMNS,
    SUMMARY_FILE,
    TRACE_FILE,
    Event,
    Trace,
    read_table,
    read_trace,
)

MS_TOLERANCE = 2e-6
"""Rounding of the tables, in ms; the trace is exact to the nanosecond."""


class CheckFailed(ValueError):
    """A check does not hold; the message has the figures."""


@dataclass(frozen=True)
class Profile:
    """The files of a profile, and the logs of its run where it has them."""

    trace: Trace
    summary: dict[str, dict[str, float]]
    operators: dict[str, dict[str, float]]
    timings: dict[int, dict[str, Any]] | None
    metrics: dict[int, dict[str, Any]] | None

    @property
    def steps(self) -> dict[int, Event]:
        """The whole steps."""
        return {event.step: event for event in self.trace.events if event.category == "step"}

    def spans(self, *categories: str) -> list[Event]:
        """Return the events of some categories, an outer one before those inside it."""
        chosen = [event for event in self.trace.events if event.category in categories]
        return sorted(chosen, key=lambda event: (event.start_ns, -event.end_ns))


def read_profile(folder: Path) -> Profile:
    """Return the profile of a run, or of a folder with the three files alone."""
    is_run = (folder / run_folder.CONFIG_FILE).is_file()
    profiles = folder / PROFILES_FOLDER if is_run else folder
    logs = [rows_by_step(folder / name) if is_run else None for name in (runlog.TIMINGS_FILE, runlog.METRICS_FILE)]
    summary = read_table(profiles / SUMMARY_FILE, SUMMARY_COLUMNS)
    trace = read_trace(profiles / TRACE_FILE)
    operators = read_table(profiles / OPERATORS_FILE, OPERATOR_COLUMNS)
    return Profile(trace, summary, operators, *logs)


def require(holds: bool, message: str) -> None:
    """Raise CheckFailed unless it holds."""
    if not holds:
        raise CheckFailed(message)


def require_order(name: str, found: list[str], wanted: list[str], order: str) -> None:
    """Raise CheckFailed at the first row of a table that is not where it belongs."""
    for number, (one, other) in enumerate(zip(found, wanted, strict=True), start=2):
        require(one == other, f"{name}:{number}: {one} is where {other} belongs, in the order in which {order}")


def same(what: str, a: list[Any], b: list[Any]) -> None:
    """Raise CheckFailed, naming what only one of them has, unless two sorted lists are equal."""
    if a == b:
        return
    only_a, only_b = (
        f"[{', '.join(brief(item) for item in sorted(one)[:10])}]" for one in (set(a) - set(b), set(b) - set(a))
    )
    if only_a == only_b == "[]":
        raise CheckFailed(f"{what} differ: one of them is there twice")
    first, second = (one.replace("[]", "none") for one in (only_a, only_b))
    raise CheckFailed(f"{what} differ: only the first has {first}, only the second {second}")


def number(value: Any, where: str) -> float:
    """Return a number; raise CheckFailed if it is none that a profile can have."""
    sound = type(value) in (int, float) and abs(value) < LARGEST
    require(sound, f"{where} is {brief(value)}; it must be a finite number below 2^63")
    return float(value)
