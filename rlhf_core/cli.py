"""The command ``rlhf``. It loads torch only for what trains, and only after the environment for it is set."""

import argparse
import contextlib
import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
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

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """A run: its name under --runs, or its folder."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """Another."""
    runs: Path = Path("runs")
    """Where runs are kept."""


@dataclass(frozen=True)
class SamplesOptions:
    """Show a run's completions."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = "latest"
    """A run: its name under --runs, or its folder."""
    step: int | None = None
    """Only this step. None: the last steps."""
    last: int = 3
    """How many steps, when --step is not given."""
    runs: Path = Path("runs")
    """Where runs are kept."""

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ValueError(f"--last is {self.last}; it must be 1 or more")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code; what a user did wrong is one line on standard error, and code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = run_command(arguments)
    except KeyboardInterrupt:
        code = _complain("interrupted", 128 + signal.SIGINT)
    except (UsageError, ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("RLHF_TRACEBACK"):
            raise
        code = _complain(_describe(error), USAGE_ERROR)
    sys.exit(code)


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _complain(message: str, code: int) -> int:
    """Print one line that cannot harm a terminal, whatever file names and texts it quotes."""
    print(f"rlhf: {printable(' '.join(message.split()))}", file=sys.stderr)
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
        UsageError: an option is unknown, or its value is, or is out of range.
    """
    given: dict[str, Any] = {"args": arguments, "prog": f"rlhf {command}"}
    if default is not None:
        given["default"] = default
    if {"-h", "--help"} & set(arguments):
        return tyro.cli(options, **given)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint), _wide_terminal():
            return tyro.cli(options, **given)
    except SystemExit:
        raise UsageError(f"{_gist(complaint.getvalue())}; see rlhf {command} --help") from None


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    """Keep tyro from breaking words: its complaint goes on one line anyway."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _gist(complaint: str) -> str:
    """Return what tyro's framed complaint says, without the frame, its title and the help behind it."""
    lines = [line.strip("│╭╮╰╯─ ") for line in complaint.splitlines()][1:]
    text = " ".join(line if line.strip("-") else ";" for line in lines if line).strip("; ")
    text = re.split(r"Argument helptext:|For full helptext", text)[0]
    return re.sub(r"Error parsing ([A-Za-z][A-Za-z.]*: )?", "", text).replace(" ;", ";").strip("; .")


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
        return _train(recorded, lambda: run, resumed=True)
    base = configuration.defaults(early["data"], file)
    config = parse(TrainOptions, arguments, "train", TrainOptions(train=base)).train
    configuration.check_sources(config)
    runlog.check_new_name(runs, early["name"])
    task = Path(config.data).resolve().name if config.data else "embedded"
    default_name, content = f"{task}-seed{config.seed}", configuration.to_json(config)
    return _train(config, lambda: runlog.create_run(runs, early["name"], default_name, content), resumed=False)


def _refuse_changes(recorded: TrainConfig, asked: TrainConfig) -> None:
    changes = configuration.differences(recorded, asked)
    if changes:
        name, old, new = changes[0]
        raise UsageError(
            f"--resume continues the recorded run, in which {name} is {old!r} and not {new!r}; "
            "leave the option out, or start a new run"
        )


def _train(config: TrainConfig, open_run: Callable[[], Path], *, resumed: bool) -> int:
    apply_environment(config.numerics, config.resolved_threads)
    from rlhf_core import pipeline  # loads torch, which reads the environment once

    inputs = pipeline.load_inputs(config)
    run = open_run()
    place = run.resolve()
    resume = f"rlhf train --resume --name {shlex.quote(place.name)} --runs {shlex.quote(str(place.parent))}"
    try:
        pipeline.run_training(config, inputs, run, resumed=resumed)
    except pipeline.Stopped as stopped:
        return _complain(f"{stopped}; continue with: {resume}", stopped.exit_code)
    except FloatingPointError as error:
        checkpoints = run / "checkpoints"
        kept = f"earlier checkpoints stay in {checkpoints}" if checkpoints.exists() else "nothing was saved yet"
        return _complain(f"{error}; {kept}", USAGE_ERROR)
    except OSError as error:
        return _complain(f"{_describe(error)}; put that right, then continue with: {resume}", USAGE_ERROR)
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
    rows = list(runlog.read_samples(run))
    steps = sorted({row["step"] for row in rows})
    if not steps:
        raise ValueError(f"{run} has no samples; it has done no step, or was run with --log.samples-per-step 0")
    if options.step is not None and options.step not in steps:
        raise ValueError(f"{run} has samples of steps {steps[0]} to {steps[-1]}; step {options.step} is not among them")
    shown = steps[-options.last :] if options.step is None else [options.step]
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
