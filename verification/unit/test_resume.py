"""Resuming: what is not as the checkpoint says is one line with the remedy, and a remedy that works."""

import shutil

import pytest

from rlhf_core import run_folder, runlog
from rlhf_core.testing.assertions import assert_runs_identical
from rlhf_core.testing.command import run_command

pytestmark = pytest.mark.usefixtures("reviews_drawn_once")


@pytest.fixture
def run(tmp_path, finished_run):
    """A copy of the finished run of five steps, with checkpoints of steps 0, 4 and 5."""
    shutil.copytree(finished_run, tmp_path / "runs" / "mine")
    return tmp_path / "runs" / "mine"


def resume(run):
    return run_command("train", "--resume", "--name", run.name, "--runs", run.parent)


def refused(run):
    """The complaint of a resume that changes no file."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    outcome = resume(run)
    assert outcome.code == 2, outcome
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    return outcome.complaint


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "timings.jsonl"])
def test_a_log_that_is_shorter_than_the_checkpoint_is_refused_and_the_remedy_ends_in_the_same_bytes(
    finished_run, run, name
):
    runlog.keep_through_step(run / name, 3)
    assert f"{name} ends at step 3, and the checkpoint is of step 5; put the missing rows back" in refused(run)
    for step in (4, 5):
        shutil.rmtree(run / "checkpoints" / f"step_{step:06d}")
    outcome = resume(run)
    assert outcome.code == 0, outcome.err
    assert_runs_identical(finished_run, run)


def test_a_kill_between_a_checkpoint_and_the_row_of_its_time_is_no_loss(finished_run, run):
    runlog.keep_through_step(run / "timings.jsonl", 4)
    outcome = resume(run)
    assert outcome.code == 0, outcome.err
    assert_runs_identical(finished_run, run)


def test_a_resumed_latest_goes_on_in_its_own_folder_when_latest_moves_on(finished_run, run, monkeypatch):
    shutil.rmtree(run / "checkpoints" / "step_000005")
    run_folder.point_latest(run)
    append, other = runlog.append, run.parent / "other"

    def append_as_another_run_begins(path, rows):
        other.mkdir(exist_ok=True)
        run_folder.point_latest(other)
        append(path, rows)

    monkeypatch.setattr(runlog, "append", append_as_another_run_begins)
    outcome = run_command("train", "--resume", "--runs", run.parent)
    assert outcome.code == 0, outcome.err
    assert list(other.iterdir()) == []
    assert_runs_identical(finished_run, run)
