"""What the commands that make a run share: options from a file, the run's folder, resuming, and how a run ends."""

import argparse
import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rlhf_core import config_files, run_folder, runlog
from rlhf_core.commands.options import USAGE_ERROR, UsageError, complain, describe, parse
from rlhf_core.config import RunConfig
from rlhf_core.durable_files import write_atomically
from rlhf_core.garbage import loading_for_good
from rlhf_core.numerics import apply_environment
from rlhf_core.stopping import Stopped

if TYPE_CHECKING:
    from rlhf_core.run_setup import DataPlace

C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class RunOptions:
    """The options of every command that makes a run; a command adds its configuration in a field of its own name."""

    config: Path | None = None
    """A .toml file or a run's config.json that sets options; the command line takes precedence."""
    name: str | None = None
    """The run's name: its folder under --runs."""
    runs: Path = Path("runs")
    """Where runs are kept."""
    resume: bool = False
    """Continue the run --name (or the latest) from where it stands, with the options it began with."""


@dataclass(frozen=True)
class Job(Generic[C]):
    """A command that makes a run."""

    command: str
    """Its name, and that of the field of its options that holds the configuration."""
    options: type[RunOptions]
    """The command's options."""
    empty: Callable[[], C]
    """The configuration with nothing given."""
    defaults: Callable[[str | None, Path | None], C]
    """What the command line starts from, given ``--data`` and ``--config``."""
    load: Callable[[C, "DataPlace"], Any]
    """Loads what the run needs, so that whatever is wrong with it shows before there is a run."""
    execute: Callable[[C, Any, Any, Path], None]
    """Does the run, given the command's options, what was loaded and the run's folder."""
    default_name: Callable[[C], str]
    """The run's name where none is given."""
    before: Callable[[Any], None] = lambda options: None
    """Looks at the command's options before torch is loaded."""
    reopens: bool = False
    """Whether a run of that name is opened again and what changed in it done anew, as ``rlhf pipeline`` does."""


def make_run(job: Job[C], arguments: list[str]) -> int:
    """Do a run, or continue one; return the exit code."""
    early = early_options(arguments)
    # Absolute, as a reward function may change the working directory; resolved, as `latest` may point elsewhere soon.
    runs = Path(early["runs"] or "runs").absolute()
    file = Path(early["config"]) if early["config"] else None
    if early["resume"]:
        folder = run_folder.find_run(early["name"] or "latest", runs).resolve()
        recorded = config_files.read_config_file(folder / run_folder.CONFIG_FILE, job.empty())
        asked = config_files.read_config_file(file, recorded) if file else recorded
        options = _parsed(job, arguments, asked)
        _refuse_changes(recorded, getattr(options, job.command))
        with run_folder.writing(folder):
            return _do(job, located(recorded, working_directory(folder)), options, folder, lambda: folder)
    options = _parsed(job, arguments, job.defaults(early["data"], file))
    config: C = getattr(options, job.command)
    check_sources(config)
    if job.reopens and (known := _known(job, config, runs, early["name"])):
        again = config_files.to_json(config)
        with run_folder.writing(known):
            return _do(job, config, options, None, lambda: _rewritten(known, again), runs)
    run_folder.check_new_name(runs, early["name"])
    default_name, content = job.default_name(config), config_files.to_json(config)
    with contextlib.ExitStack() as until_done:

        def create() -> Path:
            folder = run_folder.create_run(runs, early["name"], default_name, content)
            until_done.enter_context(run_folder.writing(folder))
            return folder

        return _do(job, config, options, None, create, runs)


def options_of(job: Job[C], arguments: list[str]) -> Any:
    """Return the options of a command as a new run of it would have them, or with ``--resume`` the recorded ones."""
    early = early_options(arguments)
    file = Path(early["config"]) if early["config"] else None
    if early["resume"]:
        file = run_folder.find_run(early["name"] or "latest", Path(early["runs"] or "runs")) / run_folder.CONFIG_FILE
    return _parsed(job, arguments, job.defaults(early["data"], file))


def check_sources(config: RunConfig) -> None:
    """Raise FileNotFoundError when the data is missing, before anything is created or loaded."""
    if config.data is not None and not config.data.startswith("hub:") and not Path(config.data).exists():
        hub = f", and for the hub write hub:{config.data}" if config.data.count("/") == 1 else ""
        raise FileNotFoundError(
            f"no data folder {config.data!r}, nor a file of that name; give a folder with a *.pos and a *.neg file, or "
            f"a data file (.jsonl .json .csv .tsv .parquet .txt){hub}"
        )


def _known(job: Job[C], config: C, runs: Path, name: str | None) -> Path | None:
    """Return the run of that name (or of the default one) if it is one of this command, else None."""
    folder = runs / (name or run_folder.plain(job.default_name(config)))
    if not (folder / run_folder.CONFIG_FILE).is_file():
        return None
    try:
        config_files.read_config_file(folder / run_folder.CONFIG_FILE, job.empty())
    except ValueError:
        return None
    return folder


def _rewritten(folder: Path, content: str) -> Path:
    write_atomically(folder / run_folder.CONFIG_FILE, content.encode())
    run_folder.point_latest(folder)
    return folder


def _parsed(job: Job[C], arguments: list[str], base: C) -> Any:
    """Return the command's options."""
    if any(one == "--reward" or one.startswith("--reward=") for one in arguments):
        base = dataclasses.replace(base, reward=())  # what is given replaces what a file says, as with other options
    configured: dict[str, Any] = {job.command: base}
    return parse(job.options, arguments, job.command, job.options(**configured))


