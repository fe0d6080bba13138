"""Numbers that are not finite: the run stops at its step, names what it was, and keeps the earlier checkpoints."""

import math

import pytest
from refusals import assert_matches

from rlhf_core import checkpoint, runlog
from rlhf_core.data import reviews
from rlhf_core.testing.command import TINY_RUN, run_command

pytestmark = pytest.mark.usefixtures("reviews_drawn_once")


class TestNotFinite:
    def test_a_reward_that_is_nan_stops_at_its_step_with_its_name_and_keeps_the_checkpoint(self, tmp_path, monkeypatch):
        scores = iter([0.5] * 4 * 3)  # four completions a step: the fourth step has none left
        monkeypatch.setattr(reviews, "score", lambda text: next(scores, math.nan))
        outcome = run_command("train", *TINY_RUN, "--runs", tmp_path, "--name", "mine")
        assert outcome.code == 2
        run = tmp_path / "mine"
        assert_matches(
            rf"step 4: reward is not finite.*; earlier checkpoints stay in {run}/checkpoints", outcome.complaint
        )
        assert checkpoint.newest_sound(run / "checkpoints", print).name == "step_000002"
        assert [row["step"] for row in runlog.read(run / "metrics.jsonl")] == [1, 2, 3]

    @pytest.mark.parametrize("rate", ["1e20", "1e38"])
    def test_a_learning_rate_that_explodes_stops_with_step_and_tensor(self, tmp_path, rate):
        outcome = run_command("train", *TINY_RUN, "--runs", tmp_path, "--name", "mine", "--ppo.learning-rate", rate)
        assert outcome.code == 2
        assert_matches(
            r"step [12]: \S.* is not finite.*lower the learning rate.*earlier checkpoints stay", outcome.complaint
        )
        newest = checkpoint.newest_sound(tmp_path / "mine" / "checkpoints", print)
        assert newest.name == "step_000000"

    def test_a_loss_of_pre_training_that_explodes_stops_with_its_step(self, tmp_path):
        outcome = run_command(
            "train", *TINY_RUN, "--runs", tmp_path, "--name", "mine", "--pretrain.learning-rate", "1e30"
        )
        assert outcome.code == 2
        assert_matches("at supervised step [123]; lower the learning rate; nothing was saved yet", outcome.complaint)
        assert not (tmp_path / "mine" / "models" / "base").exists()
