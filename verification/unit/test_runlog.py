import json
import os
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core import runlog
from rlhf_core.runlog import Difference
from rlhf_core.testing.assertions import assert_runs_differ, assert_runs_identical, run_hashes

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def write_run(folder, metrics, samples=()):
    folder.mkdir()
    runlog.append(folder / "metrics.jsonl", metrics)
    runlog.append(folder / "samples.jsonl", samples)
    return folder


def steps(n, **changes):
    return [{"step": step, "kl": 0.5, "reward_mean": step / 10, **changes} for step in range(1, n + 1)]


class TestAppendAndRead:
    @given(st.lists(st.dictionaries(st.text(), json_values, max_size=3), max_size=4))
    def test_rows_come_back_as_they_went(self, tmp_path_factory, rows):
        path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
        rows = [{**row, "step": number} for number, row in enumerate(rows)]
        runlog.append(path, rows[:2])
        runlog.append(path, rows[2:])
        assert list(runlog.read(path)) == rows

    def test_a_line_is_ascii_with_sorted_keys(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        runlog.append(path, [{"step": 1, "b": "é\u2028", "a": 0.1}])
        assert path.read_bytes() == b'{"a": 0.1, "b": "\\u00e9\\u2028", "step": 1}\n'

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_json_is_refused_and_leaves_no_trace(self, tmp_path, value):
        path = tmp_path / "metrics.jsonl"
        with pytest.raises(ValueError, match="not JSON compliant"):
            runlog.append(path, [{"step": 1, "kl": 0.0}, {"step": 2, "kl": value}])
        assert not path.exists()

    def test_rows_are_on_the_disk_before_the_call_returns(self, tmp_path, monkeypatch):
        synced = []
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
        runlog.append(tmp_path / "metrics.jsonl", [{"step": 1}])
        assert synced == [str(tmp_path / "metrics.jsonl")]

    def test_a_missing_log_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no log '.*metrics\.jsonl'; is '.*' a run that has begun"):
            list(runlog.read(tmp_path / "metrics.jsonl"))

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b"{broken\n", r"metrics\.jsonl:2: not JSON: "),
            (b"\n", r"metrics\.jsonl:2: not JSON: "),
            (b"\xff\xfe\n", r"metrics\.jsonl:2: not JSON: "),
            (b"[" * 100_000 + b"\n", r"metrics\.jsonl:2: not JSON: .*recursion"),
            (b'{"step": 2, "k', r"metrics\.jsonl:2: not JSON: .*the last line is torn.*--resume"),
            (b"[1]\n", r"metrics\.jsonl:2: each line must be a JSON object"),
            (b"null\n", r"metrics\.jsonl:2: each line must be a JSON object"),
            (b'{"kl": 1}\n', r"metrics\.jsonl:2: .* whole number as its step"),
            (b'{"step": "2"}\n', r"metrics\.jsonl:2: .* whole number as its step"),
            (b'{"step": true}\n', r"metrics\.jsonl:2: .* whole number as its step"),
        ],
    )
    def test_a_malformed_line_is_named_by_file_and_number(self, tmp_path, line, message):
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(b'{"step": 1}\n' + line)
        rows = runlog.read(path)
        assert next(rows) == {"step": 1}
        with pytest.raises(ValueError, match=message):
            next(rows)


