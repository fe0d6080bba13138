import json
from pathlib import Path

import numpy as np
import pytest
from alert_columns import found, standing, write

from rlhf_core.alerting.readers import columns_of, read_columns, unlogged_alerts

pytestmark = pytest.mark.m3

TRL = Path(__file__).parent / "trl_1_16_grpo"
"""The states that two runs of TRL 1.16's GRPOTrainer saved: one that learns, and one with a hundred times its rate."""


# -- this project's ----------------------------------------------------------------------------------------------------


def own_run(folder, rows, timings=None):
    write(folder / "metrics.jsonl", *map(json.dumps, rows))
    if timings is not None:
        write(folder / "timings.jsonl", *map(json.dumps, timings))
    return folder


def test_null_is_what_was_not_finite(tmp_path):
    run = own_run(tmp_path, [{"step": 1, "kl": None, "entropy": 1.0, "nonfinite": ["kl"]}])
    columns = read_columns(run)
    assert np.isnan(columns["kl"][0])
    assert not np.ma.getmaskarray(columns["kl"])[0]
    assert found(columns)["nonfinite"].metric == "kl"


def test_timings_are_joined_by_step_and_missing_ones_are_masked(tmp_path):
    timings = [{"step": 2, "tokens_per_second": 5.0, "stages_s": {"rollout": 1.0}}]
    columns = read_columns(own_run(tmp_path, [{"step": 1, "kl": 1.0}, {"step": 2, "kl": 2.0}], timings))
    assert columns["tokens_per_second"].mask.tolist() == [True, False]
    assert columns["tokens_per_second"][1] == 5.0
    assert "stages_s" not in columns


def test_a_row_that_is_being_written_is_left_out(tmp_path):
    run = own_run(tmp_path, [{"step": 1, "kl": 1.0}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "k')
    assert read_columns(run)["step"].tolist() == [1]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("[1]", "whole number as its step"),
        ('{"kl": 1.0}', "whole number as its step"),
        ('{"step": 1, "kl": "high"}', "kl is 'high'; it must be a number or null"),
        ('{"step": 1, "kl": true}', "kl is True"),
        ("{", "not JSON"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, line, complaint):
    write(tmp_path / "metrics.jsonl", '{"step": 0}', line)
    with pytest.raises(ValueError, match=f"metrics.jsonl:2: .*{complaint}"):
        read_columns(tmp_path)


def test_a_folder_without_metrics_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="has begun its steps"):
        read_columns(tmp_path)


def test_a_damaged_alert_is_named_by_file_and_line(tmp_path):
    write(tmp_path / "alerts.jsonl", '{"step": 9, "name": "nonfinite"}')
    with pytest.raises(ValueError, match=r"alerts.jsonl:1: an alert has"):
        unlogged_alerts(tmp_path, last_step=3)
    assert unlogged_alerts(tmp_path, last_step=9) == []


def test_no_rows_are_columns_without_rows():
    assert columns_of([])["step"].tolist() == []


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"step": 2, "kl": 1' + "0" * 400 + "}", "kl is a number of 401 digits"),
        ('{"step": 1' + "0" * 400 + ', "kl": 1}', "whole number as its step, of at most 2\\^53"),
        ('{"step": 2, "kl": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
)
def test_a_number_that_no_float_holds_and_nesting_without_end_are_named_by_line(tmp_path, line, complaint):
    write(tmp_path / "metrics.jsonl", '{"step": 1, "kl": 1.0}', line)
    with pytest.raises(ValueError, match=f"metrics.jsonl:2: .*{complaint}"):
        read_columns(tmp_path)


# -- TRL ---------------------------------------------------------------------------------------------------------------


def test_a_healthy_run_of_trl_is_silent():
    columns = read_columns(TRL / "healthy", "trl")
    assert columns["step"].tolist() == list(range(1, 31))
    assert standing(columns, "warning") | standing(columns, "critical") == set()
    assert {"reward_mean", "reward_var", "kl_k3", "entropy", "clip_frac", "eos_rate", "lr"} <= columns.keys()


def test_a_broken_run_of_trl_is_found():
    columns = read_columns(TRL / "broken", "trl")
    assert "entropy_collapse" in standing(columns, "critical")
    assert {"reward_variance_gone", "groups_without_signal"} <= standing(columns, "warning")


def test_the_newest_checkpoint_is_read(tmp_path):
    for step in (9, 10, 100):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step, "kl": 1.0}]}))
    assert read_columns(tmp_path, "trl")["step"].tolist() == [100]
    assert read_columns(tmp_path / "checkpoint-9" / "trainer_state.json", "trl")["step"].tolist() == [9]


