"""``rlhf train --report-to``: the very figures of the logs arrive elsewhere, and the logs stay as they are."""

import sys
from types import SimpleNamespace

import pytest

from rlhf_core import runlog
from rlhf_core.reporting import trackers
from rlhf_core.testing.assertions import assert_runs_identical
from rlhf_core.testing.command import TINY_RUN, run_command

pytestmark = [pytest.mark.m3, pytest.mark.usefixtures("reviews_drawn_once")]


@pytest.fixture
def fake_library(monkeypatch):
    """A library with the functions of wandb and trackio, which notes its calls."""
    calls = []
    library = SimpleNamespace(
        init=lambda **options: calls.append(("init", options)),
        log=lambda values, step: calls.append(("log", step, values)),
        finish=lambda: calls.append(("finish",)),
        __spec__=SimpleNamespace(),
    )

    def install(name):
        monkeypatch.setitem(sys.modules, name, library)
        return calls

    return install


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_back_what_was_logged(tmp_path, finished_run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    outcome = run_command("train", *TINY_RUN, "--runs", tmp_path, "--name", "tiny", "--report-to", "tensorboard")
    assert outcome.code == 0, outcome.err
    assert_runs_identical(tmp_path / "tiny", finished_run)
    events = EventAccumulator(str(tmp_path / "tiny" / "tensorboard"))
    events.Reload()
    rows = list(runlog.read(tmp_path / "tiny" / "metrics.jsonl"))
    assert set(events.Tags()["scalars"]) >= (rows[0].keys() - {"step", "nonfinite"}) | {"tokens_per_second"}
    for name in ("kl", "reward_mean", "grad_norm"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_name_configuration_steps_and_the_end(tmp_path, fake_library, name):
    calls = fake_library(name)
    with trackers.Reporter([name, name], tmp_path / "mine", {"seed": 3}) as reporter:
        reporter.after_step(
            {"step": 1, "kl": 0.5, "nonfinite": ["entropy"], "entropy": None}, {"step": 1, "stages_s": {"update": 2.0}}
        )
    assert calls == [
        ("init", {"project": "rlhf-systems-kit", "name": "mine", "config": {"seed": 3}}),
        ("log", 1, {"kl": 0.5, "stages_s/update": 2.0}),
        ("finish",),
    ]  # fmt: skip


def test_a_run_that_fails_is_closed_there_too(tmp_path, fake_library):
    calls = fake_library("wandb")
    with pytest.raises(FloatingPointError), trackers.Reporter(["wandb"], tmp_path, {}):
        raise FloatingPointError
    assert calls[-1] == ("finish",)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_library_that_is_not_installed_is_one_line_with_its_extra_before_there_is_a_run(tmp_path, monkeypatch, name):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda module: None)
    outcome = run_command("train", *TINY_RUN, "--runs", tmp_path, "--name", "mine", "--report-to", name)
    assert outcome.code == 2
    assert f"--report-to {name}: {name} is not installed; pip install 'rlhf-systems-kit[{name}]'" in outcome.complaint
    assert not (tmp_path / "mine").exists()
