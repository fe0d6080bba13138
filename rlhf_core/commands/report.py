"""``rlhf report``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rlhf_core import run_folder
from rlhf_core.commands.options import UsageError, parse
from rlhf_core.stage_config import require_training_run


@dataclass(frozen=True)
class Options:
    """Write a run as one HTML file that needs no network, and its pictures as PNG."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = "latest"
    """A run: its name under --runs, or its folder."""
    out: Path | None = None
    """The folder to write to. None: report/ in the run's folder."""
    runs: Path = Path("runs")
    """Where runs are kept."""


def run(arguments: list[str]) -> int:
    """Write the report; return the exit code."""
    options = parse(Options, arguments, "report")
    folder = run_folder.find_run(options.run, options.runs)
    require_training_run(folder)
    try:
        from rlhf_core.reporting.page import write_report
    except ModuleNotFoundError as error:
        raise UsageError(f"rlhf report needs {error.name}; pip install 'rlhf-systems-kit[report]'") from None
    print(write_report(folder, options.out or folder / "report"))
    return 0
