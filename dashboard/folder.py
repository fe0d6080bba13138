"""The folder of runs as the page may see it: names from its listing, files from inside it, never through a link."""

import os
import stat
from pathlib import Path
from typing import IO

from rlhf_core import runlog

RUNS_VARIABLE = "RLHF_RUNS"
MARKS = (runlog.CONFIG_FILE, runlog.METRICS_FILE)
"""A folder that holds one of these is a run; a run that has just begun has only the first."""


class NoSuchRun(LookupError):
    """A run was asked for that the listing does not have."""


def runs_folder() -> Path:
    """Return the folder of runs: ``RLHF_RUNS``, or ``runs`` here, or else ``runs`` beside the dashboard."""
    if given := os.environ.get(RUNS_VARIABLE):
        return Path(given).resolve()
    here = Path("runs").resolve()
    beside = Path(__file__).resolve().parents[1] / "runs"
    return beside if not here.is_dir() and beside.is_dir() else here


def list_runs(folder: Path) -> list[str]:
    """Return the names of the runs in a folder, the newest first; links and other files are left out."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    born = {name: when for name in names if (when := _born(folder / name)) is not None}
    return sorted(born, key=lambda name: (-born[name], name))


def _born(run: Path) -> int | None:
    for mark in MARKS:
        try:
            found = os.lstat(run / mark)
        except OSError:
            continue
        if stat.S_ISREG(found.st_mode):
            return found.st_mtime_ns
    return None


def find(folder: Path, name: str) -> Path:
    """Return the folder of a listed run.

    Raises:
        NoSuchRun: the listing does not have that name.
    """
    if name not in list_runs(folder):
        raise NoSuchRun(f"no run {name!r} in {str(folder)!r}")
    return folder / name


def plain_file(run: Path, *parts: str) -> Path | None:
    """Return a regular file inside a run's folder, or None; what a link leads to is not inside."""
    path = run.joinpath(*parts)
    try:
        if path.resolve() != path or not stat.S_ISREG(os.lstat(path).st_mode):
            return None
    except OSError:
        return None
    return path


def open_plain(run: Path, *parts: str) -> IO[bytes] | None:
    """Open such a file for reading, or return None."""
    path = plain_file(run, *parts)
    if path is None:
        return None
    try:
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    except OSError:
        return None
