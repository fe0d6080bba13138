"""``rlhf check-metrics``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rlhf_core import run_folder, runlog
from rlhf_core.checks.metrics_check import check_log
from rlhf_core.commands.options import parse
from rlhf_core.garbage import loading_for_good
from rlhf_core.stage_config import require_training_run
from rlhf_core.terminal import printable


@dataclass(frozen=True)
class Options:
    """Say whether a run's metrics are complete, possible and what its tokens give; exit code 1 if they are not."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = "latest"
    """A run: its name under --runs, or its folder."""
    runs: Path = Path("runs")
    """Where runs are kept."""


def run(arguments: list[str]) -> int:
    """Print each check with its figures; return the exit code."""
    options = parse(Options, arguments, "check-metrics")
    folder = run_folder.find_run(options.run, options.runs)
    require_training_run(folder)
    try:
        for line in check_log(folder):
            print(printable(f"  yes  {line}"))
        rows = {row["step"]: row for row in runlog.read(folder / runlog.METRICS_FILE)}
        with loading_for_good():
            from rlhf_core.checks.metrics_again import check_again
            from rlhf_core.rollout_file import steps_with_rollouts

        steps = [step for step in steps_with_rollouts(folder) if step in rows]
        for step in steps:
            print(printable(f"  yes  {check_again(folder, step, rows[step])}"), flush=True)
        if not steps:
            print("  --   again: no step has its rollout and the checkpoint before it")
    except (ValueError, FileNotFoundError) as error:
        print(printable(f"  NO   {error}"))
        return 1
    return 0
