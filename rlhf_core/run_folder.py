"""The folders of runs: their names, how one is made, kept to one process and found, and which command made it.

This module does not import torch.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_core.durable_files import write_atomically

CONFIG_FILE = "config.json"
ENVIRONMENT_FILE = "environment.json"
EVALUATION_FILE = "evaluation.json"
_KINDS = {
    "reward_model": "pipeline",
    "ppo": "train",
    "judging": "eval",
    "preference": "reward",
    "dpo": "dpo",
    "training": "sft",
}
"""By which key of its configuration a command's run is known; the first that is there tells."""


def kind_of(config: Mapping[str, Any]) -> str:
    """Return which command made a run, by its configuration; one that says nothing is taken for that of ``train``."""
    return next((kind for key, kind in _KINDS.items() if key in config), "train")


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
LONGEST_NAME = 200
"""Characters of a run's name: file systems take 255, and some names here are made from it."""


def check_new_name(runs: Path, name: str | None) -> None:
    """Raise when a new run cannot have this name: early, before anything is loaded.

    Raises:
        ValueError: the name is not a plain folder name, or too long.
        FileExistsError: a run of that name is there already, or ``runs`` is no folder.
    """
    file = next((one for one in (runs, *runs.parents) if one.is_file()), None)
    if file is not None:
        raise FileExistsError(f"cannot make a run in {str(runs)!r} ({str(file)!r} is a file); give --runs a folder")
    if name is None:
        return
    if len(name) > LONGEST_NAME:
        raise ValueError(f"run name {name[:20]!r}... has {len(name)} characters; give one of {LONGEST_NAME} or fewer")
    if not _NAME.fullmatch(name) or name == "latest":
        raise ValueError(f"run name {name!r}: use letters, digits, '.', '_' and '-', and not the word 'latest'")
    if (runs / name).exists():
        raise _taken(runs / name)


def _taken(folder: Path) -> FileExistsError:
    return FileExistsError(f"run {str(folder)!r} exists; continue it with --resume, or give another --name")


def create_run(runs: Path, name: str | None, default_name: str, config: str) -> Path:
    """Make the folder of a new run with its ``config.json``, and point ``latest`` to it.

    Without a name, ``default_name`` is taken, or the first of ``default_name-2``, ``-3`` … that is free; what a plain
    folder name cannot have in it becomes ``-``.

    Raises:
        ValueError, FileExistsError: as :func:`check_new_name`.
        OSError: the folder cannot be made or written; nothing is left of it.
    """
    check_new_name(runs, name)
    try:
        runs.mkdir(parents=True, exist_ok=True)
        folder = _make_first_free(runs, plain(default_name)) if name is None else _make(runs / name)
    except OSError as error:
        if name is not None and isinstance(error, FileExistsError) and (runs / name).is_dir():
            raise _taken(runs / name) from None  # another process has just made it
        raise OSError(
            f"cannot make a run in {str(runs)!r} ({error.strerror}); give --runs a folder to write to"
        ) from None
    try:
        write_atomically(folder / CONFIG_FILE, config.encode())
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    point_latest(folder)
    return folder


def plain(name: str) -> str:
    """Return a name with what a plain folder name cannot have in it replaced by ``-``, and no longer than it may be."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")[:LONGEST_NAME] or "run"


def _make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _make_first_free(runs: Path, name: str) -> Path:
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            return _make(runs / (name if number == 1 else f"{name}-{number}"))
    raise AssertionError("unreachable: a name is always free")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Keep a run's folder to this process while it writes there; the lock goes with the process, however it ends.

    Raises:
        ValueError: another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder.resolve()} is being written by another process; wait for it, or end it"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):  # a file system without locks
                raise
        yield
    finally:
        os.close(descriptor)


def point_latest(folder: Path) -> None:
    """Point ``latest``, beside ``folder``, to it."""
    link = folder.parent / f".latest.{folder.name}"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(folder.parent / "latest")


def find_run(run: str, runs: Path) -> Path:
    """Return the folder of a run given by its name under ``runs``, or by its path.

    Raises:
        FileNotFoundError: neither holds a run.
    """
    for folder in (runs / run, Path(run)):
        if (folder / CONFIG_FILE).is_file():
            return folder
    names = sorted(path.parent.name for path in runs.glob(f"*/{CONFIG_FILE}") if path.parent.name != "latest")
    known = f"runs in {str(runs)!r}: {', '.join(names)}" if names else f"there are no runs in {str(runs)!r}"
    raise FileNotFoundError(f"no run {run!r} (a run is a folder with {CONFIG_FILE}); {known}")
