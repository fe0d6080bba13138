"""The files of a profile: their names, their columns, and reading them. Imports no torch."""

import csv
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.checks.step_log import brief, shortened

PROFILES_FOLDER = "profiles"
SUMMARY_FILE = "summary.csv"
TRACE_FILE = "chrome_trace.json"
OPERATORS_FILE = "op_stats.csv"

SUMMARY_COLUMNS = (
    "stage", "calls", "total_ms", "mean_ms", "p50_ms", "p95_ms", "share", "tokens", "tokens_per_s", "cpu_peak_bytes",
    "cuda_peak_bytes",
)  # fmt: skip
OPERATOR_COLUMNS = (
    "operator", "calls", "self_cpu_ms", "total_cpu_ms", "self_cuda_ms", "total_cuda_ms", "self_cpu_bytes",
    "total_cpu_bytes", "self_cuda_bytes", "total_cuda_bytes",
)  # fmt: skip
COUNTS = ("calls", "tokens")
LARGEST = 2**63
"""No time, count or size of a profile comes near it; what does not stay below is no figure of one."""
TRAINING, STAGES_THREAD, GPU = 1, 1, 2
"""The trace's process that trains and its thread of stages; its process of kernels, with a thread for each stream."""


class ProfileError(ValueError):
    """A file of a profile cannot be read for what it should be."""


@dataclass(frozen=True)
class Event:
    """A span of the trace, in whole nanoseconds."""

    category: str
    name: str
    process: int
    thread: int
    start_ns: int
    end_ns: int
    step: int
    arguments: dict[str, Any]

    @property
    def ns(self) -> int:
        """Its length."""
        return self.end_ns - self.start_ns


@dataclass(frozen=True)
class Trace:
    """What ``chrome_trace.json`` says."""

    events: list[Event]
    steps: list[int]
    """The profiled steps, as stated beside the events."""
    operator_steps: list[int]
    """Those whose operators were recorded."""
    facts: dict[str, Any]


def read_trace(path: Path) -> Trace:
    """Return the events of a trace.

    Raises:
        ProfileError: the file is missing, empty, cut short, or holds something that is no event; the message says what.
    """
    text = _text(path)
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = "it was cut short" if cut_short(text) else "it was changed"
        raise ProfileError(f"{path} is not JSON ({error}); {what}; profile again") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("traceEvents"), list):
        raise ProfileError(f"{path} has no list traceEvents; it is no trace")
    facts = tree.get("otherData")
    if not isinstance(facts, dict):
        raise ProfileError(f"{path} has no table otherData; it was not written by this profiler")
    for name in ("steps", "operator_steps"):
        if not isinstance(facts.get(name), list) or not all(type(step) is int for step in facts[name]):
            raise ProfileError(f"{path}: otherData.{name} is no list of whole numbers")
    events = [
        _event(item, f"{path}: event {number}")
        for number, item in enumerate(tree["traceEvents"])
        if not (isinstance(item, dict) and item.get("ph") == "M")
    ]
    if not events:
        raise ProfileError(f"{path} has no events; no step ended while it was profiled")
    return Trace(events, facts["steps"], facts["operator_steps"], facts)


_UNFINISHED = re.compile(r'\s*(?:"(?:[^"\\]|\\.)*\\?|[-+.\w\\]*)\s*', re.DOTALL)
"""The beginning of a string, a number, a word or an escape, or nothing."""


def cut_short(text: str) -> bool:
    """Whether a text is a JSON document without its end: no more than a part of a token is left where it ends."""
    start = len(text) - len(text.lstrip())
    try:
        json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        return text[start] in "{[" and _UNFINISHED.fullmatch(text, error.pos) is not None
    except RecursionError:
        pass
    return False


