"""``rlhf eval``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rlhf_core.commands.running import Job, make_run, source_name, stage_defaults
from rlhf_core.stage_config import EvalConfig

if TYPE_CHECKING:
    from rlhf_core.run_setup import DataPlace


@dataclass(frozen=True)
class Options:
    """Judge a policy on prompts: rewards with intervals, KL to a reference, best-of-n."""

    eval: Annotated[EvalConfig, tyro.conf.arg(name="")] = field(default_factory=EvalConfig)
    config: Path | None = None
    """A .toml file or a run's config.json that sets options; the command line goes before it."""
    name: str | None = None
    """The run's name: its folder under --runs."""
    runs: Path = Path("runs")
    """Where runs are kept."""
    resume: bool = False
    """Continue the run --name (or the latest) from where it stands, with the options it began with."""


def run(arguments: list[str]) -> int:
    """Judge a policy, or continue a run; return the exit code."""
    return make_run(
        Job(
            command="eval",
            options=Options,
            field="eval",
            empty=EvalConfig,
            defaults=stage_defaults(EvalConfig),
            load=_load,
            execute=_execute,
            default_name=lambda config: f"{source_name(config)}-eval-seed{config.seed}",
        ),
        arguments,
    )


def _load(config: EvalConfig, place: "DataPlace") -> Any:
    from rlhf_core.judging import load_judging

    return load_judging(config, place)


def _execute(config: EvalConfig, options: Options, inputs: Any, folder: Path) -> None:
    from rlhf_core.judging import run_judging

    run_judging(config, inputs, folder, resumed=options.resume)
