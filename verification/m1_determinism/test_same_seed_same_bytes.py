"""One configuration and one seed give one run, wherever, however often and beside whatever else it runs."""

import m1_runs
import pytest
from m1_runs import BASE, GPT2, GPT2_AGAIN, NATIVE, NATIVE_AGAIN, Run, RunPool, assert_identical

from rlhf_core import runlog

pytestmark = pytest.mark.m1


@pytest.mark.parametrize("base", [BASE], ids=str)
def test_the_run_holds_what_could_go_wrong(runs: RunPool, base: Run) -> None:
    rows = list(runlog.read(runs[base] / "metrics.jsonl"))
    samples = list(runlog.read(runs[base] / "samples.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, m1_runs.STEPS + 1))
    assert len(samples) == 3 * m1_runs.STEPS
    assert any(0 < row["eos_rate"] < 1 for row in rows), "no response ended early, so nothing lies outside the mask"
    assert any(row["reward_var"] > 0 for row in rows)
    assert all(row["grad_norm"] > 0 and row["adv_var"] > 0 and row["nonfinite"] == [] for row in rows)
    assert len({len(sample["prompt"].split()) for sample in samples}) > 1, "the prompts are all of one length"
    assert rows[1]["kl"] != 0, "the policy did not move"


@pytest.mark.parametrize("base", [BASE], ids=str)
@pytest.mark.parametrize("other", m1_runs.SAME, ids=str)
def test_portable_logs_are_the_same_bytes(runs: RunPool, base: Run, other: Run) -> None:
    assert_identical(runs[base], runs[other])


@pytest.mark.parametrize(("first", "again"), [(GPT2, GPT2_AGAIN)], ids=str)
def test_gpt2_with_a_shared_value_head_repeats_its_bytes(runs: RunPool, first: Run, again: Run) -> None:
    assert_identical(runs[first], runs[again])


@pytest.mark.parametrize(("one", "more"), [(NATIVE[1], NATIVE[n]) for n in (2, 4)], ids=str)
def test_native_numerics_log_the_same_bytes_with_one_thread_and_with_more(runs: RunPool, one: Run, more: Run) -> None:
    assert_identical(runs[one], runs[more])


@pytest.mark.parametrize(("first", "again"), [(NATIVE[2], NATIVE_AGAIN)], ids=str)
def test_native_numerics_repeat_their_bytes(runs: RunPool, first: Run, again: Run) -> None:
    assert_identical(runs[first], runs[again])


@pytest.mark.parametrize("run", [BASE, GPT2, *NATIVE.values(), *m1_runs.SAME, *m1_runs.KILLED], ids=str)
def test_first_importance_ratio_of_every_step_is_exactly_one(runs: RunPool, run: Run) -> None:
    deviations = [row["ratio_max_dev_first"] for row in runlog.read(runs[run] / "metrics.jsonl")]
    assert deviations == [0.0] * len(deviations)
    assert deviations
