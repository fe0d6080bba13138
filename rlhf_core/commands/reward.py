"""``rlhf reward``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rlhf_core.commands.running import RunOptions, make_run, stage_job
from rlhf_core.stage_config import RewardConfig

if TYPE_CHECKING:
    from rlhf_core.run_setup import DataPlace


@dataclass(frozen=True)
class Options(RunOptions):
    """Train a reward model on preferences."""

    reward: Annotated[RewardConfig, tyro.conf.arg(name="")] = field(default_factory=RewardConfig)


def run(arguments: list[str]) -> int:
    """Train a reward model, or continue a run; return the exit code."""
    return make_run(stage_job("reward", Options, RewardConfig, _load, _execute), arguments)


def _load(config: RewardConfig, place: "DataPlace") -> Any:
    from rlhf_core.stages import load_stage_inputs

    return load_stage_inputs(config, "pair", place)


def _execute(config: RewardConfig, options: Options, inputs: Any, folder: Path) -> None:
    from rlhf_core.stages import run_reward

    run_reward(config, inputs, folder, resumed=options.resume)
