"""What a run shows a person: progress bars on a terminal, and text that cannot harm it. Imports no torch."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def printable(text: str) -> str:
    """Return model output with control and other unprintable characters spelled out, safe to print."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class Bar:
    """A progress bar with a line of figures behind it."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, figures: str = "", by: int = 1) -> None:
        """Count ``by`` more as done and show the figures."""
        self._progress.update(self._task, advance=by, figures=figures)


@contextmanager
def progress_bar(title: str, total: int, done: int = 0) -> Iterator[Bar]:
    """Show a bar with the time left; where the output is not a terminal, show nothing."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bar(progress, progress.add_task(title, total=total, completed=done, figures=""))
