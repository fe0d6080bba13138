"""A run that was killed and resumed ends with the files of a run that was never killed."""

import pytest
from m1_runs import BASE, KILLED, Run, RunPool, assert_identical

pytestmark = pytest.mark.m1


@pytest.mark.parametrize("never_killed", [BASE], ids=str)
@pytest.mark.parametrize("killed", KILLED, ids=str)
def test_a_killed_and_resumed_run_ends_with_the_same_bytes(runs: RunPool, never_killed: Run, killed: Run) -> None:
    resumed = runs[killed]
    print(*runs.story[killed], sep="\n")
    assert_identical(runs[never_killed], resumed)
