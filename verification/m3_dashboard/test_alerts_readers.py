import json
from pathlib import Path

import numpy as np
import pytest

from rlhf_core.alerting.readers import columns_of, read_columns, unlogged_alerts
from rlhf_core.alerting.thresholds import default_thresholds
from rlhf_core.alerts import check

pytestmark = pytest.mark.m3

TRL = Path(__file__).parent / "trl_1_16_grpo"
"""The states that two runs of TRL 1.16's GRPOTrainer saved: one that learns, and one with a hundred times its rate."""


def found(columns):
    return {alert.name: alert for alert in check(columns, default_thresholds())}


def standing(columns, severity):
    return {name for name, alert in found(columns).items() if alert.severity == severity and alert.standing}


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


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


# -- verl --------------------------------------------------------------------------------------------------------------

VERL_CONSOLE = (
    "\x1b[36m(TaskRunner pid=87031)\x1b[0m step:83 - actor/entropy:0.317 - actor/kl_loss:0.024"
    " - actor/pg_clipfrac:0.012 - actor/ppo_kl:-1.2e-05 - actor/grad_norm:0.006 - actor/lr:0.000"
    " - critic/score/mean:0.906 - critic/score/max:1.000 - critic/score/min:0.000 - response_length/mean:330.437"
    " - response_length/clip_ratio:0.004 - perf/throughput:901.5"
)


def test_a_console_line_of_verl_is_read(tmp_path):
    path = write(
        tmp_path / "train.log", "INFO starting", VERL_CONSOLE, "step:84 - actor/entropy:np.float64(0.3)", "bye"
    )
    columns = read_columns(path, "verl")
    first = {name: column[0] for name, column in columns.items() if not np.ma.getmaskarray(column)[0]}
    assert columns["step"].tolist() == [83, 84]
    assert columns["entropy"].tolist() == [0.317, 0.3]
    assert first["kl_k3"] == 0.024
    assert first["approx_kl"] == -1.2e-05
    assert first["reward_mean"] == 0.906
    assert first["reward_var"] == 0.25
    assert first["eos_rate"] == pytest.approx(0.996)
    assert first["tokens_per_second"] == 901.5
    assert "lr" not in first  # three decimals of a small number are not 0


def test_the_file_logger_of_verl_is_read(tmp_path):
    rows = [{"step": n, "data": {"actor/entropy": 1.0, "actor/lr": 1e-6, "critic/vf_loss": 0.1}} for n in (1, 2)]
    write(tmp_path / "metrics.jsonl", *map(json.dumps, rows))
    columns = read_columns(tmp_path, "verl")
    assert columns["lr"].tolist() == [1e-6, 1e-6]
    assert columns["value_loss"].tolist() == [0.1, 0.1]


def test_trouble_in_a_log_of_verl_is_found(tmp_path):
    lines = [f"step:{n} - actor/entropy:{0.9 if n < 20 else 0.02} - critic/score/mean:0.5" for n in range(1, 41)]
    columns = read_columns(write(tmp_path / "run.log", *lines), "verl")
    assert standing(columns, "critical") == {"entropy_collapse"}
    assert found(columns)["entropy_collapse"].first_step == 20


# -- OpenRLHF ----------------------------------------------------------------------------------------------------------


def test_the_json_lines_of_openrlhf_are_read(tmp_path):
    rows = [{"train/global_step": n, "train/kl": 0.01, "train/reward": 0.5, "train/actor_lr": 1e-6} for n in (1, 2)]
    columns = read_columns(write(tmp_path / "log.jsonl", *map(json.dumps, rows)), "openrlhf")
    assert columns["step"].tolist() == [1, 2]
    assert columns["kl_per_token"].tolist() == [0.01, 0.01]
    assert columns["reward_mean"].tolist() == [0.5, 0.5]


def test_the_console_of_openrlhf_is_read(tmp_path):
    lines = [
        f"2025-01-01 INFO ✨ Global step {n}: {{'policy_loss': nan, 'kl': 0.5, 'actor_lr': 1e-06}}" for n in (1, 2)
    ]
    columns = read_columns(write(tmp_path / "train.log", "hello", *lines), "openrlhf")
    assert columns["lr"].tolist() == [1e-6, 1e-6]
    assert found(columns)["nonfinite"].metric == "policy_loss"


def test_a_policy_of_openrlhf_that_runs_away_is_found(tmp_path):
    rows = [{"global_step": n, "kl": 0.05 if n < 15 else 8.0, "reward": 0.5} for n in range(1, 30)]
    columns = read_columns(write(tmp_path / "log.jsonl", *map(json.dumps, rows)), "openrlhf")
    assert standing(columns, "critical") == {"kl_blow_up"}


@pytest.mark.parametrize("kind", ["openrlhf", "verl"])
@pytest.mark.parametrize("text", ["", "nothing here\n", '{"a": 1}\n', '{"step": 1}\n'])
def test_a_log_without_metrics_is_refused(tmp_path, kind, text):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match="is --format right"):
        read_columns(tmp_path, kind)


@pytest.mark.parametrize("line", ['{"step": 1, "data"', "Global step 1: {'kl': __import__('os')}"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = write(tmp_path / "log.jsonl", '{"step": 1, "data": {"kl": 1}}', line)
    kind = "openrlhf" if "Global" in line else "verl"
    with pytest.raises(ValueError, match="log.jsonl:2: "):
        read_columns(path, kind)


def test_several_logs_in_a_folder_are_a_question(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, "{}")
    with pytest.raises(ValueError, match=r"several logs \(a.jsonl, b.jsonl\)"):
        read_columns(tmp_path, "verl")