@pytest.mark.parametrize(("top", "read"), [(90, 100), (100, 90), (110, 90)])
def test_the_state_with_the_highest_step_is_read_be_it_a_checkpoints_or_the_folders(tmp_path, top, read):
    """The folder's own is written at the end of a training; one that goes on then writes newer checkpoints."""
    (tmp_path / "checkpoint-100").mkdir()
    for file, step in (("checkpoint-100/trainer_state.json", 100), ("trainer_state.json", 90)):
        state = {"global_step": step if step == 100 else top, "log_history": [{"step": step, "kl": 1.0}]}
        (tmp_path / file).write_text(json.dumps(state))
    assert read_columns(tmp_path, "trl")["step"].tolist() == [read]


NAN = float("nan")


def save_state(folder, rows, **more):
    folder.mkdir(parents=True, exist_ok=True)
    state = {"global_step": rows[-1]["step"] if rows else 0, "log_history": rows, **more}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def training(steps, loss=0.5, every=1):
    return [
        {"step": step, "epoch": step / 10, "loss": loss / step, "reward": NAN}
        for step in range(every, steps + 1, every)
    ]


def test_states_of_one_training_are_one_log_also_where_it_ended_was_judged_and_went_on(tmp_path):
    """Its end adds a summary and an evaluation to a step; what goes on from the checkpoint before has neither."""
    for step in (9, 10, 20):
        save_state(tmp_path / f"checkpoint-{step}", training(step))
    judged = [{"step": 10, "epoch": 1.0, "eval_loss": 3.0}, {"step": 10, "epoch": 1.0, "train_runtime": 9.0}]
    save_state(tmp_path, [*training(10), *judged, judged[0] | {"eval_loss": 2.0}])
    assert read_columns(tmp_path, "trl")["step"].tolist() == list(range(1, 21))


@pytest.mark.parametrize("every", [1, 2])
def test_a_new_training_in_an_old_output_folder_is_refused_with_the_folders_and_the_remedy(tmp_path, every):
    for step in (10, 20, 30):
        save_state(tmp_path / f"checkpoint-{step}", training(step))
    for step in (10, 20):
        save_state(tmp_path / f"checkpoint-{step}", training(step, 0.25, every))
    with pytest.raises(ValueError, match="holds states of different trainings") as refusal:
        read_columns(tmp_path, "trl")
    message = f"checkpoint-10, checkpoint-20 and checkpoint-30 do not agree on the log, first on loss at step {every}; "
    assert message + "give the trainer_state.json of the training that is meant, or move" in str(refusal.value)
    assert read_columns(tmp_path / "checkpoint-20" / "trainer_state.json", "trl")["step"].tolist()[-1] == 20
    (tmp_path / "checkpoint-30" / "trainer_state.json").unlink()
    assert read_columns(tmp_path, "trl")["loss"].tolist()[0] == 0.25 / every


def test_a_short_new_training_that_ended_in_an_old_output_folder_is_refused(tmp_path):
    save_state(tmp_path / "checkpoint-30", training(30))
    save_state(tmp_path, training(20, 0.25))
    with pytest.raises(ValueError, match=r"trainings: trainer_state\.json and checkpoint-30 do not agree"):
        read_columns(tmp_path, "trl")


def test_many_states_of_another_training_are_counted(tmp_path):
    for step in range(2, 9):
        save_state(tmp_path / f"checkpoint-{step}", training(step, 0.25))
    save_state(tmp_path / "checkpoint-30", training(30))
    with pytest.raises(ValueError, match=r"checkpoint-2, .*checkpoint-6 and 2 more and checkpoint-30 do not agree"):
        read_columns(tmp_path, "trl")


@pytest.mark.parametrize("text", ["{", "[]", '{"log_history": 3}', '{"log_history": [3, {"loss": 1}]}'])
def test_a_checkpoint_that_is_not_read_may_be_damaged(tmp_path, text):
    save_state(tmp_path / "checkpoint-30", training(30))
    (tmp_path / "checkpoint-9").mkdir()
    write(tmp_path / "checkpoint-9" / "trainer_state.json", text)
    assert len(read_columns(tmp_path, "trl")["step"]) == 30


def trl_history(**at_step_3):
    usual = {"loss": 0.1, "reward": 0.5, "kl": 0.1, "grad_norm": 1.0, "rewards/code/mean": 0.5, "rewards/code/std": 0.1}
    return [{"step": step} | usual | (at_step_3 if step == 3 else {}) for step in range(1, 6)]


@pytest.mark.parametrize("name", ["rewards/code/mean", "rewards/code/std", "eval_rewards/my/code/mean"])
def test_nan_of_a_reward_function_that_did_not_apply_is_no_value_and_no_alert(tmp_path, name):
    path = write(tmp_path / "log.json", json.dumps(trl_history(**{name: NAN, "rewards/b/mean": 0.25})))
    columns = read_columns(path, "trl")
    assert name not in columns or columns[name].mask.tolist() == [False, False, True, False, False]
    assert columns["rewards/b/mean"].compressed().tolist() == [0.25]
    assert "nonfinite" not in found(columns)


