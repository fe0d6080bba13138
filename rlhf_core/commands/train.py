"""``rlhf train``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rlhf_core import config as configuration
from rlhf_core.commands.running import Job, make_run, source_name
from rlhf_core.config import TrainConfig

if TYPE_CHECKING:
    from rlhf_core.run_setup import DataPlace


@dataclass(frozen=True)
class Options:
    """Train a language model with PPO.

    With no options: the embedded film reviews, from nothing, on the CPU, in a few minutes. With --data a folder of
    *.pos and *.neg files: your own labelled sentences. With --data prompts, --model.path and --reward: your own policy.
    """

    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    config: Path | None = None
    """A .toml file or a run's config.json that sets options; the command line goes before it."""
    name: str | None = None
    """The run's name: its folder under --runs."""
    runs: Path = Path("runs")
    """Where runs are kept."""
    resume: bool = False
    """Continue the run --name (or the latest) from its newest sound checkpoint, with the options it began with."""


def run(arguments: list[str]) -> int:
    """Train, or continue a run; return the exit code."""
    return make_run(
        Job(
            command="train",
            options=Options,
            field="train",
            empty=TrainConfig,
            defaults=configuration.defaults,
            load=_load,
            execute=_execute,
            default_name=lambda config: f"{source_name(config)}-seed{config.seed}",
        ),
        arguments,
    )


def _load(config: TrainConfig, place: "DataPlace") -> Any:
    from rlhf_core.experiment import load_inputs

    return load_inputs(config, place)


def _execute(config: TrainConfig, inputs: Any, folder: Path, resumed: bool) -> None:
    from rlhf_core.training import run_training

    run_training(config, inputs, folder, resumed=resumed)
