"""The folder of runs as the page may see it: names from its listing, files from inside it, never through a link."""

import os
import stat
from pathlib import Path
from typing import IO, Any

from rlhf_core import run_folder, runlog

RUNS_VARIABLE = "RLHF_RUNS"
MARKS = (run_folder.CONFIG_FILE, runlog.METRICS_FILE)
"""A folder that holds one of these is a run; a run that has just begun has only the first."""
JSON_BYTES = 1 << 20
"""A configuration that is longer is none of ours."""


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
    """Return the names of the runs in a folder, the newest first; links and other files are left out.

    A pipeline is no run, but its stages are, named ``PIPELINE/STAGE``.
    """
    names = [name for one in _folders(folder) for name in ([one] if _is_run(folder / one) else _stages(folder, one))]
    born = {name: when for name in names if (when := _born(folder / name)) is not None}
    return sorted(born, key=lambda name: (-born[name], name))


def _folders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [name for name in names if _is_text(name)]


def _is_text(name: str) -> bool:
    """Return whether a name can be shown and stand in a URL: it is UTF-8, as Linux does not ask a name to be."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_run(path: Path) -> bool:
    """Return whether a folder is not a pipeline's, which has a configuration and no log of its own."""
    logged = os.path.lexists(path / runlog.METRICS_FILE)
    return logged or run_folder.kind_of(read_json(path, run_folder.CONFIG_FILE)) != "pipeline"


def _stages(folder: Path, name: str) -> list[str]:
    return [f"{name}/{stage}" for stage in _folders(folder / name)]


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


def read_json(run: Path, *parts: str) -> dict[str, Any]:
    """Return a small JSON object of a run's folder; empty when it is not there or is none."""
    file = open_plain(run, *parts)
    if file is None:
        return {}
    with file:
        try:
            found = runlog.parse_json(file.read(JSON_BYTES))
        except (OSError, ValueError):
            return {}
    return found if isinstance(found, dict) else {}
