"""``rlhf export``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rlhf_core import run_folder
from rlhf_core.commands.options import parse
from rlhf_core.garbage import loading_for_good


@dataclass(frozen=True)
class Options:
    """Write a run's model, tokenizer and model card into a folder that transformers loads."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run of train, sft, reward, dpo or pipeline: its name under --runs, or its folder."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The new folder."""
    runs: Path = Path("runs")
    """Where runs are kept."""


def run(arguments: list[str]) -> int:
    """Export a run; return the exit code."""
    options = parse(Options, arguments, "export")
    folder = run_folder.find_run(options.run, options.runs)
    with loading_for_good():
        from rlhf_core.export import export

    source = export(folder, options.out)
    print(f"{options.out}: the model of {source}, with its tokenizer and README.md; it was loaded back")
    return 0
