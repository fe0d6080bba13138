"""``rlhf check-profile``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rlhf_core import run_folder
from rlhf_core.commands.options import parse
from rlhf_core.profiles.check import check_profile
from rlhf_core.profiles.files import SUMMARY_FILE
from rlhf_core.terminal import printable


@dataclass(frozen=True)
class Options:
    """Say whether the profiles of runs add up; exit code 1 at the first that does not."""

    run: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ("latest",)
    """Runs: names under --runs, or folders; also a folder that a Profiler wrote around another trainer."""
    runs: Path = Path("runs")
    """Where runs are kept."""


def run(arguments: list[str]) -> int:
    """Print each check with its figure; return the exit code."""
    options = parse(Options, arguments, "check-profile")
    for name in options.run:
        folder = Path(name) if (Path(name) / SUMMARY_FILE).is_file() else run_folder.find_run(name, options.runs)
        print(printable(f"{folder}"))
        try:
            for line in check_profile(folder):
                print(printable(f"  yes  {line}"))
        except (ValueError, FileNotFoundError) as error:
            print(printable(f"  NO   {error}"))
            return 1
    return 0