@pytest.mark.parametrize("name", ["reward", "loss", "kl", "grad_norm", "reward_std", "rewards/code"])
def test_nan_in_what_always_applies_is_critical(tmp_path, name):
    columns = read_columns(write(tmp_path / "log.json", json.dumps(trl_history(**{name: NAN}))), "trl")
    alert = found(columns)["nonfinite"]
    assert (alert.severity, alert.first_step) == ("critical", 3)


def test_infinity_in_a_reward_function_is_critical(tmp_path):
    columns = read_columns(
        write(tmp_path / "log.json", json.dumps(trl_history(**{"rewards/code/mean": np.inf}))), "trl"
    )
    assert found(columns)["nonfinite"].metric == "rewards/code/mean"


@pytest.mark.parametrize(
    ("step", "complaint"),
    [("1e300", "step is 1e+300; it must be a whole number"), ("1" + "0" * 400, "401 digits"), ("2.5", "step is 2.5")],
)
def test_an_impossible_step_of_trl_is_left_out_and_named(tmp_path, step, complaint):
    path = write(tmp_path / "log.json", '[{"step": 1, "loss": 1}, {"step": ' + step + ', "loss": 1}]')
    reports = []
    assert read_columns(path, "trl", reports.append)["step"].tolist() == [1]
    [report] = reports
    assert "1 row that cannot be read is left out" in report
    assert f"{path}, entry 2 of log_history: " in report
    assert complaint in report


def test_the_names_of_trls_ppo_mean_what_ours_mean(tmp_path):
    history = [
        {"step": 1, "objective/kl": 4.0, "objective/non_score_reward": -0.2, "objective/scores": 1.5, "lr": 1e-5},
        {"step": 1, "eval_loss": 3.0},
        {"step": 2, "objective/kl": 5.0, "policy/approxkl_avg": 0.01, "policy/clipfrac_avg": 0.1, "note": "text"},
    ]
    columns = read_columns(write(tmp_path / "log.json", json.dumps(history)), "trl")
    assert columns["step"].tolist() == [1, 2]
    assert columns["kl"].tolist() == [4.0, 5.0]
    assert columns["kl_coef"].compressed().tolist() == [0.05]
    assert columns["eval_loss"].compressed().tolist() == [3.0]
    assert columns["clip_frac"].compressed().tolist() == [0.1]
    assert "note" not in columns


def test_trl_s_evaluations_and_its_last_line_are_of_the_step_before_them(tmp_path):
    """Each of its rows has the epoch, so that rows of one step are never wholly different."""
    history = []
    for step in range(1, 31):
        history.append(
            {"step": step, "epoch": step / 30, "reward": 0.1, "grad_norm": float("nan") if step == 10 else 1}
        )
        if step % 10 == 0:
            history.append({"step": step, "epoch": step / 30, "eval_loss": 3.0, "eval_runtime": 5.0})
    history.append({"step": 30, "epoch": 1.0, "train_runtime": 100.0, "total_flos": 0.0})
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    columns = read_columns(tmp_path, "trl")
    assert columns["step"].tolist() == list(range(1, 31))
    alerts = found(columns)
    assert "steps_out_of_order" not in alerts
    assert (alerts["nonfinite"].metric, alerts["nonfinite"].first_step) == ("grad_norm", 10)


@pytest.mark.parametrize("again", [{"step": 3, "epoch": 0.3, "loss": 1.0}, {"step": 3, "epoch": 0.4, "reward": 1.0}])
def test_a_step_that_was_done_twice_stays_two_rows(tmp_path, again):
    history = [{"step": step, "epoch": step / 10, "loss": 1.0} for step in (1, 2, 3)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [*history, again]}))
    columns = read_columns(tmp_path, "trl")
    assert columns["step"].tolist() == [1, 2, 3, 3]
    assert "steps_out_of_order" in found(columns)


def test_nan_in_a_trainer_state_is_found(tmp_path):
    write(tmp_path / "trainer_state.json", '{"log_history": [{"step": 1, "loss": 0.1}, {"step": 2, "loss": NaN}]}')
    alert = found(read_columns(tmp_path, "trl"))["nonfinite"]
    assert (alert.metric, alert.first_step) == ("loss", 2)


def test_a_step_that_is_logged_twice_stays_twice(tmp_path):
    history = [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 2, "loss": 0.3}]
    columns = read_columns(write(tmp_path / "log.json", json.dumps(history)), "trl")
    assert "steps_out_of_order" in found(columns)


@pytest.mark.parametrize("text", ["{}", "[1]", "not json", '{"log_history": {}}', '{"log_history": []}', "null"])
def test_what_is_no_trainer_state_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match="trainer_state|log_history|rows with a step"):
        read_columns(write(tmp_path / "trainer_state.json", text), "trl")


@pytest.mark.parametrize("kind", ["trl", "openrlhf", "verl"])
def test_a_missing_log_is_named(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "none")):
        read_columns(tmp_path / "none", kind)
