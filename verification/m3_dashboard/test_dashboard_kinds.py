"""Runs of every command: what is shown of each, how far it is, and who judges it."""

import os

import pytest
from dashboard_page import CHARTS, chart_count, html, page
from dashboard_runs import append, finish, make_run, make_stage_run, metrics_row, timing_row

from dashboard import kinds, questions
from dashboard.store import Store
from rlhf_core.metrics import DPO_METRICS, EVAL_METRICS, REWARD_METRICS, SFT_METRICS, TIMINGS
from rlhf_core.stage_config import TrainingConfig
from rlhf_core.supervised import number_of_steps

pytestmark = pytest.mark.m3

TABLES = {"sft": SFT_METRICS, "reward": REWARD_METRICS, "dpo": DPO_METRICS, "eval": EVAL_METRICS}
STEPS = {"sft": 2 * 100 // 32, "reward": 9, "dpo": 9, "eval": 4}


@pytest.mark.parametrize("kind", TABLES)
def test_no_metric_of_any_command_is_hidden(kind):
    names = [metric.name for metric in (*TABLES[kind], *TIMINGS)]
    groups = questions.grouped(names, everything=False)
    assert {name for group in groups.values() for name in group} == set(names)
    assert questions.OTHER not in groups


def test_metrics_of_no_table_are_shown_where_nothing_else_says_whether_a_run_learns():
    assert questions.grouped(["lr", "mine"], everything=False)[questions.OTHER] == ["mine"]
    assert questions.OTHER not in questions.grouped(["reward_mean", "mine"], everything=False)


def test_a_unit_that_two_commands_give_differently_is_not_named():
    assert questions.title("units") == "units"
    assert questions.title("loss") == "loss"
    assert questions.title("kl") == "kl, nats"


@pytest.mark.parametrize("kind", TABLES)
def test_a_run_of_each_command_is_running_until_it_leaves_its_result(runs, kind):
    run = make_stage_run(runs, kind, 3)
    words = html(page(run=kind))
    assert f"step 3 of {STEPS[kind]}" in words
    assert "running" in words
    for log in run.glob("*.jsonl"):
        os.utime(log, (10**9, 10**9))
    assert "no new row for" in html(page(run=kind))
    finish(run)
    words = html(page(run=kind))
    assert "finished" in words
    assert "no new row" not in words


@pytest.mark.parametrize(("rows", "epochs", "batch_size"), [(100, 2, 32), (7, 3, 32), (64, 1, 64), (65, 5, 8)])
def test_the_steps_of_epochs_are_those_that_the_trainer_does(runs, rows, epochs, batch_size):
    run = make_stage_run(runs, "sft", 1)
    (run / "data" / "report.json").write_text(f'{{"used": {rows + 20}, "held_out": 20}}')
    config = {"training": {"steps": None, "epochs": epochs, "batch_size": batch_size}}
    expected = number_of_steps(TrainingConfig(epochs=epochs, batch_size=batch_size), rows)
    assert kinds.planned_steps(run, config) == expected


@pytest.mark.parametrize("report", ["", "[]", "{}", '{"used": "x"}', '{"used": 20, "held_out": 20}'])
def test_without_a_report_of_the_data_nobody_knows_the_steps(runs, report):
    for kind in ("sft", "eval"):
        run = make_stage_run(runs, kind, 1)
        (run / "data" / "report.json").write_text(report)
        if kind == "sft" or "20" not in report:
            assert Store(runs).run(kind).progress().steps is None


@pytest.mark.parametrize("kind", TABLES)
def test_only_a_training_with_ppo_is_called_healthy(runs, kind):
    make_stage_run(runs, kind, 3)
    words = html(page(run=kind))
    assert "Not judged" in words
    assert f"No rule judges how good a run of rlhf {kind} is" in words
    assert "Healthy" not in words


def test_a_log_that_no_rule_of_learning_can_read_is_not_called_healthy(runs):
    make_run(runs, "ours", 12)
    run = runs / "foreign"
    run.mkdir()
    append(run / "metrics.jsonl", *({"step": step, "mine": 1.0} for step in range(1, 12)))
    assert "Not judged" in html(page(run="foreign"))
    assert "Healthy" in html(page(run="ours"))


def test_rules_about_a_policy_that_learns_do_not_judge_other_commands(runs):
    """A reward model's mean reward may fall, and the KL of an evaluation of the reference itself is 0."""
    for kind, spoiled in (("reward", {"reward_mean": -50.0}), ("eval", {"kl": 0.0, "reward_mean": -50.0})):
        run = make_stage_run(runs, kind, 40)
        append(run / "metrics.jsonl", *({"step": step, "nonfinite": []} | spoiled for step in range(41, 61)))
        assert Store(runs).run(kind).alerts() == []
    run = make_run(runs, "train", 40, planned=60)
    append(run / "metrics.jsonl", *(metrics_row(step, reward_mean=-50.0) for step in range(41, 61)))
    append(run / "timings.jsonl", *(timing_row(step) for step in range(41, 61)))
    assert "reward_falling" in {alert.name for alert in Store(runs).run("train").alerts()}


def test_rules_that_could_not_look_are_named_with_what_the_log_lacks(runs):
    run = make_run(runs, "a", 0, planned=9)
    for step in range(1, 9):
        row = metrics_row(step)
        append(
            run / "metrics.jsonl", {name: row[name] for name in row if name not in ("clip_frac", "reward_length_corr")}
        )
    words = html(page())
    assert "clip frac high" in words
    assert "The log has no" in words
    assert "clip_frac" in words[words.index("The log has no") :]
    make_run(runs, "whole", 9)
    assert "not checked" not in html(page(run="whole"))


def test_one_rule_and_several_that_could_not_look_are_told_in_right_grammar(runs):
    for name, lacking in (("one", ("reward_length_corr",)), ("more", ("reward_length_corr", "lr"))):
        run = make_run(runs, name, 0, planned=9)
        rows = [metrics_row(step) | timing_row(step) for step in range(1, 9)]
        append(run / "metrics.jsonl", *({key: row[key] for key in row if key not in lacking} for row in rows))
    assert "1 rule is not checked: the log lacks what it needs" in html(page(run="one"))
    assert "2 rules are not checked: the log lacks what they need" in html(page(run="more"))


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_a_command_without_completions_says_so_and_shows_the_metrics_of_its_step(runs, kind):
    make_stage_run(runs, kind, 3)
    app = page(run=kind, view="Completions")
    assert app.text[0].value == f"A run of rlhf {kind} draws no completions."
    assert len(app.dataframe[0].value) == len(TABLES[kind]) + len(TIMINGS)


def test_the_completions_of_an_evaluation_are_shown(runs):
    make_stage_run(runs, "eval", 3)
    app = page(run="eval", view="Completions")
    assert len(app.dataframe[0].value) == 2
    assert "no log-probs of single tokens; rlhf train logs them" in html(app)


def test_two_stages_without_completions_are_compared_by_their_metrics(runs):
    for name in ("a", "b"):
        make_stage_run(runs, "sft", 3, name=name)
    assert page(run=["a", "b"], view="Compare").text[-1].value == "a and b: identical"
    append(runs / "b" / "metrics.jsonl", {"step": 4})
    assert "first difference at step 4" in page(run=["a", "b"], view="Compare").text[-1].value


class TestPipelines:
    @pytest.fixture
    def pipeline(self, runs):
        folder = runs / "pipe"
        folder.mkdir()
        (folder / "config.json").write_text('{"ppo": {"steps": 2}, "reward_model": {}, "sft": {}, "judging": {}}')
        return folder

    def test_its_stages_are_runs_and_it_is_none(self, runs, pipeline):
        assert Store(runs).names() == []
        make_stage_run(pipeline, "sft", 3)
        make_run(pipeline, "ppo", 3)
        (pipeline / "linked").symlink_to(pipeline / "sft")
        assert sorted(Store(runs).names()) == ["pipe/ppo", "pipe/sft"]

    def test_a_stage_is_looked_at_like_any_run(self, runs, pipeline):
        make_run(pipeline, "ppo", 12)
        for view in ("Metrics", "Completions", "Profile", "Compare"):
            assert "step 12 of 12" in html(page(run="pipe/ppo", view=view))
        assert chart_count(page(run="pipe/ppo")) == CHARTS

    def test_what_is_beside_its_stages_is_not_reached_through_it(self, runs, pipeline):
        make_run(runs, "other", 3)
        make_run(pipeline, "ppo", 3)
        for name in ("pipe/../other", "pipe/", "pipe/.", "pipe/ppo/"):
            with pytest.raises(LookupError):
                Store(runs).run(name)
