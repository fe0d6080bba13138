"""What ``rlhf train --profile`` leaves, and that it changes nothing else."""

import csv
import json

import pytest

from rlhf_core import runlog
from rlhf_core.profiles.files import OPERATOR_COLUMNS, SUMMARY_COLUMNS
from rlhf_core.testing.assertions import assert_runs_identical
from rlhf_core.testing.command import run_command

pytestmark = [pytest.mark.m2, pytest.mark.usefixtures("reviews_drawn_once")]

STAGES = {
    "rollout", "reward", "reference_and_value", "advantages", "update", "update/forward", "update/backward",
    "update/optimizer", "checkpoint", "logging",
}  # fmt: skip


@pytest.fixture(scope="module")
def trace(profiled_run):
    return json.loads((profiled_run / "profiles" / "chrome_trace.json").read_text())


def spans(trace, category):
    return [event for event in trace["traceEvents"] if event.get("cat") == category]


def table(run, name):
    with (run / "profiles" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_profiling_changes_no_byte_of_the_logs_and_of_the_configuration(profiled_run, finished_run):
    assert_runs_identical(profiled_run, finished_run)
    assert (profiled_run / "config.json").read_bytes() == (finished_run / "config.json").read_bytes()
    assert not (finished_run / "profiles").exists()


def test_the_summary_has_the_stages_and_the_columns(profiled_run):
    rows = table(profiled_run, "summary.csv")
    assert tuple(rows[0]) == SUMMARY_COLUMNS
    calls = {row["stage"]: int(row["calls"]) for row in rows}
    assert calls.keys() >= STAGES
    assert calls["step"] == calls["rollout"] == 5
    assert calls["checkpoint"] == 3  # every second step, and the last
    assert calls["update/optimizer"] == 5 * 2 * 2
    assert calls["update/forward"] == calls["update/backward"] == 2 * 5 * 2 * 2  # the policy's and the value model's


def test_the_tokens_of_a_stage_are_those_of_the_steps_in_which_it_ran(profiled_run):
    tokens = {row["stage"]: int(row["tokens"]) for row in table(profiled_run, "summary.csv")}
    logged = [row["response_tokens"] for row in runlog.read(profiled_run / "metrics.jsonl")]
    assert tokens["step"] == tokens["update/backward"] == sum(logged)
    assert tokens["checkpoint"] == logged[1] + logged[3] + logged[4]


def test_the_operators_are_torchs_own_and_counted(profiled_run, trace):
    rows = table(profiled_run, "op_stats.csv")
    assert tuple(rows[0]) == OPERATOR_COLUMNS
    products = next(row for row in rows if row["operator"] == "aten::mul")
    called = [event for event in spans(trace, "operator") if event["name"] == "aten::mul"]
    assert int(products["calls"]) == len(called) > 100
    assert float(products["total_cpu_ms"]) >= float(products["self_cpu_ms"]) > 0
    assert any(int(row["self_cpu_bytes"]) > 0 for row in rows)


def test_the_trace_is_chromes_format(trace):
    assert trace["displayTimeUnit"] == "ms"
    for event in trace["traceEvents"]:
        assert event["ph"] in ("X", "M")
        assert {"name", "pid", "tid", "args"} <= event.keys()
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            assert 1 <= event["args"]["step"] <= 5
    names = {event["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert names >= {"process_name", "thread_name"}
    assert trace["otherData"]["steps"] == [1, 2, 3, 4, 5]
    assert trace["otherData"]["operator_steps"] == [1]


def test_operators_lie_in_the_stage_that_calls_them(trace):
    """The optimizer's kernel in the optimizer, an embedding in the rollout, the minibatches in the update.

    Native code that is no operator of torch shows like one.
    """

    def inside(name, category, outer):
        inner = [event for event in spans(trace, category) if event["name"] == name and event["args"]["step"] == 1]
        around = [event for event in spans(trace, "stage") if event["name"] == outer and event["args"]["step"] == 1]
        assert inner
        return [
            any(a["ts"] <= e["ts"] and e["ts"] + e["dur"] <= a["ts"] + a["dur"] for a in around)
            and a["tid"] == e["tid"]
            for e in inner
            for a in around[:1]
        ]

    assert all(inside("aten::_fused_adamw_", "operator", "update/optimizer"))
    assert any(inside("rlhf_kernels::sums_of_squares", "operator", "update/optimizer"))
    assert all(inside("minibatch", "minibatch", "update"))
    assert any(inside("aten::embedding", "operator", "rollout"))
    assert any(inside("rlhf_kernels::program", "operator", "rollout"))
    numbers = [event["args"] for event in spans(trace, "minibatch") if event["args"]["step"] == 2]
    assert [(args["epoch"], args["minibatch"]) for args in numbers] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_the_check_prints_a_figure_for_each_of_its_parts(profiled_run):
    outcome = run_command("check-profile", profiled_run)
    assert outcome.code == 0, outcome.out
    lines = outcome.out.splitlines()[1:]
    assert len(lines) == 12
    assert all(line.startswith("  yes  ") and any(char.isdigit() for char in line) for line in lines)


def test_a_resumed_run_is_profiled_from_where_it_goes_on(profiled_run, tmp_path):
    import shutil

    copy = tmp_path / "runs" / "tiny"
    shutil.copytree(profiled_run, copy)
    shutil.rmtree(copy / "checkpoints" / "step_000005")
    outcome = run_command("train", "--resume", "--name", "tiny", "--runs", copy.parent, "--profile")
    assert outcome.code == 0, outcome.err
    assert_runs_identical(profiled_run, copy)
    outcome = run_command("check-profile", copy)
    assert outcome.code == 0, outcome.out
    assert "steps: 1, from 5 to 5" in outcome.out
