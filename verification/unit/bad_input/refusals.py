"""A command that refuses what it was given, and what it must leave as it was."""

import os
import re

from rlhf_core.testing.command import TINY_RUN, run_command


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse(runs, *options, code=2, usual=TINY_RUN):
    """Run ``train`` and return its complaint; no run appears, ``latest`` stays, no file changes."""
    before = files_of(runs)
    outcome = run_command("train", *usual, "--runs", runs, *options)
    assert outcome.code == code, outcome
    assert files_of(runs) == before
    assert os.readlink(runs / "latest") == "earlier"
    assert not [path for path in runs.iterdir() if path.name not in ("earlier", "latest")]
    return outcome.complaint


def assert_matches(pattern, text):
    __tracebackhide__ = True
    print(text)
    assert re.search(pattern, text), f"{pattern!r} is not in: {text}"
