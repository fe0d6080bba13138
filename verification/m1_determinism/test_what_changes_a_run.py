"""The comparison is no rubber stamp: another seed, another hyper-parameter and every planted fault are told apart."""

import subprocess
import sys
from pathlib import Path

import pytest
from m1_runs import (
    ANOTHER_LAMBDA,
    ANOTHER_SEED,
    BASE,
    FAULTED_ELSEWHERE,
    FAULTED_HERE,
    FAULTS,
    SAME,
    Run,
    RunPool,
    plain_environment,
)

from rlhf_core.testing.assertions import assert_runs_differ, assert_runs_identical

pytestmark = pytest.mark.m1

NAMED_FIRST = {
    "clock": "metrics.jsonl: first difference at step 1: started_s is",
    "host-name": "samples.jsonl: first difference at step 1: host of sample 0 is",
    "unseeded-shuffle": "metrics.jsonl: first difference at step 1: ",
    "hash-order": "metrics.jsonl: first difference at step 1: ",
    "identity-order": "metrics.jsonl: first difference at step 1: ",
}


def compare_on_the_command_line(run_a: Path, run_b: Path) -> subprocess.CompletedProcess[str]:
    program = (sys.executable, "-P", "-c", "from rlhf_core.cli import main; main()")
    arguments = ("compare", str(run_a), str(run_b))
    return subprocess.run((*program, *arguments), env=plain_environment(), capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("base", "other"), [(BASE, ANOTHER_SEED)], ids=str)
def test_another_seed_gives_another_run(runs: RunPool, base: Run, other: Run) -> None:
    difference = assert_runs_differ(runs[base], runs[other])
    assert (difference.file, difference.step) == ("metrics.jsonl", 1)


@pytest.mark.parametrize(("base", "other"), [(BASE, ANOTHER_LAMBDA)], ids=str)
def test_compare_names_the_first_step_and_metric_that_another_lambda_changes(
    runs: RunPool, base: Run, other: Run
) -> None:
    result = compare_on_the_command_line(runs[base], runs[other])
    assert result.stdout.startswith("metrics.jsonl: first difference at step 1: adv_var is"), result
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.parametrize(("base", "other"), [(BASE, SAME[-1])], ids=str)
def test_compare_calls_identical_runs_identical(runs: RunPool, base: Run, other: Run) -> None:
    result = compare_on_the_command_line(runs[base], runs[other])
    assert (result.stdout, result.returncode, result.stderr) == ("identical\n", 0, "")


@pytest.mark.parametrize(("here", "elsewhere"), [(FAULTED_HERE, FAULTED_ELSEWHERE)], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_the_comparison(runs: RunPool, here: Run, elsewhere: Run, fault: str) -> None:
    run_a, run_b = (folder.with_name(f"{folder.name}-{fault}") for folder in (runs[here], runs[elsewhere]))
    with pytest.raises(AssertionError) as caught:
        assert_runs_identical(run_a, run_b)
    assert NAMED_FIRST[fault] in str(caught.value)
