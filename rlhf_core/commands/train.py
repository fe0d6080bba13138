"""``rlhf train``."""

import argparse
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from rlhf_core import config as configuration
from rlhf_core import runlog
from rlhf_core.alert_thresholds import default_thresholds, read_thresholds
from rlhf_core.commands.options import USAGE_ERROR, UsageError, complain, describe, parse
from rlhf_core.config import TrainConfig
from rlhf_core.numerics import apply_environment
from rlhf_core.stopping import Stopped
from rlhf_core.watch import WatchOptions


@dataclass(frozen=True)
class Options:
    """Train a language model with PPO.

    With no options: the embedded film reviews, from nothing, on the CPU, in a few minutes. With --data: your own
    labelled sentences.
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
    profile: bool = False
    """Write profiles/: time and memory by stage, a trace for Perfetto, operators. Changes no number of the run."""
    stop_on: Literal["critical", "warning", "never"] = "never"
    """Stop, saved and ready to --resume, when an alert of this severity or a worse one is raised; see rlhf alerts."""
    thresholds: Path | None = None
    """A .toml file that changes severities and thresholds of the alerts."""

    @property
    def watch(self) -> WatchOptions:
        """What the run is watched by."""
        thresholds = default_thresholds() if self.thresholds is None else read_thresholds(self.thresholds)
        return WatchOptions(thresholds, None if self.stop_on == "never" else self.stop_on)


def run(arguments: list[str]) -> int:
    """Train, or continue a run; return the exit code."""
    early = _early_options(arguments)
    runs = Path(early["runs"] or "runs")
    file = Path(early["config"]) if early["config"] else None
    if early["resume"]:
        folder = runlog.find_run(early["name"] or "latest", runs)
        recorded = configuration.read_config_file(folder / runlog.CONFIG_FILE, TrainConfig())
        asked = configuration.read_config_file(file, recorded) if file else recorded
        options = parse(Options, arguments, "train", Options(train=asked))
        _refuse_changes(recorded, options.train)
        return _train(recorded, options, lambda: folder)
    base = configuration.defaults(early["data"], file)
    options = parse(Options, arguments, "train", Options(train=base))
    config = options.train
    configuration.check_sources(config)
    runlog.check_new_name(runs, early["name"])
    task = Path(config.data).resolve().name if config.data else "embedded"
    default_name, content = f"{task}-seed{config.seed}", configuration.to_json(config)
    return _train(config, options, lambda: runlog.create_run(runs, early["name"], default_name, content))


def _refuse_changes(recorded: TrainConfig, asked: TrainConfig) -> None:
    changes = configuration.differences(recorded, asked)
    if changes:
        name, old, new = changes[0]
        raise UsageError(
            f"--resume continues the recorded run, in which {name} is {old!r} and not {new!r}; "
            "leave the option out, or start a new run"
        )


def _train(config: TrainConfig, options: Options, open_run: Callable[[], Path]) -> int:
    watch = options.watch
    apply_environment(config.numerics, config.resolved_threads)
    if options.profile:
        # Kineto, torch's recorder of operators, prints lines of its own unless told before torch is loaded.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # These load torch, which reads the environment once.
    from rlhf_core.experiment import load_inputs
    from rlhf_core.training import run_training

    inputs = load_inputs(config)
    folder = open_run()
    place = folder.resolve()
    resume = f"rlhf train --resume --name {shlex.quote(place.name)} --runs {shlex.quote(str(place.parent))}"
    try:
        run_training(config, inputs, folder, resumed=options.resume, watch=watch, profile=options.profile)
    except Stopped as stopped:
        return complain(f"{stopped}; continue with: {resume}", stopped.exit_code)
    except FloatingPointError as error:
        checkpoints = folder / "checkpoints"
        kept = f"earlier checkpoints stay in {checkpoints}" if checkpoints.exists() else "nothing was saved yet"
        return complain(f"{error}; {kept}", USAGE_ERROR)
    except OSError as error:
        return complain(f"{describe(error)}; put that right, then continue with: {resume}", USAGE_ERROR)
    return 0


def _early_options(arguments: list[str]) -> dict[str, Any]:
    """Return the options that decide the defaults of the others."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    for name in ("--data", "--config", "--name", "--runs"):
        parser.add_argument(name)
    parser.add_argument("--resume", action="store_true")
    try:
        return vars(parser.parse_known_args(arguments)[0])
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None