def _refuse_changes(recorded: RunConfig, asked: RunConfig) -> None:
    changes = config_files.differences(recorded, asked)
    if changes:
        name, old, new = changes[0]
        raise UsageError(
            f"--resume continues the recorded run, in which {name} is {old!r} and not {new!r}; "
            "leave the option out, or start a new run"
        )


def _do(
    job: Job[C],
    config: C,
    options: Any,
    resumed: Path | None,
    open_run: Callable[[], Path],
    runs: Path | None = None,
) -> int:
    job.before(options)
    apply_environment(config.numerics, config.resolved_threads)
    where = runs if resumed is None else resumed.parent
    assert where is not None
    with loading_for_good():
        # This loads torch, which reads the environment once.
        from rlhf_core.run_setup import data_place

        if resumed is not None and (begun_in := working_directory(resumed)):
            # Not before, when a file there could stand in for a module of torch's.
            find_modules_first_in(begun_in, Path.cwd())
        with data_place(where, resumed) as place:
            inputs = job.load(config, place)
            folder = open_run()
            place.hand_over(folder)
    name, parent = shlex.quote(folder.name), shlex.quote(str(folder.parent))
    resume = f"rlhf {job.command} --resume --name {name} --runs {parent}"
    try:
        job.execute(config, options, inputs, folder)
    except Stopped as stopped:
        return complain(f"{stopped}; continue with: {resume}", stopped.exit_code)
    except FloatingPointError as error:
        checkpoints = next(iter(sorted([*folder.glob("checkpoints"), *folder.glob("*/checkpoints")])), None)
        kept = f"earlier checkpoints stay in {checkpoints}" if checkpoints else "nothing was saved yet"
        return complain(f"{error}; {kept}", USAGE_ERROR)
    except OSError as error:
        return complain(f"{describe(error)}; put that right, then continue with: {resume}", USAGE_ERROR)
    except ValueError as error:
        from rlhf_core.reward_functions import RewardError

        if not isinstance(error, RewardError):
            raise
        return complain(f"{error}; put that right, then continue with: {resume}", USAGE_ERROR)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        remedy = f"a smaller batch or micro-batch needs less; with more of it free, continue with: {resume}"
        return complain(f"out of memory: {describe(error).partition(chr(10))[0]}; {remedy}", USAGE_ERROR)
    return 0


def _out_of_memory(error: Exception) -> bool:
    """Whether there was no memory left: numpy and torch's allocators for GPU and CPU say so in three ways."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def working_directory(run: Path) -> Path | None:
    """Return the directory that a run was begun in, as its ``environment.json`` has it; None when it is not there."""
    try:
        found = runlog.parse_json((run / run_folder.ENVIRONMENT_FILE).read_text(encoding="utf-8")).get(
            "working_directory"
        )
    except (OSError, ValueError, AttributeError):
        return None
    return Path(found) if isinstance(found, str) and Path(found).is_dir() else None


def find_modules_first_in(*directories: Path) -> None:
    """Have modules, such as those of reward functions, looked for in these directories first, in this order."""
    first = [str(one) for one in dict.fromkeys(directories)]
    sys.path[:] = [*first, *(one for one in sys.path if one not in first)]


def located(config: C, directory: Path | None) -> C:
    """Return the configuration of a resumed run with the paths that were typed in another directory found there.

    A path that is not there any more stays as it was typed.
    """
    if directory is None or directory == Path.cwd():
        return config

    def there(path: str | None) -> str | None:
        return str(directory / path) if path and (directory / path).exists() else path

    changes: dict[str, Any] = {
        "data": there(config.data),
        "reward": tuple(_reward_there(one, directory) for one in config.reward),
    }
    model = getattr(config, "model", None)
    if model is not None:
        changes["model"] = dataclasses.replace(model, path=there(model.path))
    if hasattr(config, "reference"):
        changes["reference"] = there(config.reference)
    return dataclasses.replace(config, **changes)


def _reward_there(text: str, directory: Path) -> str:
    name, equals, weight = text.rpartition("=")
    name, behind = (name, equals + weight) if equals else (text, "")
    path = name.removeprefix("model:")
    return f"model:{directory / path}{behind}" if (directory / path).is_dir() else text


def source_name(config: RunConfig) -> str:
    """Return a name for the data of a run."""
    if config.data is None:
        return "embedded"
    name = (
        config.data.removeprefix("hub:").replace(":", "-")
        if config.data.startswith("hub:")
        else Path(config.data).resolve().name
    )
    return name.partition(".")[0] or name


def early_options(arguments: list[str]) -> dict[str, Any]:
    """Return the options that decide the defaults of the others."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    for name in ("--data", "--config", "--name", "--runs"):
        parser.add_argument(name)
    parser.add_argument("--resume", action="store_true")
    try:
        found = vars(parser.parse_known_args(arguments)[0])
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None
    # "None" is how the command line spells that there is none.
    return {name: None if value == "None" else value for name, value in found.items()}


def stage_job(
    command: str,
    options: type[RunOptions],
    empty: Callable[[], C],
    load: Callable[[C, "DataPlace"], Any],
    execute: Callable[[C, Any, Any, Path], None],
    reopens: bool = False,
) -> Job[C]:
    """Return the job of a command whose defaults are its configuration's, changed by ``--config``."""

    def defaults(data: str | None, file: Path | None) -> C:
        return empty() if file is None else config_files.read_config_file(file, empty())

    def default_name(config: C) -> str:
        return f"{source_name(config)}-{command}-seed{config.seed}"

    return Job(command, options, empty, defaults, load, execute, default_name, reopens=reopens)
