"""``rlhf samples``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table
from rich.text import Text

from rlhf_core import run_folder, runlog
from rlhf_core.commands.options import parse
from rlhf_core.terminal import console, printable


@dataclass(frozen=True)
class Options:
    """Show a run's completions."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = "latest"
    """A run: its name under --runs, or its folder."""
    step: int | None = None
    """Only this step. None: the last steps."""
    last: int = 3
    """How many steps, when --step is not given."""
    runs: Path = Path("runs")
    """Where runs are kept."""

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ValueError(f"--last is {self.last}; it must be 1 or more")


def run(arguments: list[str]) -> int:
    """Print completions; return the exit code."""
    options = parse(Options, arguments, "samples")
    folder = run_folder.find_run(options.run, options.runs)
    steps = sorted({row["step"] for row in runlog.read_samples(folder)})
    if not steps:
        raise ValueError(f"{folder} has no samples; it has done no step, or was run with --log.samples-per-step 0")
    if options.step is not None and options.step not in steps:
        raise ValueError(
            f"{folder} has samples of steps {steps[0]} to {steps[-1]}; step {options.step} is not among them"
        )
    shown = steps[-options.last :] if options.step is None else [options.step]
    table = Table("step", "reward", "kl", "prompt", "completion")
    for row in runlog.read_samples(folder):  # a second time, so that only what is shown is held
        if row["step"] in shown:
            texts = (Text(printable(row[name])) for name in ("prompt", "completion"))
            table.add_row(str(row["step"]), f"{row['reward']:+.3f}", f"{row['kl']:.2f}", *texts)
    console.print(table)
    return 0
