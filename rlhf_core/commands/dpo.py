"""``rlhf dpo``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rlhf_core.commands.running import Job, make_run, source_name, stage_defaults
from rlhf_core.stage_config import DPOConfig

if TYPE_CHECKING:
    from rlhf_core.run_setup import DataPlace


@dataclass(frozen=True)
class Options:
    """Train a policy on preferences, without a reward model: direct preference optimisation."""

    dpo: Annotated[DPOConfig, tyro.conf.arg(name="")] = field(default_factory=DPOConfig)
    config: Path | None = None
    """A .toml file or a run's config.json that sets options; the command line goes before it."""
    name: str | None = None
    """The run's name: its folder under --runs."""
    runs: Path = Path("runs")
    """Where runs are kept."""
    resume: bool = False
    """Continue the run --name (or the latest) from where it stands, with the options it began with."""


def run(arguments: list[str]) -> int:
    """Train a policy, or continue a run; return the exit code."""
    return make_run(
        Job(
            command="dpo",
            options=Options,
            field="dpo",
            empty=DPOConfig,
            defaults=stage_defaults(DPOConfig),
            load=_load,
            execute=_execute,
            default_name=lambda config: f"{source_name(config)}-dpo-seed{config.seed}",
        ),
        arguments,
    )


def _load(config: DPOConfig, place: "DataPlace") -> Any:
    from rlhf_core.stages import load_stage_inputs

    return load_stage_inputs(config, "pair", place)


def _execute(config: DPOConfig, options: Options, inputs: Any, folder: Path) -> None:
    from rlhf_core.stages import run_dpo

    run_dpo(config, inputs, folder, resumed=options.resume)
