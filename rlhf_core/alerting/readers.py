"""Logs of this trainer and of others as columns for the alerts: TRL, OpenRLHF, verl. Imports no torch.

A column is a masked array: masked where a row does not have the metric, NaN where its value was not finite. A line of
this trainer that cannot be read is an error, for its logs are exact; one of another trainer is left out and reported,
for those are often what was on a terminal.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from rlhf_core import runlog
from rlhf_core.alerting.alert import Alert
from rlhf_core.alerting.literals import read_literal
from rlhf_core.alerting.translate import Row, float_of, openrlhf_row, trl_row, verl_row
from rlhf_core.alerting.trl_states import newest_state, read_state

Format = Literal["rlhf", "trl", "openrlhf", "verl"]
Report = Callable[[str], None]
Columns = dict[str, np.ndarray]


def read_columns(path: Path, kind: Format = "rlhf", report: Report = warnings.warn) -> Columns:
    """Return a log's columns.

    Args:
        path: a run's folder, or for another trainer its log: a folder that holds one, or the file.
        kind: which trainer wrote it.
        report: hears, in one line, how many lines of another trainer's log could not be read, and of the first.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: a line of ours is malformed, or none of another trainer can be read; the message names the file, the
            line and what is wrong.
    """
    if kind == "rlhf":
        return columns_of(run_rows(path))
    rows = {"trl": _trl_rows, "openrlhf": _openrlhf_rows, "verl": _verl_rows}[kind](path, report)
    return columns_of(_merged(rows))


def columns_of(rows: Iterable[Row]) -> Columns:
    """Return rows as columns; every row has a ``step``."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    columns: Columns = {}
    for name in names:
        values = np.array([row.get(name, 0.0) for row in rows], dtype=np.float64)
        columns[name] = np.ma.masked_array(values, mask=[name not in row for row in rows])
    return columns | {"step": np.array([row["step"] for row in rows], dtype=np.int64)}


# -- this project's runs -----------------------------------------------------------------------------------------------


def run_rows(run: Path) -> Iterator[Row]:
    """Yield the rows of a run's metrics with its timings; a last line that is being written is left out.

    Raises:
        FileNotFoundError: it has no metrics.
        ValueError: a line is malformed; the message names the file and the line.
    """
    timings = {int(row["step"]): row for row in _own_rows(run / runlog.TIMINGS_FILE)} if _has_timings(run) else {}
    for row in _own_rows(run / runlog.METRICS_FILE):
        yield timings.get(int(row["step"]), {}) | row


def unlogged_alerts(run: Path, last_step: int) -> list[Alert]:
    """Return the alerts of alerts.jsonl that the metrics cannot show: of a step that the trainer gave up.

    Raises:
        ValueError: a line is malformed; the message names the file and the line.
    """
    path, found = run / runlog.ALERTS_FILE, []
    for number, line in _whole_lines(path) if path.is_file() else ():
        row = runlog.decode_row(line, f"{path}:{number}")
        if row["step"] > last_step:
            try:
                found.append(Alert.from_json(row))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    return found


def _has_timings(run: Path) -> bool:
    return (run / runlog.TIMINGS_FILE).is_file()