def _event(item: Any, where: str) -> Event:
    if not isinstance(item, dict) or item.get("ph") != "X":
        raise ProfileError(f"{where} is no complete event (ph X)")
    for name, kind in (("cat", str), ("name", str), ("pid", int), ("tid", int), ("args", dict)):
        if type(item.get(name)) is not kind:
            raise ProfileError(f"{where}: {name} is {brief(item.get(name))}; it must be {kind.__name__}")
    for name in ("pid", "tid"):
        if abs(item[name]) >= LARGEST:
            raise ProfileError(f"{where}: {name} is {brief(item[name])}; it must be below 2^63")
    start, length = (_nanoseconds(item.get(name), f"{where} ({item['name']}): {name}") for name in ("ts", "dur"))
    step = item["args"].get("step")
    if type(step) is not int:
        raise ProfileError(f"{where} ({item['name']}): args.step is {brief(step)}; it must be a whole number")
    for name, value in item["args"].items():
        if type(value) is int and abs(value) >= LARGEST:
            raise ProfileError(f"{where} ({item['name']}): args.{name} is {brief(value)}; it must be below 2^63")
    return Event(item["cat"], item["name"], item["pid"], item["tid"], start, start + length, step, item["args"])


def _nanoseconds(value: Any, where: str) -> int:
    if type(value) not in (int, float) or value != value or abs(value) == math.inf:
        raise ProfileError(f"{where} is {brief(value)}; it must be a finite number")
    if abs(value) >= LARGEST / 1000:
        raise ProfileError(f"{where} is {brief(value)}; it must be below 2^63 ns")
    if value < 0:
        raise ProfileError(f"{where} is {value}; it must not be negative")
    return round(value * 1000)


def read_table(path: Path, columns: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Return the rows of ``summary.csv`` or ``op_stats.csv`` by their first column, in the file's order.

    Raises:
        ProfileError: the file is missing, empty or cut short, has other columns, a row twice, or a value that is no
            finite number; the message says which.
    """
    text = _text(path)
    if not text.endswith("\n"):
        raise ProfileError(f"{path}: the last line is cut short; profile again")
    try:
        lines = list(csv.reader(text.splitlines(), strict=True))
    except csv.Error as error:
        raise ProfileError(f"{path} is no table ({error})") from None
    if tuple(lines[0]) != columns:
        raise ProfileError(
            f"{path}: the columns are {','.join(map(shortened, lines[0]))}; they must be {','.join(columns)}"
        )
    rows: dict[str, dict[str, float]] = {}
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(columns):
            raise ProfileError(f"{path}:{number}: {len(line)} values; there must be {len(columns)}")
        if line[0] in rows:
            raise ProfileError(f"{path}:{number}: {line[0]!r} has a row already")
        rows[line[0]] = {
            name: _number(value, name, f"{path}:{number} ({line[0]})")
            for name, value in zip(columns[1:], line[1:], strict=True)
        }
    return rows


def _number(value: str, column: str, where: str) -> float:
    whole = column in COUNTS or column.endswith("_bytes")
    text = shortened(value)
    try:
        number = int(value) if whole else float(value)
    except ValueError:
        raise ProfileError(f"{where}: {column} is {text!r}; it must be a {'whole ' if whole else ''}number") from None
    if number != number or abs(number) == math.inf:
        raise ProfileError(f"{where}: {column} is {text}; it must be finite")
    if abs(number) >= LARGEST:
        raise ProfileError(f"{where}: {column} is {text}; it must be below 2^63")
    # What a piece of work gave back can be more than what it took.
    if number < 0 and column not in ("self_cpu_bytes", "total_cpu_bytes", "self_cuda_bytes", "total_cuda_bytes"):
        raise ProfileError(f"{where}: {column} is {text}; it must not be negative")
    return number


def _text(path: Path) -> str:
    if not path.is_file():
        raise ProfileError(f"no {path}; profile the run with rlhf train --profile")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path} is not UTF-8 ({error}); it was damaged") from None
    if text.startswith("\ufeff"):
        raise ProfileError(f"{path} begins with a byte order mark; an editor saved it anew")
    if not text.strip():
        raise ProfileError(f"{path} is empty; profile again")
    return text
