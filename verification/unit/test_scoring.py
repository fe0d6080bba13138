import math

import pytest
import torch
from tiny_models import PROMPTS, draw, tiny_config, tiny_state
from trainer_cases import architectures, sequences_alone, step_once, values

from rlhf_core.profiling import StageClock
from rlhf_core.scoring import score_rollout
from rlhf_core.targets import Targets
from rlhf_core.updates import plan_epoch, update


@architectures
@values
@pytest.mark.parametrize(("minibatch", "micro"), [(8, 8), (8, 2), (4, 4), (4, 1), (2, 2)])
def test_the_first_ratio_of_every_step_is_exactly_one(architecture, value, minibatch, micro):
    config = tiny_config(minibatch_size=minibatch, micro_batch_size=micro, learning_rate=1e-2, steps=3)
    state = tiny_state(architecture, value, config)
    for _ in range(3):
        metrics = step_once(state, config).metrics
        assert metrics["ratio_max_dev_first"] == 0.0
        assert metrics["approx_kl"] > 0.0  # later minibatches do move


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_the_first_ratio_is_exactly_one_at_other_temperatures(temperature):
    config = tiny_config(temperature=temperature)
    metrics = step_once(tiny_state("llama", "separate", config), config).metrics
    assert metrics["ratio_max_dev_first"] == 0.0
    assert metrics["rollout_logprob_diff_max"] < 1e-5


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_the_first_deviation_would_show_a_stale_log_prob_anywhere_in_the_first_minibatch(micro_batch):
    config = tiny_config(epochs=1)
    state = tiny_state("gpt2", "shared", config)
    rollout, plan = draw(state.model.lm, PROMPTS, config), plan_epoch(config.ppo, config.seed, 1, 0)
    scores = score_rollout(state.model, state.reference, rollout, plan, 1.0, "float32")
    row = int(plan[0][micro_batch][0])
    scores.logprobs_BT[row, 0] -= math.log(1.5)
    targets = Targets(torch.zeros_like(scores.values_BT), scores.values_BT)
    metrics = update(state, rollout, scores, targets, plan, config, 1, StageClock())
    assert metrics["ratio_max_dev_first"] == pytest.approx(0.5, rel=1e-5)


@architectures
@values
def test_scores_are_those_of_each_sequence_alone(architecture, value):
    config = tiny_config()
    state = tiny_state(architecture, value, config, reference_seed=1)
    rollout = draw(state.model.lm, PROMPTS, config)
    scores = score_rollout(state.model, state.reference, rollout, plan_epoch(config.ppo, 0, 1, 0), 0.8, "float32")
    for row, one in enumerate(sequences_alone(state, rollout, temperature=0.8)):
        n = len(one["logprobs"])
        for name, got in (
            ("logprobs", scores.logprobs_BT),
            ("entropies", scores.entropies_BT),
            ("values", scores.values_BT),
            ("ref_logprobs", scores.ref_logprobs_BT),
        ):
            torch.testing.assert_close(got[row, :n].double(), one[name].detach(), rtol=0, atol=1e-5)


@architectures
def test_the_sampler_and_the_trainer_agree_on_every_log_prob(architecture):
    config = tiny_config()
    state = tiny_state(architecture, "shared", config)
    for step in range(5):
        rollout = draw(state.model.lm, PROMPTS, config, step=step)
        scores = score_rollout(state.model, state.reference, rollout, plan_epoch(config.ppo, 0, 1, 0), 1.0, "float32")
        difference = (scores.logprobs_BT - rollout.sampler_logprobs_BT)[rollout.response_mask_BT]
        assert difference.abs().max() < 1e-5
