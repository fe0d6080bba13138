"""Logs of steps, one JSON object a line, read as they grow: by byte offset, up to the last newline."""

import io
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.json

from dashboard.folder import open_plain
from rlhf_core import runlog

BLOCK_BYTES = 1 << 22
LONGEST_LINE = 1 << 26
FINGERPRINT_BYTES = 256

Columns = dict[str, np.ma.MaskedArray]
"""Numbers by name, [N] each; what a row does not have is masked, and what was not finite is NaN."""


class Tail:
    """Reads a growing log from where it stopped; a log that was cut or replaced is read anew."""

    def __init__(self, run: Path, name: str) -> None:
        self._run = run
        self._name = name
        self.rewind()

    def rewind(self) -> None:
        """Begin anew."""
        self._inode = 0
        self._fingerprint = b""
        self._written = 0.0
        self.offset = 0
        self.size = 0

    def age_s(self) -> float:
        """Return the seconds since the file was last written to, as of the last look at it."""
        return max(0.0, time.time() - self._written)

    def restarted(self) -> bool:
        """Look at the file; return whether it no longer begins with what was read, and then begin anew."""
        file = open_plain(self._run, self._name)
        if file is None:
            kept, inode, self.size = False, 0, 0
        else:
            with file:
                status = os.fstat(file.fileno())
                file.seek(self.offset - len(self._fingerprint))
                kept = file.read(len(self._fingerprint)) == self._fingerprint and self._inode == status.st_ino
                inode, self.size, self._written = status.st_ino, status.st_size, status.st_mtime
        if kept or not self.offset:
            self._inode = inode
            return False
        self.offset, self._fingerprint, self._inode = 0, b"", inode
        return True

    def grown(self) -> bool:
        """Return whether the file has another size than at the last look at it; that was this one, from now on."""
        file = open_plain(self._run, self._name)
        if file is None:
            return False
        with file:
            status = os.fstat(file.fileno())
        before, self.size, self._written = self.size, status.st_size, status.st_mtime
        return self.size != before

    def block(self) -> bytes:
        """Return the next whole lines, about ``BLOCK_BYTES`` of them; nothing when there are none."""
        file = open_plain(self._run, self._name)
        if file is None:
            return b""
        with file:
            file.seek(self.offset)
            data = file.read(BLOCK_BYTES)
            while b"\n" not in data and len(data) < LONGEST_LINE and (more := file.read(BLOCK_BYTES)):
                data += more
        lines = data[: data.rfind(b"\n") + 1]
        if not lines and len(data) >= LONGEST_LINE:
            lines = data  # no row is that long: pass over it, piece by piece
        if lines:
            self.offset += len(lines)
            self._fingerprint = (self._fingerprint + lines)[-FINGERPRINT_BYTES:]
        return lines


def parse(lines: bytes) -> tuple[Columns, int]:
    """Return the numbers of whole lines as columns, and how many lines are no row with a step.

    An object inside a row gives columns named ``outer/inner``; null, and what a row names as ``nonfinite``, is NaN.
    """
    try:
        options = pyarrow.json.ReadOptions(use_threads=False, block_size=len(lines) + 1)
        columns = _from_table(pyarrow.json.read_json(io.BytesIO(lines), read_options=options))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        columns = None
    return (columns, 0) if columns is not None else _from_lines(lines)


def _from_table(table: pa.Table) -> Columns | None:
    """Return the columns of plain rows; None where rows have to be looked at one by one.

    A table does not tell null, which stands for what was not finite, from what a row does not have.
    """
    columns: Columns = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if pa.types.is_struct(column.type):
            for field, inner in zip(column.type, column.flatten(), strict=True):
                _add_numbers(columns, f"{name}/{field.name}", inner)
        elif column.null_count or (
            name == "nonfinite" and (not pa.types.is_list(column.type) or len(column.flatten()))
        ):
            return None
        else:
            _add_numbers(columns, name, column)
    steps = columns.get("step")
    return columns if steps is not None and pa.types.is_integer(table.schema.field("step").type) else None


def concatenated(first: Columns, second: Columns) -> Columns:
    """Return the rows of both; what either does not have is masked there."""
    if not first or not second:
        return first or second
    rows = len(first["step"]), len(second["step"])
    return {
        name: np.ma.concatenate(
            [
                part[name] if name in part else np.ma.masked_all(count)
                for part, count in zip((first, second), rows, strict=True)
            ]
        )
        for name in dict.fromkeys((*first, *second))
    }


