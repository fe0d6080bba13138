"""``rlhf sft``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rlhf_core.commands.running import RunOptions, make_run, stage_job
from rlhf_core.stage_config import SFTConfig

if TYPE_CHECKING:
    from rlhf_core.run_setup import DataPlace


@dataclass(frozen=True)
class Options(RunOptions):
    """Fine-tune a language model on demonstrations, texts, or the chosen ones of preferences."""

    sft: Annotated[SFTConfig, tyro.conf.arg(name="")] = field(default_factory=SFTConfig)


def run(arguments: list[str]) -> int:
    """Fine-tune, or continue a run; return the exit code."""
    return make_run(stage_job("sft", Options, SFTConfig, _load, _execute), arguments)


def _load(config: SFTConfig, place: "DataPlace") -> Any:
    from rlhf_core.stages import load_stage_inputs

    return load_stage_inputs(config, "demonstration", place)


def _execute(config: SFTConfig, options: Options, inputs: Any, folder: Path) -> None:
    from rlhf_core.stages import run_sft

    run_sft(config, inputs, folder, resumed=options.resume)
