"""The command ``rlhf``. It loads torch only for what trains, and only after the environment for it is set."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from rich.table import Table
from rich.text import Text

from rlhf_core import config as configuration
from rlhf_core import runlog
from rlhf_core.config import TrainConfig
from rlhf_core.numerics import apply_environment
from rlhf_core.terminal import console, printable

USAGE_ERROR = 2
C = TypeVar("C")


class UsageError(Exception):
    """The command line cannot be understood."""


@dataclass(frozen=True)
class TrainOptions:
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


@dataclass(frozen=True)
class CompareOptions:
    """Say at which step, metric and value two runs first differ (exit code 1), or that they are identical."""

    a: tyro.conf.Positional[str]
    """A run: its folder, or its name under --runs."""
    b: tyro.conf.Positional[str]
    """Another."""
    runs: Path = Path("runs")
    """Where runs are kept."""


@dataclass(frozen=True)
class SamplesOptions:
    """Show a run's completions."""

    run: tyro.conf.Positional[str] = "latest"
    """A run: its folder, or its name under --runs."""
    step: int | None = None
    """Only this step. None: the last steps."""
    last: int = 3
    """How many steps, when --step is not given."""
    runs: Path = Path("runs")
    """Where runs are kept."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code; what a user did wrong is one line on standard error, and code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = run_command(arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        code = _complain("interrupted", 130)
    except (UsageError, ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("RLHF_TRACEBACK"):
            raise
        code = _complain(_describe(error), USAGE_ERROR)
    sys.exit(code)


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    return " ".join(printable(line.strip()) for line in text.splitlines())


def _complain(message: str, code: int) -> int:
    print(f"rlhf: {message}", file=sys.stderr)
    return code


def run_command(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    commands: dict[str, tuple[Callable[[list[str]], int], str]] = {
        "train": (train, TrainOptions.__doc__ or ""),
        "compare": (compare, CompareOptions.__doc__ or ""),
        "samples": (samples, SamplesOptions.__doc__ or ""),
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: rlhf COMMAND [OPTIONS]\n")
        for name, (_, text) in commands.items():
            print(f"  {name:<9}{text.strip().splitlines()[0]}")
        print("\nrlhf COMMAND --help lists the options of a command.")
        return 0 if arguments else USAGE_ERROR
    if arguments[0] not in commands:
        raise UsageError(f"unknown command {arguments[0]!r}; choose from {', '.join(commands)}")
    return commands[arguments[0]][0](arguments[1:])


def parse(options: type[C], arguments: list[str], command: str, default: C | None = None) -> C:
    """Return the options; an error of the command line becomes one line.

    Raises:
        UsageError: an option is unknown, or its value is.
        ValueError: a value is out of range.
    """
    given: dict[str, Any] = {"args": arguments, "prog": f"rlhf {command}"}
    if default is not None:
        given["default"] = default
    if {"-h", "--help"} & set(arguments):
        return tyro.cli(options, **given)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint):
            return tyro.cli(options, **given)
    except SystemExit:
        words = " ".join(line.strip("│╭╮╰╯─ ") for line in complaint.getvalue().splitlines())
        raise UsageError(" ".join(words.split())) from None


def train(arguments: list[str]) -> int:
    """``rlhf train``."""
    early = _early_options(arguments)
    runs = Path(early["runs"] or "runs")
    file = Path(early["config"]) if early["config"] else None
    if early["resume"]:
        run = runlog.find_run(early["name"] or "latest", runs)
        recorded = configuration.read_config_file(run / runlog.CONFIG_FILE, TrainConfig())
        asked = configuration.read_config_file(file, recorded) if file else recorded
        asked = parse(TrainOptions, arguments, "train", TrainOptions(train=asked)).train
        _refuse_changes(recorded, asked)
        return _train(recorded, run, resumed=True)
    base = configuration.defaults(early["data"], file)
    config = parse(TrainOptions, arguments, "train", TrainOptions(train=base)).train
    configuration.check_sources(config)
    task = Path(config.data).resolve().name if config.data else "embedded"
    run = runlog.create_run(runs, early["name"], f"{task}-seed{config.seed}")
    runlog.write_atomically(run / runlog.CONFIG_FILE, configuration.to_json(config).encode())
    return _train(config, run, resumed=False)


def _refuse_changes(recorded: TrainConfig, asked: TrainConfig) -> None:
    changes = configuration.differences(recorded, asked)
    if changes:
        name, old, new = changes[0]
        raise UsageError(
            f"--resume continues the recorded run, in which {name} is {old!r} and not {new!r}; "
            "leave the option out, or start a new run"
        )


def _train(config: TrainConfig, run: Path, *, resumed: bool) -> int:
    apply_environment(config.numerics, config.resolved_threads)
    from rlhf_core import pipeline  # loads torch, which reads the environment once

    how_to_resume = f"rlhf train --resume --name {run.resolve().name} --runs {run.resolve().parent}"
    try:
        pipeline.run_training(config, run, resumed=resumed)
    except pipeline.Stopped as stopped:
        return _complain(f"{stopped}; continue with: {how_to_resume}", stopped.exit_code)
    except FloatingPointError as error:
        return _complain(f"{_describe(error)}; what was saved before is in {run / 'checkpoints'}", USAGE_ERROR)
    return 0


def compare(arguments: list[str]) -> int:
    """``rlhf compare``."""
    options = parse(CompareOptions, arguments, "compare")
    folders = [runlog.find_run(name, options.runs) for name in (options.a, options.b)]
    difference = runlog.compare(*folders)
    if difference is None:
        print("identical")
        return 0
    print(f"{difference}")
    return 1


def samples(arguments: list[str]) -> int:
    """``rlhf samples``."""
    options = parse(SamplesOptions, arguments, "samples")
    run = runlog.find_run(options.run, options.runs)
    rows = list(runlog.read(run / runlog.SAMPLES_FILE))
    steps = sorted({row["step"] for row in rows})
    shown = steps[-options.last :] if options.step is None else [options.step]
    if not set(shown) <= set(steps) or not steps:
        known = f"steps {steps[0]} to {steps[-1]}" if steps else "no steps"
        raise ValueError(f"{run} has samples of {known}; step {options.step} is not among them")
    table = Table("step", "reward", "kl", "prompt", "completion")
    for row in rows:
        if row["step"] in shown:
            texts = (Text(printable(row[name])) for name in ("prompt", "completion"))
            table.add_row(str(row["step"]), f"{row['reward']:+.3f}", f"{row['kl']:.2f}", *texts)
    console.print(table)
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
