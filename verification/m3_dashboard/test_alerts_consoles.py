"""Logs of verl and OpenRLHF: lines of JSON, and of a console."""

import json

import numpy as np
import pytest
from alert_columns import found, standing, write

from rlhf_core.alerting.readers import read_columns

pytestmark = pytest.mark.m3


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


@pytest.mark.parametrize(
    ("line", "metrics"),
    [
        ("step:1 - a/b:0.1 - c d/e:0.2 - actor/entropy:0.5", {"a/b": 0.1, "c d/e": 0.2, "entropy": 0.5}),
        ("step:1 - val/a - b/acc:0.5 - actor/entropy:0.5", {"val/a - b/acc": 0.5, "entropy": 0.5}),
        ("step:1 - val/x:y 2/acc:-1.5e-05 - actor/entropy:np.float64(0.5)", {"val/x:y 2/acc": -1.5e-5, "entropy": 0.5}),
        ("step:1 - a/b:None - c/d:True - e/f:1 - actor/entropy:0.5 [repeated 2x]", {"e/f": 1.0, "entropy": 0.5}),
    ],
)
def test_a_name_of_verl_may_have_spaces_dashes_and_colons_in_it(tmp_path, line, metrics):
    columns = read_columns(write(tmp_path / "train.log", line), "verl")
    assert {name: column[0] for name, column in columns.items()} == metrics | {"step": 1}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "np.float64(nan)"])
def test_what_is_not_finite_in_a_console_line_of_verl_is_found(tmp_path, value):
    columns = read_columns(write(tmp_path / "train.log", f"step:1 - actor/pg_loss:{value} - a/b:1"), "verl")
    assert found(columns)["nonfinite"].metric == "policy_loss"


def test_a_console_line_that_is_being_written_is_left_out(tmp_path):
    """Its last number may lack digits."""
    path = write(tmp_path / "train.log", "step:1 - actor/entropy:0.312")
    with path.open("a") as file:
        file.write("step:2 - actor/entropy:0.0")
    assert read_columns(path, "verl")["step"].tolist() == [1]


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


@pytest.mark.parametrize(
    ("spelled", "value"),
    [
        ("np.float64(0.5)", 0.5),
        ("numpy.float64(0.5)", 0.5),
        ("np.float32(-1e-06)", -1e-6),
        ("np.int64(3)", 3.0),
        ("np.float64(nan)", np.nan),
        ("np.float32(-inf)", -np.inf),
        ("nan", np.nan),
        ("inf", np.inf),
        ("-inf", -np.inf),
    ],
)
def test_what_numpy_prints_in_a_status_of_openrlhf_is_its_number(tmp_path, spelled, value):
    status = f"{{'kl': {spelled}, 'note': 'kl: nan', 'rewards': [{spelled}], 'done': np.True_, 'reward': 0.5}}"
    reports = []
    columns = read_columns(write(tmp_path / "train.log", f"Global step 7: {status}"), "openrlhf", reports.append)
    np.testing.assert_equal(columns["kl_per_token"].tolist(), [value])
    assert (columns["reward_mean"].tolist(), columns["step"].tolist(), reports) == ([0.5], [7], [])
    assert ("nonfinite" in found(columns)) == (not np.isfinite(value))


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
    """Where nothing else could be read, it is the error."""
    path = write(tmp_path / "log.jsonl", '{"note": "no step"}', line)
    kind = "openrlhf" if "Global" in line else "verl"
    with pytest.raises(ValueError, match="log.jsonl:2: "):
        read_columns(path, kind)


DAMAGED = [
    "{'config': 'as Python prints it'}",
    '{"step": 7, "data": {"actor/lr": 1',
    '{"step": 1e300, "kl": 1.0}',
    '{"step": 7, "kl": 1' + "0" * 400 + "}",
    '{"step": 7, "kl": ' + "[" * 100_000 + "]" * 100_000 + "}",
]


@pytest.mark.parametrize("kind", ["openrlhf", "verl"])
@pytest.mark.parametrize("line", DAMAGED)
def test_one_line_that_cannot_be_read_is_left_out_and_reported_with_its_number(tmp_path, kind, line):
    path = write(tmp_path / "log.jsonl", '{"step": 1, "kl": 1.0}', line, "prose", '{"step": 2, "kl": 1.0}')
    reports = []
    assert read_columns(path, kind, reports.append)["step"].tolist() == [1, 2]
    [report] = reports
    assert report.startswith(f"1 row that cannot be read is left out; the first is {path}:2: ")


@pytest.mark.parametrize(
    "line",
    [
        "Global step 2: {'kl': 0.5, 'rew",
        "Global step 2: {'kl': tensor(0.5)}",
        "Global step 2: {'kl': 1}} tail",
        "Global step 2: {'kl': np.float64(0.5, 1)}",
        "Global step 2: {'kl': np.float64(print())}",
        "Global step 2: {'kl': os.float64(0.5)}",
        "Global step 2: {'kl': np.float64}",
        "Global step 2: {'kl': " + "[" * 300 + "]" * 300 + "}",
    ],
)
def test_a_torn_or_odd_status_of_openrlhf_is_left_out_and_reported(tmp_path, line):
    good = [f"INFO Global step {step}: {{'kl': 0.5}} [repeated 2x]" for step in (1, 3)]
    reports = []
    columns = read_columns(write(tmp_path / "train.log", good[0], line, line, good[1]), "openrlhf", reports.append)
    assert columns["step"].tolist() == [1, 3]
    [report] = reports
    assert report.startswith("2 rows that cannot be read are left out; the first is ")
    assert "train.log:2: the status is no dictionary of numbers" in report


def test_without_anybody_to_report_to_a_line_left_out_is_a_warning(tmp_path):
    path = write(tmp_path / "log.jsonl", '{"step": 1, "kl": 1.0}', "{")
    with pytest.warns(UserWarning, match="1 row that cannot be read is left out"):
        read_columns(path, "verl")


def test_several_logs_in_a_folder_are_a_question(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, "{}")
    with pytest.raises(ValueError, match=r"several logs \(a.jsonl, b.jsonl\)"):
        read_columns(tmp_path, "verl")