def _add_numbers(columns: Columns, name: str, column: pa.Array) -> None:
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        missing = column.is_null().to_numpy(zero_copy_only=False)
        values = column.cast(pa.float64(), safe=False).fill_null(0.0).to_numpy(zero_copy_only=False)
        columns[name] = np.ma.array(np.where(np.isfinite(values), values, np.nan), mask=missing)


def _from_lines(lines: bytes) -> tuple[Columns, int]:
    rows, bad = [], 0
    for line in lines.splitlines():
        if not line.strip():
            continue
        row = decode(line)
        if row is None:
            bad += 1
        else:
            rows.append(numbers(row))
    columns: Columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        columns[name] = np.ma.array(
            [row.get(name, 0.0) for row in rows], mask=[name not in row for row in rows], dtype=np.float64
        )
    return columns, bad


def decode(line: bytes) -> dict[str, Any] | None:
    """Return a row, or None when the line is no JSON object with a whole number as its step."""
    try:
        row = runlog.parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or abs(row["step"]) > runlog.LARGEST_STEP:
        return None
    return row


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """Return a row's numbers; an object inside it gives names ``outer/inner``; what was not finite is NaN."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {f"{name}/{inner}": _float(one) for inner, one in value.items() if _is_number(one)}
        elif value is None or _is_number(value):
            found[name] = math.nan if value is None else _float(value)
    nonfinite = row.get("nonfinite")
    named = nonfinite if isinstance(nonfinite, list) else []
    return found | {name: math.nan for name in named if isinstance(name, str)}


def finite(value: Any) -> float | None:
    """Return a value that is a finite number, or None."""
    number = _float(value) if _is_number(value) else math.nan
    return number if number == number else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _float(value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def rows_from(run: Path, name: str, step: int) -> Iterator[dict[str, Any]]:
    """Yield a log's rows from the first one at or behind a step, found by bisection: the log is not read before it."""
    file = open_plain(run, name)
    if file is None:
        return
    with file:
        file.seek(_offset_of(file, step))
        for line in _whole_lines(file):
            row = decode(line)
            if row is not None and row["step"] >= step:
                yield row


def rows_at(run: Path, name: str, step: int) -> Iterator[dict[str, Any]]:
    """Yield a log's rows of one step."""
    for row in rows_from(run, name, step):
        if row["step"] != step:
            return
        yield row


def _whole_lines(file: IO[bytes]) -> Iterator[bytes]:
    while (line := file.readline(LONGEST_LINE)).endswith(b"\n"):
        yield line


def _offset_of(file: IO[bytes], step: int) -> int:
    """Return the start of a line before which all rows have lower steps, in a log whose steps never fall."""
    low, high = 0, file.seek(0, os.SEEK_END)
    while high - low > 1 << 12:
        middle = (low + high) // 2
        file.seek(middle)
        file.readline(LONGEST_LINE)  # the rest of a line whose beginning is unknown
        start, row = file.tell(), None
        while start < high and row is None and (line := file.readline(LONGEST_LINE)):
            row = decode(line)
        if row is not None and row["step"] < step:
            low = start
        else:
            high = middle
    file.seek(low)
    return low


def skim(run: Path, name: str, rows: int) -> bytes:
    """Return about ``rows`` whole lines from evenly spaced places of a log, the first and the last among them."""
    file = open_plain(run, name)
    if file is None:
        return b""
    found = {}
    with file:
        size = file.seek(0, os.SEEK_END)
        for place in range(rows):
            file.seek(size * place // rows)
            if place:
                file.readline(LONGEST_LINE)
            start, line = file.tell(), file.readline(LONGEST_LINE)
            if line.endswith(b"\n"):
                found[start] = line
        if last := last_line(file):
            found[size] = last
    return b"".join(found[start] for start in sorted(found))


def last_line(file: IO[bytes]) -> bytes:
    """Return a log's last whole line, or nothing."""
    size, length = file.seek(0, os.SEEK_END), 1 << 12
    while length <= 2 * LONGEST_LINE:
        start = max(0, size - length)
        file.seek(start)
        lines = file.read(size - start).split(b"\n")
        # What stands behind the last newline is torn; what stands before the first may have begun earlier.
        whole = lines[:-1] if start == 0 else lines[1:-1]
        if whole or start == 0:
            return whole[-1] + b"\n" if whole else b""
        length *= 4
    return b""
