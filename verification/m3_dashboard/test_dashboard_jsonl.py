"""Rows of one step in a long log."""

import pytest
from dashboard_runs import append, make_run, sample_row

from dashboard import jsonl

pytestmark = pytest.mark.m3


class TestRowsOfAStep:
    def test_bisection_finds_the_rows_of_any_step(self, runs):
        run = make_run(runs, "a", 0)
        steps = [step for step in range(1, 400) if step % 3]
        rows = [sample_row(step, sample, "x" * (step * 37 % 9000)) for step in steps for sample in range(step % 3)]
        append(run / "samples.jsonl", *rows)
        for step in (-5, 0, 1, 2, 3, 200, 201, 398, 399, 400, 10**9):
            found = [(row["step"], row["sample"]) for row in jsonl.rows_at(run, "samples.jsonl", step)]
            assert found == [(row["step"], row["sample"]) for row in rows if row["step"] == step]
            first = next(jsonl.rows_from(run, "samples.jsonl", step), {"step": None})["step"]
            assert first == next((row["step"] for row in rows if row["step"] >= step), None)

    def test_bisection_reads_little_of_a_long_log(self, runs, monkeypatch):
        run = make_run(runs, "a", 0)
        append(run / "samples.jsonl", *(sample_row(step, completion="word " * 200) for step in range(20_000)))
        decoded = []
        decode = jsonl.decode
        monkeypatch.setattr(jsonl, "decode", lambda line: decoded.append(1) or decode(line))
        assert [row["step"] for row in jsonl.rows_at(run, "samples.jsonl", 13_337)] == [13_337]
        assert len(decoded) < 60

    def test_a_torn_last_line_is_no_row(self, runs):
        run = make_run(runs, "a", 0)
        append(run / "samples.jsonl", sample_row(1))
        with (run / "samples.jsonl").open("ab") as file:
            file.write(b'{"step": 2, "sample"')
        assert [row["step"] for row in jsonl.rows_from(run, "samples.jsonl", 0)] == [1]
