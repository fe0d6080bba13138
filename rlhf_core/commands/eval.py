"""``rlhf eval``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rlhf_core.commands.running import RunOptions, make_run, stage_job
from rlhf_core.stage_config import EvalConfig

if TYPE_CHECKING:
    from rlhf_core.run_setup import DataPlace


@dataclass(frozen=True)
class Options(RunOptions):
    """Judge a policy on prompts: rewards with intervals, KL to a reference, best-of-n."""

    eval: Annotated[EvalConfig, tyro.conf.arg(name="")] = field(default_factory=EvalConfig)


def run(arguments: list[str]) -> int:
    """Judge a policy, or continue a run; return the exit code."""
    return make_run(stage_job("eval", Options, EvalConfig, _load, _execute), arguments)


def _load(config: EvalConfig, place: "DataPlace") -> Any:
    from rlhf_core.judging import load_judging

    return load_judging(config, place)


def _execute(config: EvalConfig, options: Options, inputs: Any, folder: Path) -> None:
    from rlhf_core.judging import run_judging

    run_judging(config, inputs, folder, resumed=options.resume)
