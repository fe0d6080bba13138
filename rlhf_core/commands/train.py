"""``rlhf train``."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from rlhf_core.alerting.thresholds import default_thresholds, read_thresholds
from rlhf_core.alerting.watch import WatchOptions
from rlhf_core.commands.running import Job, RunOptions, check_sources, make_run, options_of, source_name
from rlhf_core.config import TrainConfig
from rlhf_core.config_files import defaults
from rlhf_core.memory_advice import parse_size
from rlhf_core.numerics import apply_environment
from rlhf_core.reporting.trackers import Destination, require_installed

if TYPE_CHECKING:
    from rlhf_core.run_setup import DataPlace


@dataclass(frozen=True)
class Options(RunOptions):
    """Train a language model with PPO.

    With no options: the embedded film reviews, from nothing, on the CPU, in a few minutes. With --data a folder of
    *.pos and *.neg files: your own labelled sentences. With --data prompts, --model.path and --reward: your own policy.
    """

    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    profile: bool = False
    """Write profiles/: time and memory by stage, a trace for Perfetto, operators. The run's numbers stay the same."""
    report_to: tuple[Destination, ...] = ()
    """Send the metrics there too; each needs the extra of its name."""
    stop_on: Literal["critical", "warning", "never"] = "never"
    """Stop, saved and ready to --resume, when an alert of this severity or a worse one is raised; see rlhf alerts."""
    thresholds: Path | None = None
    """A .toml file that changes severities and thresholds of the alerts."""

    explain_memory: bool = False
    """Train nothing: print the memory that the run will take, by part and stage."""
    memory_limit: str | None = None
    """Train nothing: say with which micro-batch the run fits into this, such as 2GiB, or what to change first."""

    @property
    def watch(self) -> WatchOptions:
        """What the run is watched by."""
        thresholds = default_thresholds() if self.thresholds is None else read_thresholds(self.thresholds)
        return WatchOptions(thresholds, None if self.stop_on == "never" else self.stop_on)


def run(arguments: list[str]) -> int:
    """Train, or continue a run; or say what memory it will take. Return the exit code."""
    job: Job[TrainConfig] = Job(
        command="train",
        options=Options,
        empty=TrainConfig,
        defaults=defaults,
        load=_load,
        execute=_execute,
        default_name=lambda config: f"{source_name(config)}-seed{config.seed}",
        before=_before,
    )
    given = {one.partition("=")[0].replace("_", "-") for one in arguments}
    if {"--explain-memory", "--memory-limit"} & given:
        return _explain(options_of(job, arguments))
    return make_run(job, arguments)


def _explain(options: Options) -> int:
    limit = None if options.memory_limit is None else parse_size(options.memory_limit)
    check_sources(options.train)
    apply_environment(options.train.numerics, options.train.resolved_threads)
    import rlhf_core.training  # noqa: F401 - what a run loads is a part of its memory
    from rlhf_core.commands.explain_memory import explain

    return explain(options.train, limit, options.runs)


def _before(options: Options) -> None:
    require_installed(options.report_to)
    _ = options.watch  # a file of thresholds that cannot be read shows before there is a run
    if options.profile:
        # Kineto, torch's recorder of operators, prints lines of its own unless told before torch is loaded.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def _load(config: TrainConfig, place: "DataPlace") -> Any:
    from rlhf_core.experiment import load_inputs

    return load_inputs(config, place)


def _execute(config: TrainConfig, options: Options, inputs: Any, folder: Path) -> None:
    from rlhf_core.training import run_training

    run_training(
        config,
        inputs,
        folder,
        resumed=options.resume,
        watch=options.watch,
        profile=options.profile,
        report_to=options.report_to,
    )
