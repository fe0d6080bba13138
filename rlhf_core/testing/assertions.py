"""Assertions about runs, for this project's tests and for others'; like ``numpy.testing``, they say what differs.

A trainer of your own can use them when it writes ``metrics.jsonl`` and ``samples.jsonl``, one JSON object with a
``step`` a line::

    from rlhf_core.testing.assertions import assert_runs_identical


    def test_a_seed_decides_the_run(tmp_path):
        for name in ("first", "second"):
            subprocess.run([sys.executable, "train.py", "--seed", "7", "--out", tmp_path / name], check=True)
        assert_runs_identical(tmp_path / "first", tmp_path / "second")

This module does not import torch.
"""

import hashlib
from pathlib import Path

from rlhf_core import runlog


def run_hashes(run: Path) -> dict[str, str]:
    """Return the SHA-256 of each deterministic log of a run, by file name.

    Raises:
        FileNotFoundError: a log is missing.
    """
    names = runlog.deterministic_logs(run)
    return {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in names}


def assert_runs_identical(run_a: Path | str, run_b: Path | str) -> None:
    """Fail unless the deterministic logs of two runs are the same bytes, and hold something.

    The failure names the first step, metric and value at which they differ, and the SHA-256 of both sides of each file.

    Raises:
        AssertionError: they differ, or are empty: two runs that logged nothing prove nothing.
        FileNotFoundError, ValueError: a log is missing or malformed.
    """
    run_a, run_b = Path(run_a), Path(run_b)
    hashes_a, hashes_b = run_hashes(run_a), run_hashes(run_b)
    empty = [name for name in hashes_a if not (run_a / name).stat().st_size or not (run_b / name).stat().st_size]
    if empty:
        raise AssertionError(f"{' and '.join(empty)} of {run_a} or {run_b} hold no rows, which proves nothing")
    if hashes_a != hashes_b:
        # Rows can agree while bytes do not: another order of keys, other spaces.
        difference = runlog.compare(run_a, run_b) or "the rows agree, but not their bytes"
        lines = [f"{name}\n  {hashes_a[name]}  {run_a}\n  {hashes_b[name]}  {run_b}" for name in hashes_a]
        raise AssertionError("\n".join([f"runs differ: {difference}", *lines]))


def assert_runs_differ(run_a: Path | str, run_b: Path | str) -> runlog.Difference:
    """Fail unless the deterministic logs of two runs differ in a value; return the first difference.

    The counterpart of :func:`assert_runs_identical`: a suite that cannot tell two seeds apart checks nothing.
    """
    difference = runlog.compare(Path(run_a), Path(run_b))
    if difference is None:
        raise AssertionError(f"{run_a} and {run_b} are identical, and should differ")
    return difference