class TestKeepThroughStep:
    def test_later_rows_and_a_torn_line_go(self, tmp_path):
        path = tmp_path / "samples.jsonl"
        whole = b"".join(runlog.encode({"step": step, "n": n}).encode() for step in (1, 2, 3) for n in (0, 1))
        path.write_bytes(whole + b'{"step": 3, "n"')
        for step, lines in ((3, 6), (2, 4), (0, 0)):
            runlog.keep_through_step(path, step)
            assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:lines])

    def test_a_torn_line_that_is_json_by_chance_goes_too(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(b'{"step": 1}\n{"step": 2}')
        runlog.keep_through_step(path, 2)
        assert path.read_bytes() == b'{"step": 1}\n'

    def test_a_missing_log_stays_missing(self, tmp_path):
        runlog.keep_through_step(tmp_path / "metrics.jsonl", 3)
        assert list(tmp_path.iterdir()) == []

    def test_a_malformed_line_in_the_middle_is_named_and_nothing_is_cut(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        content = b'{"step": 1}\noops\n{"step": 3}\n'
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
            runlog.keep_through_step(path, 3)
        assert path.read_bytes() == content

    def test_what_stays_is_neither_held_nor_copied(self, tmp_path):
        path = tmp_path / "samples.jsonl"
        row = '{"step": 1, "text": "%s"}\n' % ("x" * 10_000)
        path.write_text(row * 400 + '{"step": 2}\n')
        inode = path.stat().st_ino
        tracemalloc.start()
        runlog.keep_through_step(path, 1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 500_000
        assert (path.stat().st_size, path.stat().st_ino) == (400 * len(row), inode)

    def test_a_cut_is_on_the_disk_before_the_call_returns_and_a_whole_log_is_not_written_to(
        self, tmp_path, monkeypatch
    ):
        path, synced = tmp_path / "metrics.jsonl", []
        runlog.append(path, steps(3))
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
        runlog.keep_through_step(path, 3)
        assert synced == []
        runlog.keep_through_step(path, 2)
        assert synced == [str(path)]


class TestCutBack:
    def test_all_logs_are_cut_back_to_the_step(self, tmp_path):
        for name in runlog.STEP_LOGS:
            runlog.append(tmp_path / name, steps(5))
        runlog.cut_back(tmp_path, 3, dict.fromkeys(runlog.STEP_LOGS, 3))
        for name in runlog.STEP_LOGS:
            assert list(runlog.read(tmp_path / name)) == steps(3)

    @pytest.mark.parametrize(("rows", "last"), [(2, 2), (0, 0), (None, 0)])
    def test_a_log_that_ends_too_early_is_named_with_both_steps_and_nothing_is_cut(self, tmp_path, rows, last):
        runlog.append(tmp_path / "metrics.jsonl", steps(5))
        if rows is not None:
            runlog.append(tmp_path / "samples.jsonl", steps(rows))
        before = (tmp_path / "metrics.jsonl").read_bytes()
        message = (
            rf"samples\.jsonl ends at step {last}, and the checkpoint is of step 3; put the missing rows back, or "
        )
        with pytest.raises(
            ValueError, match=message + rf"remove the checkpoints after step {last} from .*checkpoints "
        ):
            runlog.cut_back(tmp_path, 3, {"metrics.jsonl": 3, "samples.jsonl": 3})
        assert (tmp_path / "metrics.jsonl").read_bytes() == before

    @pytest.mark.parametrize(
        ("there", "message"), [((1, 3), "has no row of step 2;"), ((4, 5), "has no rows of steps 1 to 3;")]
    )
    def test_a_log_with_a_gap_is_named_with_the_steps_that_are_missing_and_nothing_is_cut(
        self, tmp_path, there, message
    ):
        runlog.append(tmp_path / "metrics.jsonl", steps(5))
        rows = [{"step": step} for step in (*there, 5)]
        runlog.append(tmp_path / "samples.jsonl", rows)
        before = (tmp_path / "metrics.jsonl").read_bytes()
        with pytest.raises(ValueError, match=rf"samples\.jsonl {message} put the missing rows back, or remove the"):
            runlog.cut_back(tmp_path, 4, {"metrics.jsonl": 4, "samples.jsonl": 4})
        assert (tmp_path / "metrics.jsonl").read_bytes() == before


class TestCompare:
    def test_the_same_rows_are_identical(self, tmp_path):
        a, b = (write_run(tmp_path / name, steps(3), [{"step": 1, "sample": 0}]) for name in "ab")
        assert runlog.compare(a, b) is None
        assert_runs_identical(a, b)
        assert run_hashes(a) == run_hashes(b)

    def test_the_first_step_metric_and_both_values_are_named(self, tmp_path):
        a = write_run(tmp_path / "a", steps(4))
        changed = steps(4)
        changed[1] |= {"reward_mean": 0.7, "kl": 0.25}
        changed[3] |= {"kl": 9.0}
        b = write_run(tmp_path / "b", changed)
        found = runlog.compare(a, b)
        assert found == Difference("metrics.jsonl", 2, "kl", 0.5, 0.25)
        assert str(found) == "metrics.jsonl: first difference at step 2: kl is 0.5 and 0.25"
        assert assert_runs_differ(a, b) == found

    def test_the_earliest_step_wins_whichever_file_it_is_in(self, tmp_path):
        later = [*steps(2), {**steps(3)[2], "kl": 9.0}]
        x, y = ([{"step": 2, "sample": 1, "completion": text}] for text in "xy")
        a, b = write_run(tmp_path / "a", steps(3), x), write_run(tmp_path / "b", later, y)
        assert runlog.compare(a, b) == Difference("samples.jsonl", 2, "completion of sample 1", "x", "y")
        c = write_run(tmp_path / "c", later, x)
        assert runlog.compare(a, c) == Difference("metrics.jsonl", 3, "kl", 0.5, 9.0)

    def test_a_shorter_run_differs_at_its_first_missing_step(self, tmp_path):
        a, b = write_run(tmp_path / "a", steps(5)), write_run(tmp_path / "b", steps(3))
        assert runlog.compare(a, b) == Difference("metrics.jsonl", 4, "number of rows", 5, 3)
        assert runlog.compare(b, a) == Difference("metrics.jsonl", 4, "number of rows", 3, 5)

    def test_a_metric_that_only_one_has_is_named(self, tmp_path):
        a, b = write_run(tmp_path / "a", steps(1)), write_run(tmp_path / "b", steps(1, extra=0.0))
        assert runlog.compare(a, b) == Difference("metrics.jsonl", 1, "extra", "absent", 0.0)

    @pytest.mark.parametrize(("one", "other"), [(1, 1.0), (1, True), (0.0, -0.0), (None, "absent")])
    def test_values_that_python_calls_equal_are_told_apart(self, tmp_path, one, other):
        a, b = write_run(tmp_path / "a", steps(1, kl=one)), write_run(tmp_path / "b", steps(1, kl=other))
        assert runlog.compare(a, b).name == "kl"

    def test_rows_that_agree_in_other_bytes_are_not_identical(self, tmp_path):
        a, b = write_run(tmp_path / "a", steps(2)), write_run(tmp_path / "b", [])
        lines = [json.dumps(row, sort_keys=True, separators=(",", ":")) for row in steps(2)]
        (b / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        found = runlog.compare(a, b)
        assert (found.file, found.step, found.name) == ("metrics.jsonl", 1, "spelling of the row")

    @pytest.mark.parametrize("last", ["0.5", "9.0"])
    def test_long_logs_are_never_held(self, tmp_path, last):
        a, b = write_run(tmp_path / "a", []), write_run(tmp_path / "b", [])
        for run, kl in ((a, "0.5"), (b, last)):
            row = '{"kl": 0.5, "text": "%s", "step": 1}\n' % ("x" * 10_000)
            (run / "metrics.jsonl").write_text(row * 400 + f'{{"kl": {kl}, "step": 2}}\n')
        tracemalloc.start()
        found = runlog.compare(a, b)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found == (None if last == "0.5" else Difference("metrics.jsonl", 2, "kl", 0.5, 9.0))
        assert peak < 500_000

    def test_a_malformed_line_after_a_difference_is_an_error(self, tmp_path):
        a, b = write_run(tmp_path / "a", steps(3)), write_run(tmp_path / "b", steps(1, kl=9.0))
        with (b / "metrics.jsonl").open("a") as file:
            file.write("nonsense\n")
        with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
            runlog.compare(a, b)

    def test_a_missing_log_is_an_error_and_not_a_difference(self, tmp_path):
        a, b = write_run(tmp_path / "a", steps(1)), write_run(tmp_path / "b", steps(1))
        (b / "samples.jsonl").unlink()
        with pytest.raises(FileNotFoundError, match=r"b/samples\.jsonl"):
            runlog.compare(a, b)


class TestAssertions:
    def test_a_failure_names_the_first_difference_and_both_hashes(self, tmp_path):
        a = write_run(tmp_path / "a", steps(2), [{"step": 1}])
        b = write_run(tmp_path / "b", steps(2, kl=0.75), [{"step": 1}])
        with pytest.raises(AssertionError, match=r"step 1: kl is 0\.5 and 0\.75") as caught:
            assert_runs_identical(a, b)
        for run in (a, b):
            for digest in run_hashes(run).values():
                assert digest in str(caught.value)

    def test_two_empty_runs_prove_nothing(self, tmp_path):
        a, b = (write_run(tmp_path / name, []) for name in "ab")
        with pytest.raises(AssertionError, match="hold no rows"):
            assert_runs_identical(a, b)

    def test_identical_runs_do_not_differ(self, tmp_path):
        a, b = (write_run(tmp_path / name, steps(1)) for name in "ab")
        with pytest.raises(AssertionError, match="identical, and should differ"):
            assert_runs_differ(a, b)


SAMPLE = {"step": 1, "sample": 0, "prompt": "p", "completion": "c", "reward": 0.5, "kl": 0.0, "token_ids": [1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completion": 3}, "completion is 3; it must be str"),
        ({"reward": None}, "reward is None; it must be float"),
        ({"kl": "0.1"}, "kl is '0.1'; it must be float"),
        ({"sample": 0.0}, "sample is 0.0; it must be int"),
    ],
)
def test_a_sample_of_the_wrong_form_is_named_by_line_and_field(tmp_path, change, message):
    runlog.append(tmp_path / "samples.jsonl", [SAMPLE, {**SAMPLE, **change}])
    rows = runlog.read_samples(tmp_path)
    assert next(rows) == SAMPLE
    with pytest.raises(ValueError, match=rf"samples\.jsonl:2: {message}"):
        next(rows)
