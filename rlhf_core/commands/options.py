"""What the commands share: reading options, and complaining in one line."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import tyro

from rlhf_core.terminal import printable

USAGE_ERROR = 2
C = TypeVar("C")


class UsageError(Exception):
    """The command line cannot be understood."""


def describe(error: Exception) -> str:
    """Return what went wrong in words."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def complain(message: str, code: int) -> int:
    """Print one line that cannot harm a terminal, whatever file names and texts it quotes."""
    print(f"rlhf: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def parse(options: type[C], arguments: list[str], command: str, default: C | None = None) -> C:
    """Return the options; an error of the command line becomes one line.

    Raises:
        UsageError: an option is unknown, or its value is, or is out of range.
    """
    given: dict[str, Any] = {"args": arguments, "prog": f"rlhf {command}"}
    if default is not None:
        given["default"] = default
    if {"-h", "--help"} & set(arguments):
        return tyro.cli(options, **given)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint), _wide_terminal():
            return tyro.cli(options, **given)
    except SystemExit:
        raise UsageError(f"{_gist(complaint.getvalue())}; see rlhf {command} --help") from None


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    """Keep tyro from breaking words: its complaint goes on one line anyway."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _gist(complaint: str) -> str:
    """Return what tyro's framed complaint says, without the frame, its title and the help behind it."""
    lines = [line.strip("│╭╮╰╯─ ") for line in complaint.splitlines()][1:]
    text = " ".join(line if line.strip("-") else ";" for line in lines if line).strip("; ")
    text = re.split(r"Argument helptext:|For full helptext", text)[0]
    return re.sub(r"Error parsing ([A-Za-z][A-Za-z.]*: )?", "", text).replace(" ;", ";").strip("; .")
