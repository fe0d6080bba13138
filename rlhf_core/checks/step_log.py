"""A log that has each step once, in order. Imports no torch."""

from pathlib import Path
from typing import Any

from rlhf_core import runlog

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def rows_by_step(path: Path) -> dict[int, dict[str, Any]]:
    """Return the rows of ``metrics.jsonl`` or ``timings.jsonl`` by their step.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is malformed, a step is there twice or after a later one, or an editor saved the file anew.
    """
    rows: dict[int, dict[str, Any]] = {}
    before: int | None = None
    for number, row in enumerate(runlog.read(path), start=1):
        step = row["step"]
        if before is not None and step <= before:
            what = "a second time" if step in rows else f"after step {before}"
            raise ValueError(f"{path}:{number}: step {step} {what}; a log has each step once, in order")
        rows[step], before = row, step
    with path.open("rb") as file:
        if file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
            raise ValueError(f"{path} begins with a byte order mark; an editor saved it anew")
    return rows


def brief(value: object) -> str:
    """Return a value as Python writes it, of a length that a message can have."""
    return shortened(repr(value))


def shortened(text: str) -> str:
    """Return a text, or its beginning and how long it is."""
    return text if len(text) <= 60 else f"{text[:30]}… ({len(text)} characters)"
