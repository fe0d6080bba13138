"""Resuming: what is not as the checkpoint says is one line with the remedy, and a remedy that works."""

import json
import shutil

import pytest
from pipeline_data import COMMON, MODEL, TRAINING, preferences, write_rows

from rlhf_core import checkpoint, run_folder, runlog
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


def remove_steps(path, *steps):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["step"] not in steps))


@pytest.mark.parametrize(
    ("missing", "said", "before"),
    [((2,), "no row of step 2", 1), ((3, 4), "no rows of steps 3 to 4", 2), ((1,), "no row of step 1", 0)],
)
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_rows_that_are_missing_in_the_middle_are_refused_and_the_remedy_ends_in_the_same_bytes(
    finished_run, run, name, missing, said, before
):
    remove_steps(run / name, *missing)
    assert f"{name} has {said}; put the missing rows back, or remove the checkpoints after step {before} from" in (
        refused(run)
    )
    for step in (4, 5):
        shutil.rmtree(run / "checkpoints" / f"step_{step:06d}")
    outcome = resume(run)
    assert outcome.code == 0, outcome.err
    assert_runs_identical(finished_run, run)


def test_rows_that_are_missing_behind_the_checkpoint_are_done_again(finished_run, run):
    shutil.rmtree(run / "checkpoints" / "step_000005")
    rows = [{"step": 7}, {"step": 9}]
    runlog.append(run / "metrics.jsonl", rows)
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


STAGES = ("sft", "reward", "dpo")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with a model, preferences, and of each stage a run that starts from the model."""
    folder = tmp_path_factory.mktemp("begun")
    made = run_command("sft", *COMMON, *MODEL, *TRAINING, *placed(folder, "policy"))
    assert made.code == 0, made.err
    for stage in STAGES:
        path = ("--model.path", folder / "runs" / "policy" / "model")
        outcome = run_command(stage, *COMMON, *path, *TRAINING, *placed(folder, stage))
        assert outcome.code == 0, outcome.err
    return folder


def placed(folder, name):
    data = write_rows(folder / "pairs.jsonl", preferences())
    return ("--data", data, "--held-out", "0.3", "--runs", folder / "runs", "--name", name)


@pytest.mark.parametrize("left", ["0, 4 and 6", "0 and 4", "none"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_stage_needs_the_folder_of_its_model_no_more(begun, tmp_path, stage, left):
    mine = tmp_path / "mine"
    shutil.copytree(begun / "runs" / stage, mine)
    config = mine / "config.json"
    config.write_text(config.read_text().replace(str(begun), str(tmp_path / "gone")))
    for folder in mine.glob("checkpoints/step_*"):
        if str(int(folder.name[5:])) not in left:
            shutil.rmtree(folder)
    shutil.rmtree(mine / "model")
    outcome = run_command(stage, "--resume", "--name", "mine", "--runs", tmp_path)
    assert outcome.code == 0, outcome.err
    assert_runs_identical(begun / "runs" / stage, mine)
    for name in ("model/manifest.json", "evaluation.json", "checkpoints/step_000006/manifest.json"):
        assert (mine / name).read_bytes() == (begun / "runs" / stage / name).read_bytes(), name


def test_a_damaged_copy_of_the_model_is_made_again_from_its_folder_and_missed_without_it(begun, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(begun / "runs" / "dpo", mine)
    with (mine / "models" / "base" / "config.json").open("a") as file:
        file.write(" ")
    outcome = run_command("dpo", "--resume", "--name", "mine", "--runs", tmp_path)
    assert outcome.code == 0, outcome.err
    assert checkpoint.is_sound(mine / "models" / "base")
    shutil.rmtree(mine / "models")
    config = mine / "config.json"
    config.write_text(config.read_text().replace(str(begun), str(tmp_path / "gone")))
    outcome = run_command("dpo", "--resume", "--name", "mine", "--runs", tmp_path)
    assert outcome.code == 2
    assert f"no model folder '{tmp_path}/gone/runs/policy/model'" in outcome.complaint


@pytest.mark.parametrize("stage", STAGES)
def test_a_row_that_is_missing_in_the_log_of_a_stage_is_refused(begun, tmp_path, stage):
    shutil.copytree(begun / "runs" / stage, tmp_path / "mine")
    remove_steps(tmp_path / "mine" / "metrics.jsonl", 3)
    outcome = run_command(stage, "--resume", "--name", "mine", "--runs", tmp_path)
    assert outcome.code == 2
    assert "metrics.jsonl has no row of step 3; put the missing rows back, or remove the" in outcome.complaint


def test_an_evaluation_that_is_resumed_needs_the_folder_of_its_policy_and_names_it(begun, tmp_path):
    path = begun / "runs" / "policy" / "model"
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"film {number}"} for number in range(8)])
    options = ("--model.path", path, "--data", data, "--sampling.max-new-tokens", "3", "--runs", tmp_path)
    outcome = run_command("eval", *COMMON, *options, "--name", "judged")
    assert outcome.code == 0, outcome.err
    config = tmp_path / "judged" / "config.json"
    config.write_text(config.read_text().replace(str(path), str(tmp_path / "gone")))
    outcome = run_command("eval", "--resume", "--name", "judged", "--runs", tmp_path)
    assert outcome.code == 2
    assert f"no model folder '{tmp_path}/gone'" in outcome.complaint
