"""``rlhf dpo``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rlhf_core.commands.running import RunOptions, make_run, stage_job
from rlhf_core.stage_config import DPOConfig

if TYPE_CHECKING:
    from rlhf_core.run_setup import DataPlace


@dataclass(frozen=True)
class Options(RunOptions):
    """Train a policy on preferences, without a reward model: direct preference optimisation."""

    dpo: Annotated[DPOConfig, tyro.conf.arg(name="")] = field(default_factory=DPOConfig)


def run(arguments: list[str]) -> int:
    """Train a policy, or continue a run; return the exit code."""
    return make_run(stage_job("dpo", Options, DPOConfig, _load, _execute), arguments)


def _load(config: DPOConfig, place: "DataPlace") -> Any:
    from rlhf_core.stages import load_stage_inputs

    return load_stage_inputs(config, "pair", place)


def _execute(config: DPOConfig, options: Options, inputs: Any, folder: Path) -> None:
    from rlhf_core.stages import run_dpo

    run_dpo(config, inputs, folder, resumed=options.resume)
