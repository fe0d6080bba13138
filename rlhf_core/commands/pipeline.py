"""``rlhf pipeline``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rlhf_core.commands.running import RunOptions, make_run, stage_job
from rlhf_core.stage_config import PipelineConfig

if TYPE_CHECKING:
    from rlhf_core.run_setup import DataPlace


@dataclass(frozen=True)
class Options(RunOptions):
    """Take preferences to a policy: sft, reward model, PPO, evaluation; finished stages are kept.

    Given again under the same --name it keeps each stage that is as it was, goes on with what was interrupted, and does
    again what an option, the data or damage has changed, with the stages that start from it. A --reward is added to the
    reward model that it trains. Stages are runs in the pipeline's folder: sft, reward, ppo, eval-sft, eval-ppo.
    """

    pipeline: Annotated[PipelineConfig, tyro.conf.arg(name="")] = field(default_factory=PipelineConfig)


def run(arguments: list[str]) -> int:
    """Run the pipeline, or continue it; return the exit code."""
    return make_run(stage_job("pipeline", Options, PipelineConfig, _load, _execute, reopens=True), arguments)


def _load(config: PipelineConfig, place: "DataPlace") -> Any:
    from rlhf_core.pipeline import load_pipeline

    return load_pipeline(config, place)


def _execute(config: PipelineConfig, options: Options, inputs: Any, folder: Path) -> None:
    from rlhf_core.pipeline import run_pipeline

    run_pipeline(config, inputs, folder, resumed=options.resume)
