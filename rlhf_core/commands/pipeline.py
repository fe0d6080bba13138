"""``rlhf pipeline``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rlhf_core.commands.running import Job, make_run, source_name, stage_defaults
from rlhf_core.stage_config import PipelineConfig

if TYPE_CHECKING:
    from rlhf_core.run_setup import DataPlace


@dataclass(frozen=True)
class Options:
    """Take preferences to a policy: sft, reward model, PPO, evaluation; finished stages are kept."""

    pipeline: Annotated[PipelineConfig, tyro.conf.arg(name="")] = field(default_factory=PipelineConfig)
    config: Path | None = None
    """A .toml file or a run's config.json that sets options; the command line goes before it."""
    name: str | None = None
    """The run's name: its folder under --runs."""
    runs: Path = Path("runs")
    """Where runs are kept."""
    resume: bool = False
    """Continue the run --name (or the latest) from where it stands, with the options it began with."""


def run(arguments: list[str]) -> int:
    """Run the pipeline, or continue it; return the exit code."""
    return make_run(
        Job(
            command="pipeline",
            options=Options,
            field="pipeline",
            empty=PipelineConfig,
            defaults=stage_defaults(PipelineConfig),
            load=_load,
            execute=_execute,
            default_name=lambda config: f"{source_name(config)}-pipeline-seed{config.seed}",
            reopens=True,
        ),
        arguments,
    )


def _load(config: PipelineConfig, place: "DataPlace") -> Any:
    from rlhf_core.pipeline import load_pipeline

    return load_pipeline(config, place)


def _execute(config: PipelineConfig, options: Options, inputs: Any, folder: Path) -> None:
    from rlhf_core.pipeline import run_pipeline

    run_pipeline(config, inputs, folder, resumed=options.resume)
