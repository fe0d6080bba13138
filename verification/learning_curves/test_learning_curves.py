"""Every method learns, and the table in ``docs/learning_curves.md`` is what the runs say."""

import json
import os

import curves
import pytest
from curves import METHODS, ROOT, SEEDS, TASKS, Cell, interval, result, run_from_base, shown, table, write_section

from rlhf_core.testing.command import TINY_RUN, run_command

DOCUMENT = ROOT / "docs" / "learning_curves.md"
CELLS = [Cell(task, method, seed) for task in TASKS for method in METHODS for seed in SEEDS]


def needed(task: str) -> None:
    if task == "sentences" and not os.environ.get("SENTENCES"):
        pytest.skip("SENTENCES in the environment names no folder with *.pos and *.neg")


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_the_reward_rises_beyond_its_interval(cell):
    needed(cell.task)
    for reward in result(cell)["rewards"].values():
        # DPO's gain is small beside the interval (DECISIONS.md), so only its sign is asked for.
        assert reward["change"]["mean" if cell.method == "dpo" else "low"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dr-grpo", "reinforce++", "reinforce++-baseline"])
def test_the_other_algorithms_learn_the_embedded_task_too(algorithm):
    assert result(Cell("embedded", algorithm, 0))["rewards"]["reward"]["change"]["low"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_mean_over_seeds_rises_and_is_written_down(task):
    needed(task)
    cells = [cell for cell in CELLS if cell.task == task]
    results = {cell: result(cell) for cell in cells}
    write_section(DOCUMENT, task, table(task, results))
    for method in METHODS:
        changes = [results[Cell(task, method, seed)]["rewards"] for seed in SEEDS]
        for judge in changes[0]:
            mean, low, _ = interval([one[judge]["change"]["mean"] for one in changes])
            assert (mean if method == "dpo" else low) > 0, (method, judge)


def test_the_interval_over_seeds_is_students():
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3.0, 3 - 1.963243, 3 + 1.963243), abs=1e-6)
    assert shown([1.0, 2.0, 3.0, 4.0, 5.0]) == "+3.000 [+1.037, +4.963]"


def test_a_section_is_replaced_and_the_rest_stays(tmp_path):
    path = tmp_path / "a.md"
    path.write_text("# A\n<!-- x -->\nold\n<!-- end of x -->\ntail\n")
    write_section(path, "x", "new")
    assert path.read_text() == "# A\n<!-- x -->\nnew\n<!-- end of x -->\ntail\n"


def test_another_configuration_is_another_cell():
    assert Cell("embedded", "ppo", 0).folder() != Cell("embedded", "ppo", 1).folder()
    hashes = {str(Cell("embedded", method, 0).folder())[-12:] for method in ("ppo", "grpo", "rloo", "dpo")}
    assert len(hashes) == 4


@pytest.mark.usefixtures("reviews_drawn_once")
@pytest.mark.parametrize("method", ["dpo", "best-of-n"])
def test_what_starts_from_ppos_base_model_runs_on_a_tiny_run(monkeypatch, tmp_path, method):
    """Whether it works, in seconds; what it learns is for the slow tests."""
    monkeypatch.setenv("CURVES", str(tmp_path))
    monkeypatch.setattr(Cell, "folder", lambda self: tmp_path / self.method)
    options = ("--log.evaluation-prompts", "2", "--ppo.batch-size", "8", "--runs", tmp_path, "--name", "ppo")
    outcome = run_command("train", *TINY_RUN, *options)
    assert outcome.code == 0, outcome.err
    monkeypatch.setattr(curves, "DPO_BATCH", 2)
    run_from_base(Cell("embedded", method, 3))
    found = result(Cell("embedded", method, 3))
    assert found["prompts"] == 2
    before, after = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("ppo", method))
    assert after["rewards"]["reward"]["before"] == before["rewards"]["reward"]["before"]
    assert after["kl"]["mean"] != 0.0