def _own_rows(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise FileNotFoundError(f"no log {str(path)!r}; is {str(path.parent)!r} a run that has begun its steps?")
    for number, line in _whole_lines(path):
        yield metrics_of(runlog.decode_row(line, f"{path}:{number}"), f"{path}:{number}")


def metrics_of(row: Mapping[str, Any], where: str) -> Row:
    """Return the numbers of a row of metrics.jsonl or timings.jsonl; null, which stands for NaN or infinity, is NaN.

    Raises:
        ValueError: a value is neither a number nor null, or a number that no float holds.
    """
    numbers: Row = {}
    for name, value in row.items():
        if isinstance(value, dict | list):
            continue
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{where}: {name} is {value!r}; it must be a number or null")
        try:
            numbers[name] = np.nan if value is None else float_of(name, value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return numbers


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n") and line.strip():
                yield number, line


# -- other trainers ----------------------------------------------------------------------------------------------------


def _merged(rows: Iterable[Row]) -> list[Row]:
    """Join neighbouring rows of one step that tell of different things: training, evaluation, the end's summary.

    What they both have, such as the epoch, is the same in them; a step that was done again has other values, or
    nothing new.
    """
    merged: list[Row] = []
    for row in rows:
        if merged and _goes_on(merged[-1], row):
            merged[-1] |= row
        else:
            merged.append(row)
    return merged


def _goes_on(before: Row, row: Row) -> bool:
    """Whether a row adds to the one before."""
    both = before.keys() & row.keys()
    return before["step"] == row["step"] and row.keys() != both and all(before[name] == row[name] for name in both)


Entry = TypeVar("Entry")


def _readable(
    entries: Iterable[tuple[str, Entry]],
    read: Callable[[Entry], Row],
    report: Report,
    file: Path,
    wanted: str,
) -> list[Row]:
    """Return what is read of each entry, where that holds something at a step; what cannot be read is left out.

    Raises:
        ValueError: nothing could be read.
    """
    rows: list[Row] = []
    left_out, first = 0, ""
    for where, entry in entries:
        try:
            row = read(entry)
        except ValueError as error:
            left_out, first = left_out + 1, first or f"{where}: {error}"
            continue
        if "step" in row and len(row) > 1:
            rows.append(row)
    if not rows:
        raise ValueError(f"{file} holds no {wanted}; is --format right?{f' ({first})' if first else ''}")
    if left_out:
        these = "1 row that cannot be read is" if left_out == 1 else f"{left_out} rows that cannot be read are"
        report(f"{these} left out; the first is {first}")
    return rows


def _trl_rows(path: Path, report: Report) -> list[Row]:
    file = newest_state(path)
    tree = read_state(file)
    history = tree.get("log_history") if isinstance(tree, dict) else tree
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise ValueError(f"{file} is no trainer_state.json; it must be JSON with a log_history, a list of objects")
    entries = ((f"{file}, entry {number} of log_history", row) for number, row in enumerate(history, start=1))
    return _readable(entries, trl_row, report, file, "rows with a step")


_VERL_LINE = re.compile(r"\bstep:(\d+)( - .*)")
_VERL_PAIR = re.compile(r"(.+?):(?:np\.\w+\()?([-+]?(?:\d+(?:\.\d*)?(?:e[-+]?\d+)?|nan|inf))\)?(?=\s|$)", re.IGNORECASE)
"""A name, which may have spaces and colons in it, and its number; what stands behind that is no part of it."""


def _verl_rows(path: Path, report: Report) -> list[Row]:
    file = _log_file(path)
    wanted = "lines such as 'step:1 - actor/pg_loss:0.1 - …', nor JSON with a step and data"
    return _readable(_lines(file), _verl_line, report, file, wanted)


def _verl_line(line: str) -> Row:
    if line.startswith("{"):
        tree = _object(line)
        data = tree["data"] if isinstance(tree.get("data"), dict) else tree
        return verl_row({"step": tree.get("step"), **data})
    match = _VERL_LINE.search(line)
    return verl_row({"step": int(match[1])} | _verl_pairs(match[2])) if match else {}


def _verl_pairs(text: str) -> dict[str, float]:
    """Return the metrics of ``" - a/b:0.1 - c d/e:0.2"``; a part without a colon is the beginning of the next name."""
    pairs: dict[str, float] = {}
    begun = ""
    for part in text.split(" - ")[1:]:
        found = _VERL_PAIR.match(begun + part)
        if found and not (_MAY_BE_TINY.fullmatch(found[1]) and re.fullmatch(r"-?0\.000", found[2])):
            pairs[found[1]] = float(found[2])
        begun = "" if ":" in part else f"{begun}{part} - "
    return pairs


_MAY_BE_TINY = re.compile(r".*/(lr|grad_norm|ppo_kl|kl_loss|reward_kl_penalty)")
"""Metrics of which 0.000 only says that they are small."""


def _openrlhf_rows(path: Path, report: Report) -> list[Row]:
    file = _log_file(path)
    wanted = "lines such as 'Global step 1: {…}', nor JSON with a step or global_step"
    return _readable(_lines(file), _openrlhf_line, report, file, wanted)


def _openrlhf_line(line: str) -> Row:
    if line.startswith("{"):
        return openrlhf_row(_object(line))
    match = re.search(r"[Gg]lobal[ _]step:? (\d+): (\{.*\}|\{.*)", line)
    if not match:
        return {}
    try:
        status = read_literal(match[2])
    except ValueError:
        status = None
    if not isinstance(status, dict):
        raise ValueError("the status is no dictionary of numbers")
    return openrlhf_row({**status, "step": int(match[1])})


def _log_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"no log {str(path)!r}; give the trainer's log file or the folder that holds it")
    for pattern in ("*.jsonl", "*.log", "*.txt"):
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(one.name for one in found[:5])
            raise ValueError(f"{str(path)!r} holds several logs ({names}); give the one to read")
    raise FileNotFoundError(f"no *.jsonl, *.log or *.txt in {str(path)!r}; give the trainer's log file")


_TERMINAL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the lines without a terminal's colours, each with its place; one that is being written is left out."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            text = _TERMINAL.sub("", line).strip()
            if text and line.endswith("\n"):
                yield f"{file}:{number}", text


def _object(line: str) -> dict[str, Any]:
    try:
        tree = runlog.parse_json(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError("it must be a JSON object")
    return tree
