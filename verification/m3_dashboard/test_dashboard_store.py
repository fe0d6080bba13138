import json
import os
import time

import numpy as np
import pytest
from dashboard_runs import append, make_long_log, make_run, metrics_row, timing_row

from dashboard import folder, jsonl
from dashboard.store import Run, Store
from rlhf_core.alerting import readers
from rlhf_core.alerting.thresholds import default_thresholds
from rlhf_core.alerts import check

pytestmark = pytest.mark.m3


@pytest.fixture
def runs(tmp_path):
    return (tmp_path / "runs").resolve()


def steps_of(run) -> list[float]:
    return run.curve("kl", "step", None, 10**6).x.tolist()


def old(run, seconds: float = 60.0) -> None:
    """Make a run's logs look as if they had been written a while ago: no row waits for its timings."""
    for path in run.glob("*.jsonl"):
        os.utime(path, (time.time() - seconds,) * 2)


class TestGrowingLogs:
    def test_new_rows_are_read_and_old_ones_never_again(self, runs, monkeypatch):
        run = make_run(runs, "a", 3, planned=9)
        store = Store(runs)
        assert steps_of(store.run("a")) == [1, 2, 3]
        read = []
        block = jsonl.Tail.block
        monkeypatch.setattr(jsonl.Tail, "block", lambda tail: read.append(block(tail)) or read[-1])
        append(run / "metrics.jsonl", metrics_row(4, kl=7.5))
        append(run / "timings.jsonl", timing_row(4))
        again = store.run("a")
        assert steps_of(again) == [1, 2, 3, 4]
        assert again.latest()["kl"] == 7.5
        assert b"".join(read).count(b"\n") == 2

    def test_a_torn_last_line_waits_for_its_rest(self, runs):
        run = make_run(runs, "a", 2, planned=9)
        store = Store(runs)
        whole = (json.dumps(metrics_row(3)) + "\n").encode()
        append(run / "timings.jsonl", timing_row(3))
        for cut in (1, len(whole) // 2, len(whole) - 1):
            with (run / "metrics.jsonl").open("ab") as file:
                file.write(whole[:cut])
            assert steps_of(store.run("a")) == [1, 2]
            with (run / "metrics.jsonl").open("rb+") as file:
                file.truncate((run / "metrics.jsonl").stat().st_size - cut)
        with (run / "metrics.jsonl").open("ab") as file:
            file.write(whole)
        found = store.run("a")
        assert steps_of(found) == [1, 2, 3]
        assert found.progress().bad_lines == 0

    @pytest.mark.parametrize("how", ["renamed", "in place"])
    def test_a_log_that_was_cut_is_read_anew(self, runs, how):
        run = make_run(runs, "a", 9, planned=20)
        store = Store(runs)
        assert steps_of(store.run("a")) == list(range(1, 10))
        for name in ("metrics.jsonl", "timings.jsonl"):
            kept = b"".join((run / name).read_bytes().splitlines(keepends=True)[:4])
            if how == "renamed":
                (run / "new").write_bytes(kept)
                (run / "new").replace(run / name)
            else:
                (run / name).write_bytes(kept)
        append(run / "metrics.jsonl", *(metrics_row(step, kl=9.0) for step in range(5, 12)))
        append(run / "timings.jsonl", *(timing_row(step) for step in range(5, 12)))
        found = store.run("a")
        assert steps_of(found) == list(range(1, 12))
        assert found.curve("kl", "step", None, 100).mean[4:].tolist() == [9.0] * 7
        assert found.progress().rows == 11

    def test_a_log_that_grew_past_its_former_length_after_a_cut_is_read_anew(self, runs):
        """Neither size nor inode tell: only what stands before the place where reading stopped."""
        run = make_run(runs, "a", 5, planned=50)
        store = Store(runs)
        store.run("a")
        (run / "metrics.jsonl").write_bytes(b"")
        append(run / "metrics.jsonl", *(metrics_row(step, kl=3.25) for step in range(1, 30)))
        old(run)
        assert store.run("a").curve("kl", "step", None, 100).mean.tolist() == [3.25] * 29

    def test_a_log_that_is_gone_and_comes_back(self, runs):
        run = make_run(runs, "a", 3)
        store = Store(runs)
        store.run("a")
        (run / "metrics.jsonl").unlink()
        assert steps_of(store.run("a")) == []
        append(run / "metrics.jsonl", metrics_row(1))
        old(run)
        assert steps_of(store.run("a")) == [1]

    def test_a_row_waits_a_moment_for_its_timings_and_then_goes_without(self, runs):
        run = make_run(runs, "a", 2, planned=9)
        store = Store(runs)
        append(run / "metrics.jsonl", metrics_row(3))
        assert steps_of(store.run("a")) == [1, 2]
        append(run / "timings.jsonl", timing_row(3, seconds=2.0))
        assert store.run("a").latest()["step_time_s"] == 2.0
        append(run / "metrics.jsonl", metrics_row(4))
        old(run, 2.0)
        found = store.run("a")
        assert steps_of(found) == [1, 2, 3, 4]
        assert "step_time_s" not in found.latest()


class TestOddLogs:
    @pytest.mark.parametrize(
        "line",
        [b"{", b"[1, 2]", b"7", b'{"kl": 1}', b'{"step": "4"}', b'{"step": 1.5}', b"\xff\xfe", b"[" * 5000, b"null"],
    )
    def test_a_line_that_is_no_row_is_left_out_and_counted(self, runs, line):
        run = make_run(runs, "a", 2)
        with (run / "metrics.jsonl").open("ab") as file:
            file.write(line + b"\n")
        append(run / "metrics.jsonl", metrics_row(3))
        append(run / "timings.jsonl", timing_row(3))
        found = Store(runs).run("a")
        assert steps_of(found) == [1, 2, 3]
        assert found.progress().bad_lines == 1

    def test_what_was_not_finite_is_a_gap_that_is_counted(self, runs):
        run = make_run(runs, "a", 2)
        append(run / "metrics.jsonl", metrics_row(3, kl=None), metrics_row(4))
        append(run / "timings.jsonl", timing_row(3), timing_row(4))
        curve = Store(runs).run("a").curve("kl", "step", None, 100)
        assert np.isnan(curve.mean).tolist() == [False, False, True, False]
        assert curve.bad.tolist() == [0, 0, 1, 0]

    def test_a_metric_that_begins_late_has_no_value_before(self, runs):
        run = make_run(runs, "a", 2)
        append(run / "metrics.jsonl", metrics_row(3, late=1.5))
        append(run / "timings.jsonl", timing_row(3))
        curve = Store(runs).run("a").curve("late", "step", None, 100)
        assert curve.mean.tolist()[2:] == [1.5]
        assert curve.bad.tolist() == [0, 0, 0]

    def test_other_trainers_rows_are_drawn_too(self, runs):
        run = runs / "foreign"
        run.mkdir(parents=True)
        append(
            run / "metrics.jsonl", *({"step": step, "loss/x": step / 2, "note": "text", "ok": True} for step in (1, 2))
        )
        found = Store(runs).run("foreign")
        assert found.names() == ["loss/x"]
        assert found.curve("loss/x", "step", None, 9).mean.tolist() == [0.5, 1.0]
        assert found.progress().steps is None

    def test_an_empty_folder_a_missing_one_and_a_run_without_rows(self, runs):
        assert Store(runs).names() == []
        runs.mkdir()
        (runs / "no_run").mkdir()
        (runs / "file").write_text("x")
        assert Store(runs).names() == []
        make_run(runs, "begun", 0, planned=5)
        found = Store(runs).run("begun")
        assert (found.progress().last_step, found.progress().steps, found.alerts()) == (None, 5, [])
        with pytest.raises(folder.NoSuchRun, match="no run 'no_run'"):
            Store(runs).run("no_run")

    def test_a_configuration_that_is_none(self, runs):
        run = make_run(runs, "a", 1)
        for content in ("", "{", "[]", '{"ppo": 3}', '{"ppo": {"steps": "x"}}', "[" * 100_000):
            (run / "config.json").write_text(content)
            assert Store(runs).run("a").progress().steps is None


class TestAlerts:
    def test_they_are_those_of_the_whole_log_whatever_the_reading_was(self, runs):
        run = make_run(runs, "a", 30, planned=30)
        rows = [metrics_row(step, kl=40.0 + 10 * step, kl_per_token=5.0, entropy=0.001) for step in range(31, 61)]
        store = Store(runs)
        store.run("a")
        for step, row in enumerate(rows, start=31):
            append(run / "metrics.jsonl", row)
            append(run / "timings.jsonl", timing_row(step))
            found = store.run("a").alerts()
        whole = check(readers.read_columns(run), default_thresholds())
        assert found
        assert [alert.to_json() for alert in found] == [alert.to_json() for alert in whole]

    def test_a_run_that_is_not_over_and_writes_no_more_is_stalled_and_one_that_is_over_is_not(self, runs):
        for name, planned in (("over", 10), ("open", 20)):
            old(make_run(runs, name, 10, planned=planned), 10_000)
        store = Store(runs)
        names = {name: {alert.name for alert in store.run(name).alerts()} for name in ("over", "open")}
        assert names == {"over": set(), "open": {"stalled"}}


def test_few_runs_are_held_at_a_time(runs):
    for number in range(20):
        make_run(runs, f"run{number}", 1)
    store = Store(runs)
    for name in store.names():
        store.run(name)
    assert len(store._runs) == 12


def test_a_run_is_made_once_however_often_it_is_looked_at(runs, monkeypatch):
    from dashboard import store as module

    make_run(runs, "a", 1)
    made = []
    monkeypatch.setattr(module, "Run", lambda path: made.append(path) or Run(path))
    store = Store(runs)
    assert store.run("a") is store.run("a")
    assert made == [runs / "a"]


def test_links_and_files_are_no_runs_and_the_newest_stands_first(runs):
    for age, name in enumerate(("new", "older", "oldest")):
        run = make_run(runs, name, 1)
        os.utime(run / "config.json", (10**9 - age,) * 2)
    (runs / "latest").symlink_to("new")
    assert folder.list_runs(runs) == ["new", "older", "oldest"]


def test_a_folder_whose_name_is_no_text_is_left_out(runs):
    make_run(runs, "a", 1)
    make_run(runs, os.fsdecode(b"bad\xff"), 1)
    assert folder.list_runs(runs) == ["a"]


def test_a_long_log_is_previewed_at_once_and_read_in_the_background(runs, monkeypatch):
    from dashboard import store as module

    monkeypatch.setattr(module, "AT_ONCE_BYTES", 1 << 16)
    monkeypatch.setattr(module, "HEAD_START_S", 0.2)
    make_long_log(runs / "long", 3000)
    found = Store(runs).run("long")
    preview = found.curve("kl", "step", None, 10**6)
    assert found.progress().read < 1
    assert preview.x[[0, -1]].tolist() == [1, 3000]
    assert 100 < len(preview.x) <= 401
    found._reader.join()
    assert found.progress().read == 1.0
    assert steps_of(found) == list(range(1, 3001))
    assert found.curve("reward_mean", "step", None, 50).low.min() == -7.0


def test_new_rows_of_a_long_log_show_while_it_is_read_in_the_background(runs, monkeypatch):
    from dashboard import store as module

    monkeypatch.setattr(module, "AT_ONCE_BYTES", 1 << 16)
    monkeypatch.setattr(module, "HEAD_START_S", 1.0)
    make_long_log(runs / "long", 3000)
    store = Store(runs)
    assert store.run("long").latest()["step"] == 3000
    append(runs / "long" / "metrics.jsonl", metrics_row(3001, kl=77.0))
    append(runs / "long" / "timings.jsonl", timing_row(3001))
    found = store.run("long")
    assert found.progress().read < 1
    assert found.latest()["kl"] == 77.0
    assert found.curve("kl", "step", None, 10**6).x[[0, -1]].tolist() == [1, 3001]
    found._reader.join()
    assert steps_of(store.run("long")) == list(range(1, 3002))


@pytest.mark.slow
def test_a_million_steps_are_seen_at_once_read_soon_and_held_in_bounded_memory(runs):
    import resource

    make_long_log(runs / "million", 1_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    store = Store(runs)
    begin = time.perf_counter()
    run = store.run("million")
    preview = run.curve("reward_mean", "step", None, 500)
    first_s = time.perf_counter() - begin
    assert preview.x[[0, -1]].tolist() == [1, 1_000_000]
    run._reader.join()
    read_s = time.perf_counter() - begin
    assert run.progress().rows == 1_000_000
    assert run.curve("reward_mean", "step", None, 500).low.min() == -7.0
    append(runs / "million" / "metrics.jsonl", metrics_row(1_000_001, kl=77.0))
    append(runs / "million" / "timings.jsonl", timing_row(1_000_001))
    begin = time.perf_counter()
    assert store.run("million").latest()["kl"] == 77.0
    new_s = time.perf_counter() - begin
    held_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"\npreview {first_s:.2f} s, whole log {read_s:.1f} s, a new row {new_s * 1e3:.1f} ms, {held_mib:.0f} MiB more"
    )
    assert first_s < 20
    assert new_s < 5
    assert held_mib < 400
