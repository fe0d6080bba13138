import json
import os
import shutil

import pytest
from alert_columns import healthy

from rlhf_core import ppo, updates
from rlhf_core.alerts import Alert
from rlhf_core.testing.command import TINY_RUN, run_command

pytestmark = pytest.mark.m3

STEP_TIME_S = 0.5


def write_run(folder, rows=40, steps=40, **spoil):
    """A run's folder as a training leaves it, with metrics replaced from step 20 on."""
    folder.mkdir()
    columns = healthy(rows)
    lines = []
    for row in range(rows):
        values = {name: float(column[row]) for name, column in columns.items() if name != "step"}
        values |= {name: value for name, value in spoil.items() if row >= 20}
        lost = sorted(name for name, value in values.items() if value is None)
        lines.append(json.dumps(values | {"step": row + 1, "nonfinite": lost}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.json").write_text(json.dumps({"ppo": {"steps": steps}}))
    return folder


def alerts(*arguments):
    return run_command("alerts", *arguments)


def names(outcome):
    return [alert["name"] for alert in json.loads(outcome.out)["alerts"]]


def test_a_healthy_run_has_none_and_exits_0(tmp_path):
    run = write_run(tmp_path / "fine")
    outcome = alerts(run)
    assert (outcome.code, outcome.err) == (0, "")
    assert "40 rows, steps 1 to 40" in outcome.out
    assert alerts("fine", "--runs", tmp_path).code == 0


def test_something_critical_exits_1_and_says_since_when_why_and_what_to_do(tmp_path):
    outcome = alerts(write_run(tmp_path / "bad", ratio_max_dev_first=0.3))
    assert outcome.code == 1
    words = " ".join(outcome.out.split())
    for text in ("critical", "ratio_off_one", "21 to 40", "stands", "0.3", "0.0001", "why: Dropout", "do: Call eval()"):
        assert text in words


def test_a_warning_exits_0(tmp_path):
    outcome = alerts(write_run(tmp_path / "warned", eos_rate=0.0), "--json")
    assert outcome.code == 0
    assert names(outcome) == ["all_truncated"]


def test_json_holds_everything_and_no_nan(tmp_path):
    outcome = alerts(write_run(tmp_path / "bad", entropy=None), "--json")
    tree = json.loads(outcome.out, parse_constant=pytest.fail)
    assert outcome.code == 1
    assert (tree["rows"], tree["last_step"]) == (40, 40)
    assert tree["not_checked"] == {"groups_without_signal": ["reward_zero_std_frac"]}
    [alert] = [Alert.from_json(one) for one in tree["alerts"] if one["severity"] == "critical"]
    assert (alert.name, alert.metric, alert.first_step) == ("nonfinite", "entropy", 21)


def test_thresholds_of_the_users_own(tmp_path):
    run = write_run(tmp_path / "bad", ratio_max_dev_first=0.3)
    mine = tmp_path / "mine.toml"
    mine.write_text('[ratio_off_one]\nseverity = "info"\n')
    assert alerts(run, "--config", mine).code == 0
    mine.write_text("[ratio_of_one]\nthreshold = 1\n")
    outcome = alerts(run, "--config", mine)
    assert outcome.code == 2
    assert "unknown rule 'ratio_of_one'" in outcome.complaint


def test_an_unfinished_run_that_lies_still_has_stalled_and_a_finished_one_has_not(tmp_path):
    for name, steps, stalled in (("finished", 40, False), ("killed", 80, True)):
        run = write_run(tmp_path / name, steps=steps)
        os.utime(run / "metrics.jsonl", (1e9, 1e9))
        assert ("stalled" in names(alerts(run, "--json"))) == stalled
    os.utime(run / "metrics.jsonl")
    assert "stalled" not in names(alerts(run, "--json"))


def test_bad_input_is_one_line_and_exits_2(tmp_path):
    broken = write_run(tmp_path / "broken")
    (broken / "metrics.jsonl").write_text('{"step": 1, "kl": "x"}\n')
    for arguments, complaint in (
        (["nowhere", "--runs", tmp_path], "no run 'nowhere'"),
        ([broken], "kl is 'x'"),
        ([broken, "--format", "trl"], "no trainer_state.json"),
        ([broken, "--format", "verl"], "several logs|is --format right"),
        ([broken, "--format", "other"], "other"),
        ([broken, "--config", tmp_path / "none.toml"], "no thresholds"),
    ):
        outcome = alerts(*arguments)
        assert outcome.code == 2, arguments
        assert any(part in outcome.complaint for part in complaint.split("|")), outcome.complaint


def test_lines_of_another_trainer_that_cannot_be_read_are_said_beside_the_json(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "kl": 0.1}\n{"step": 2, "k\n{"step": 3, "kl": 0.1}\n')
    outcome = alerts(log, "--format", "openrlhf", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["rows"] == 2
    assert outcome.complaint.startswith(f"rlhf: 1 row that cannot be read is left out; the first is {log}:2: not JSON")


def test_hostile_names_of_metrics_cannot_reach_the_terminal(tmp_path):
    run = tmp_path / "trainer_state.json"
    run.write_text(json.dumps({"log_history": [{"step": 1, "\x1b[2J[red]evil": float("inf")}]}))
    outcome = alerts("--format", "trl", run)
    assert outcome.code == 1
    assert "\x1b[2J" not in outcome.out
    assert "[red]evil" in outcome.out


# -- while training ----------------------------------------------------------------------------------------------------


def train(runs, name, *options):
    return run_command("train", *TINY_RUN, "--runs", runs, "--name", name, *options)


def raised(run):
    return [json.loads(line) for line in (run / "alerts.jsonl").read_text().splitlines()]


def logged_steps(run, file="metrics.jsonl"):
    return [json.loads(line)["step"] for line in (run / file).read_text().splitlines()]


@pytest.fixture
def dropout_from_step_3(monkeypatch):
    """Old log-probs that are off from the third step on."""
    right, steps = ppo.score_rollout, []

    def score_rollout(*arguments):
        steps.append(1)
        scores = right(*arguments)
        if len(steps) >= 3:
            scores.logprobs_BT.add_(0.05)
        return scores

    monkeypatch.setattr(ppo, "score_rollout", score_rollout)


def test_what_is_raised_while_training_is_recorded_and_does_not_stop_by_itself(tmp_path, dropout_from_step_3):
    outcome = train(tmp_path, "on")
    assert outcome.code == 0, outcome.err
    [alert] = [row for row in raised(tmp_path / "on") if row["name"] == "ratio_off_one"]
    assert (alert["first_step"], alert["step"], alert["severity"]) == (3, 3, "critical")
    assert "critical alert ratio_off_one since step 3" in outcome.out
    assert logged_steps(tmp_path / "on") == [1, 2, 3, 4, 5]
    assert alerts(tmp_path / "on").code == 1


def test_stop_on_critical_saves_stops_says_why_and_can_be_resumed(tmp_path, dropout_from_step_3):
    outcome = train(tmp_path, "run", "--stop-on", "critical")
    assert outcome.code == 1
    assert "stopped after step 3 of 5, saved: critical alert" in outcome.complaint
    assert "since step 3" in outcome.complaint
    assert "continue with: rlhf train --resume --name run" in outcome.complaint
    run = tmp_path / "run"
    assert logged_steps(run) == logged_steps(run, "timings.jsonl") == [1, 2, 3]
    assert (run / "checkpoints" / "step_000003").is_dir()
    before = raised(run)
    resumed = run_command("train", "--resume", "--name", "run", "--runs", tmp_path, "--stop-on", "critical")
    assert resumed.code == 0, resumed.err  # what stood already does not stop it again
    assert logged_steps(run) == [1, 2, 3, 4, 5]
    assert raised(run)[: len(before)] == before


def test_resume_cuts_the_alerts_of_steps_after_the_checkpoint(tmp_path, dropout_from_step_3):
    assert train(tmp_path, "run").code == 0
    run = tmp_path / "run"
    assert 3 in [row["step"] for row in raised(run)]
    for step in (4, 5):
        shutil.rmtree(run / "checkpoints" / f"step_00000{step}")
    shutil.rmtree(run / "checkpoints" / "step_000002", ignore_errors=True)
    outcome = run_command("train", "--resume", "--name", "run", "--runs", tmp_path)
    assert outcome.code == 0, outcome.err
    steps = [row["step"] for row in raised(run) if row["name"] == "ratio_off_one"]
    assert steps == [1]  # from the start again, and off from its first step


def test_a_step_that_is_not_finite_leaves_its_alert(tmp_path, monkeypatch):
    right = updates.gradients

    def gradients(parameters):
        found = right(parameters)
        found[0][...] = float("nan")
        return found

    monkeypatch.setattr(updates, "gradients", gradients)
    outcome = train(tmp_path, "run")
    assert outcome.code == 2
    assert "not finite" in outcome.complaint
    [alert] = raised(tmp_path / "run")
    assert (alert["name"], alert["step"], alert["value"]) == ("nonfinite", 1, None)
    shown = alerts(tmp_path / "run")
    assert shown.code == 1
    assert "nonfinite" in shown.out
    assert "no finished step" in shown.out


def test_an_unknown_severity_is_refused(tmp_path):
    outcome = train(tmp_path, "run", "--stop-on", "fatal")
    assert outcome.code == 2
    assert "fatal" in outcome.complaint
    assert not (tmp_path / "run").exists()
