"""M2: a profile adds up. ``pytest verification/ -m m2``."""

import shutil

import pytest

from rlhf_core.testing.command import TINY_RUN, run_command


@pytest.fixture(scope="session")
def profiled_run(tmp_path_factory):
    """The folder of a run like ``finished_run``, with --profile; it belongs to all tests: copy it before a change."""
    runs = tmp_path_factory.mktemp("profiled")
    outcome = run_command("train", *TINY_RUN, "--runs", runs, "--name", "tiny", "--profile")
    assert outcome.code == 0, outcome.err
    return runs / "tiny"


FEW_OPERATORS = (
    *("--ppo.batch-size", "2", "--ppo.minibatch-size", "2", "--ppo.epochs", "1", "--sampling.max-new-tokens", "2"),
)


@pytest.fixture(scope="session")
def small_runs(tmp_path_factory):
    """The folders of two runs of one configuration, with a profile that is quickly read."""
    runs = tmp_path_factory.mktemp("small")
    for name in ("one", "other"):
        outcome = run_command("train", *TINY_RUN, *FEW_OPERATORS, "--runs", runs, "--name", name, "--profile")
        assert outcome.code == 0, outcome.err
    return runs / "one", runs / "other"


@pytest.fixture
def profile_copy(small_runs, tmp_path):
    """The logs and the profile of such a run, for a test to spoil."""
    copy = tmp_path / "copy"
    leave = shutil.ignore_patterns("checkpoints", "models")
    shutil.copytree(small_runs[0], copy, ignore=leave)
    return copy
