"""How every run begins: threads, seeds, device, environment.json; and where its data is prepared."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from rlhf_core import checkpoint, run_folder
from rlhf_core.config import RunConfig
from rlhf_core.data.dataset import DataReport
from rlhf_core.durable_files import write_atomically
from rlhf_core.environment import environment
from rlhf_core.seeding import set_all_seeds
from rlhf_core.terminal import console

DATA_FOLDER = "data"
BASE_FOLDER = "models/base"
"""Where a run keeps the language model that it starts from."""


def choose_device(config: RunConfig) -> torch.device:
    """Return the device of ``config.device``.

    Raises:
        ValueError: CUDA was asked for and is not there.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; take --device cpu or auto")
    cuda = config.device == "cuda" or (
        config.device == "auto" and torch.cuda.is_available() and config.numerics == "native"
    )
    return torch.device("cuda" if cuda else "cpu")


def begin_run(config: RunConfig, run: Path, *, resumed: bool) -> torch.device:
    """Set threads and seeds, note the environment in a new run, and return the device."""
    torch.set_num_threads(config.resolved_threads)
    transformers.utils.logging.disable_progress_bar()
    set_all_seeds(config.seed)
    device = choose_device(config)
    if not resumed:
        content = json.dumps(environment(device), indent=2) + "\n"
        write_atomically(run / run_folder.ENVIRONMENT_FILE, content.encode())
    return device


def base_path(path: str | None, resumed: Path | None) -> str | None:
    """Return where the model that ``--model.path`` names lies: in the resumed run, when that has kept a sound copy."""
    if path and resumed is not None and checkpoint.is_sound(resumed / BASE_FOLDER):
        return str(resumed / BASE_FOLDER)
    return path


@dataclass(frozen=True)
class DataPlace:
    """Where a run's data is, or is prepared before there is a run."""

    scratch: Path
    """Beside the runs; it is removed when the command ends."""
    run: Path | None
    """The run that is resumed."""
    holding: ExitStack = field(default_factory=ExitStack)
    """What is let go when the command ends: the lock of ``scratch``."""

    @property
    def kept(self) -> Path | None:
        """The data of the run that is resumed, when it is sound."""
        folder = self.run / DATA_FOLDER if self.run is not None else None
        return folder if folder is not None and checkpoint.is_sound(folder) else None

    def prepare(self, build: Callable[[Path], DataReport]) -> None:
        """Let ``build`` write the data into the scratch folder, and say what became of its rows."""
        folder = self.scratch / DATA_FOLDER
        folder.mkdir(parents=True)
        self.holding.enter_context(run_folder.writing(self.scratch))
        console.print(str(build(folder)), markup=False, soft_wrap=True)

    def hand_over(self, run: Path) -> None:
        """Move what was prepared into the run's folder, at once and with a manifest."""
        prepared = self.scratch / DATA_FOLDER
        if prepared.exists():
            checkpoint.write_folder(run / DATA_FOLDER, lambda partial: _move_all(prepared, partial))


def _move_all(source: Path, target: Path) -> None:
    for path in source.iterdir():
        shutil.move(path, target / path.name)


@contextmanager
def data_place(runs: Path, run: Path | None) -> Iterator[DataPlace]:
    """Give a place beside the runs, on their disk, and take it away at the end, with a folder of runs made for it."""
    scratch = runs / f".preparing-{os.getpid()}"
    made = not runs.exists()
    for left in sorted(runs.glob(".preparing-*")):
        with suppress(FileNotFoundError, ValueError), run_folder.writing(left):  # a killed command's: nobody holds it
            shutil.rmtree(left, ignore_errors=True)
    try:
        with ExitStack() as holding:
            yield DataPlace(scratch, run, holding)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if made and runs.is_dir() and not any(runs.iterdir()):
            runs.rmdir()
