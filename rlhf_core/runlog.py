"""The run directory: its files, how rows are written, read and cut back, and how two runs are compared.

This module does not import torch.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
TIMINGS_FILE = "timings.jsonl"
SAMPLES_FILE = "samples.jsonl"
ENVIRONMENT_FILE = "environment.json"
CONFIG_FILE = "config.json"
EVALUATION_FILE = "evaluation.json"
STEP_LOGS = (METRICS_FILE, TIMINGS_FILE, SAMPLES_FILE)
DETERMINISTIC_LOGS = (METRICS_FILE, SAMPLES_FILE)


def encode(row: dict[str, Any]) -> str:
    """Return one line of JSON with sorted keys; NaN and infinity are refused, they are not JSON."""
    return json.dumps(row, sort_keys=True, allow_nan=False, ensure_ascii=True) + "\n"


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows in a single write, so that a reader sees whole lines but for one that a crash tears."""
    data = "".join(encode(row) for row in rows).encode()
    with path.open("ab", buffering=0) as file:
        written = file.write(data)
    if written != len(data):
        raise OSError(f"{path}: wrote {written} of {len(data)} bytes; is the disk full?")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a log.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a JSON object; the message names the file and the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no log {str(path)!r}")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                torn = "" if line.endswith(b"\n") else " (the last line is torn; the run was killed while writing it)"
                raise ValueError(f"{path}:{number}: not JSON: {error}{torn}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: holds {row!r}; each line must be a JSON object")
            yield row


def keep_through_step(path: Path, step: int) -> None:
    """Cut a log back to its rows up to ``step``; a torn last line goes too. A missing log stays missing."""
    if not path.exists():
        return
    kept = []
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
    write_atomically(path, b"".join(kept))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside ``path``, sync it and rename it over ``path``: readers see the old content or the new."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def create_run(runs: Path, name: str | None, default_name: str) -> Path:
    """Make the folder of a new run and point ``latest`` to it.

    Without a name, ``default_name`` is taken, or the first of ``default_name-2``, ``-3`` … that is free.

    Raises:
        ValueError: the name is not a plain folder name.
        FileExistsError: a run of that name is there already.
    """
    if name is not None and (not _NAME.fullmatch(name) or name == "latest"):
        raise ValueError(f"run name {name!r}: use letters, digits, '.', '_' and '-', and not the word 'latest'")
    runs.mkdir(parents=True, exist_ok=True)
    if name is not None:
        folder = runs / name
        try:
            folder.mkdir()
        except FileExistsError:
            raise FileExistsError(f"run {folder} exists; continue it with --resume, or give another --name") from None
    else:
        folder = _first_free(runs, default_name)
    point_latest(folder)
    return folder


def _first_free(runs: Path, default_name: str) -> Path:
    number = 1
    while True:
        folder = runs / (default_name if number == 1 else f"{default_name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def point_latest(folder: Path) -> None:
    """Point ``latest``, beside ``folder``, to it."""
    link = folder.parent / f".latest.{folder.name}"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(folder.parent / "latest")


def find_run(run: str, runs: Path) -> Path:
    """Return the folder of a run given by its path or by its name under ``runs``.

    Raises:
        FileNotFoundError: neither holds a run.
    """
    for folder in (Path(run), runs / run):
        if (folder / CONFIG_FILE).is_file():
            return folder
    names = sorted(path.parent.name for path in runs.glob(f"*/{CONFIG_FILE}") if path.parent.name != "latest")
    known = f"runs in {runs}: {', '.join(names)}" if names else f"there are no runs in {runs}"
    raise FileNotFoundError(f"no run {run!r} (a run is a folder with {CONFIG_FILE}); {known}")


@dataclass(frozen=True)
class Difference:
    """The first place at which two runs differ."""

    file: str
    step: int
    name: str
    a: Any
    b: Any

    def __str__(self) -> str:
        return f"{self.file}: first difference at step {self.step}: {self.name} is {self.a!r} and {self.b!r}"


_ABSENT = "absent"


def compare(run_a: Path, run_b: Path) -> Difference | None:
    """Return the first difference between the deterministic logs of two runs, or None when they are identical.

    The earliest step wins; within a step metrics come before samples.

    Raises:
        FileNotFoundError, ValueError: a log is missing or malformed.
    """
    found = [_first_difference(run_a / name, run_b / name) for name in DETERMINISTIC_LOGS]
    return min((one for one in found if one is not None), key=lambda one: one.step, default=None)


def _first_difference(path_a: Path, path_b: Path) -> Difference | None:
    rows_a, rows_b = list(read(path_a)), list(read(path_b))
    name = path_a.name
    for row_a, row_b in zip(rows_a, rows_b, strict=False):
        for key in sorted(row_a.keys() | row_b.keys(), key=lambda key: (key != "step", key)):
            a, b = row_a.get(key, _ABSENT), row_b.get(key, _ABSENT)
            # json.dumps and not ==, so that 1 and 1.0 and True are told apart, as in the file's bytes.
            if json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True):
                step = row_a.get("step", row_b.get("step", 0))
                label = f"{key} of sample {row_a['sample']}" if "sample" in row_a and key != "sample" else key
                return Difference(name, int(step), label, a, b)
    if len(rows_a) != len(rows_b):
        longer = rows_a if len(rows_a) > len(rows_b) else rows_b
        step = int(longer[min(len(rows_a), len(rows_b))].get("step", 0))
        return Difference(name, step, "number of rows", len(rows_a), len(rows_b))
    return None
