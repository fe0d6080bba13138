"""The logs of a run: how rows are written, read and cut back, and how two runs are compared.

This module does not import torch.
"""

import errno
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.durable_files import errors_name

METRICS_FILE = "metrics.jsonl"
TIMINGS_FILE = "timings.jsonl"
SAMPLES_FILE = "samples.jsonl"
ALERTS_FILE = "alerts.jsonl"
STEP_LOGS = (METRICS_FILE, TIMINGS_FILE, SAMPLES_FILE)
LARGEST_STEP = 2**53
"""Up to here float64, in which curves are drawn and judged, holds every whole number."""


def encode(row: dict[str, Any]) -> str:
    """Return one line of JSON with sorted keys; NaN and infinity are refused, they are not JSON."""
    return json.dumps(row, sort_keys=True, allow_nan=False, ensure_ascii=True) + "\n"


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows in a single write and sync them, so that a reader sees whole lines but for one that a crash tears.

    A checkpoint is durable when it has its name; the rows that belong to it have to be durable before.
    """
    data = "".join(encode(row) for row in rows).encode()
    with errors_name(path), path.open("ab", buffering=0) as file:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a log of steps.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a JSON object with a step; the message names the file and the line.
    """
    for _, row in _lines_and_rows(path):
        yield row


def _lines_and_rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    if not path.is_file():
        raise FileNotFoundError(f"no log {str(path)!r}; is {str(path.parent)!r} a run that has begun its steps?")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield line, decode_row(line, f"{path}:{number}")


_SAMPLE = {"sample": int, "prompt": str, "completion": str, "reward": float, "kl": float}


def read_samples(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a run's ``samples.jsonl``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no sample; the message names the file, the line and the field.
    """
    path = run / SAMPLES_FILE
    for number, row in enumerate(read(path), start=1):
        for name, kind in _SAMPLE.items():
            value = row.get(name)
            if type(value) is not kind:
                raise ValueError(f"{path}:{number}: {name} is {value!r}; it must be {kind.__name__}")
        yield row


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is no JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested too deeply ({error})") from None


def decode_row(line: bytes, where: str) -> dict[str, Any]:
    """Return the row of a line of a log.

    Raises:
        ValueError: it is not a JSON object with a step; the message says where.
    """
    try:
        row = parse_json(line)
    except ValueError as error:
        torn = "" if line.endswith(b"\n") else " (the last line is torn: the run was killed while writing; --resume it)"
        raise ValueError(f"{where}: not JSON: {error}{torn or '; the file was damaged or changed'}") from None
    if not isinstance(row, dict) or type(row.get("step")) is not int or abs(row["step"]) > LARGEST_STEP:
        raise ValueError(f"{where}: each line must be a JSON object with a whole number as its step, of at most 2^53")
    return row


def keep_through_step(path: Path, step: int) -> None:
    """Cut a log back to its rows up to ``step``; a torn last line goes too. A missing log stays missing.

    Raises:
        ValueError: a whole line is malformed; the file stays as it is.
    """
    _cut(path, _end_of_step(path, step)[0])


def cut_back(run: Path, step: int, at_least: Mapping[str, int]) -> None:
    """Cut a run's logs of steps back to its checkpoint of ``step``.

    Args:
        run: the run.
        step: the checkpoint's step.
        at_least: up to which step a log must have rows, by its name: they were there when the checkpoint was saved.

    Raises:
        ValueError: one ends before that, or has no row of a step before its last, or a whole line is malformed; all
            files stay as they are.
    """
    ends = {name: _end_of_step(run / name, step) for name in STEP_LOGS}
    for name in (METRICS_FILE, SAMPLES_FILE):  # a time may be missing: it is written after the step's checkpoint
        if gap := ends[name][2]:
            raise ValueError(
                f"{run / name} {no_rows_between(*gap)}; put the missing rows back, or remove the checkpoints "
                f"after step {gap[0]} from {run / 'checkpoints'} to do those steps again"
            )
    for name, least in at_least.items():
        last = ends[name][1]
        if last < least:
            raise ValueError(
                f"{run / name} ends at step {last}, and the checkpoint is of step {step}; put the missing rows back, "
                f"or remove the checkpoints after step {last} from {run / 'checkpoints'} to do those steps again"
            )
    for name, (end, _, _) in ends.items():
        _cut(run / name, end)


def no_rows_between(before: int, after: int) -> str:
    """Return the words for a log in which the row of a step is followed by that of a step behind the next."""
    first, last = before + 1, after - 1
    return f"has no row of step {first}" if first == last else f"has no rows of steps {first} to {last}"


def _end_of_step(path: Path, step: int) -> tuple[int, int, tuple[int, int] | None]:
    """Return at which byte the rows up to ``step`` end, the step of the last one, and the steps around the first gap.

    The first two are 0 where there are no rows; the last is None where no step is missing.
    """
    end, last, gap = 0, 0, None
    if not path.exists():
        return end, last, gap
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") or (found := decode_row(line, f"{path}:{number}")["step"]) > step:
                break
            gap = gap or ((last, found) if found > last + 1 else None)
            end, last = end + len(line), found
    return end, last, gap


def _cut(path: Path, end: int) -> None:
    """Cut a file off at a byte, in place: nothing is copied, and a kill leaves it cut or as it was."""
    if path.exists() and path.stat().st_size > end:
        with errors_name(path), path.open("rb+") as file:
            file.truncate(end)
            os.fsync(file.fileno())


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
    found = [_first_difference(run_a / name, run_b / name) for name in deterministic_logs(run_a, run_b)]
    return min((one for one in found if one is not None), key=lambda one: one.step, default=None)


def deterministic_logs(*runs: Path) -> list[str]:
    """Return the logs that have to be the same bytes: ``samples.jsonl`` only where a run draws completions."""
    drawn = any((run / SAMPLES_FILE).exists() for run in runs)
    return [METRICS_FILE, SAMPLES_FILE] if drawn else [METRICS_FILE]


def _first_difference(path_a: Path, path_b: Path) -> Difference | None:
    """Return the first value that differs; else the number of rows; else the first row that is spelled otherwise.

    Both logs are read to their ends, so that a malformed line is an error wherever it stands.
    """
    name = path_a.name
    value = number = spelling = None
    rows_a = rows_b = 0
    for one, other in itertools.zip_longest(_lines_and_rows(path_a), _lines_and_rows(path_b)):
        rows_a, rows_b = rows_a + (one is not None), rows_b + (other is not None)
        longer = one or other
        assert longer is not None
        step = longer[1]["step"] if number is None else number.step
        if one is None or other is None:
            number = Difference(name, step, "number of rows", rows_a, rows_b)
            continue
        (line_a, row_a), (line_b, row_b) = one, other
        value = value or _different_value(name, row_a, row_b)
        if spelling is None and line_a != line_b:
            spelling = Difference(name, step, "spelling of the row", line_a, line_b)
    return value or number or spelling


def _different_value(name: str, row_a: dict[str, Any], row_b: dict[str, Any]) -> Difference | None:
    for key in sorted(row_a.keys() | row_b.keys(), key=lambda key: (key != "step", key)):
        a, b = row_a.get(key, _ABSENT), row_b.get(key, _ABSENT)
        # json.dumps and not ==, so that 1 and 1.0 and True are told apart, as in the file's bytes.
        if json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True):
            label = f"{key} of sample {row_a['sample']}" if "sample" in row_a and key != "sample" else key
            return Difference(name, row_a["step"], label, a, b)
    return None
