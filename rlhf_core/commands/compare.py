"""``rlhf compare``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rlhf_core import run_folder, runlog
from rlhf_core.commands.options import parse
from rlhf_core.terminal import printable


@dataclass(frozen=True)
class Options:
    """Say at which step, metric and value two runs first differ (exit code 1), or that they are identical."""

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """A run: its name under --runs, or its folder."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """Another."""
    runs: Path = Path("runs")
    """Where runs are kept."""


def run(arguments: list[str]) -> int:
    """Compare two runs; return the exit code."""
    options = parse(Options, arguments, "compare")
    folders = [run_folder.find_run(name, options.runs) for name in (options.a, options.b)]
    difference = runlog.compare(*folders)
    if difference is None:
        print("identical")
        return 0
    print(printable(f"{difference}"))
    return 1
