import dataclasses
import math

import pytest
import torch
from tiny_models import PROMPTS, draw, snapshot, tiny_config, tiny_state
from trainer_cases import architectures, assert_same_run, everything_of, step_once, values

from rlhf_core import ppo
from rlhf_core.metrics import log_row


@architectures
@values
def test_the_tokens_under_the_padding_change_no_bit_of_any_metric_or_weight(architecture, value):
    config = tiny_config(learning_rate=1e-2)
    state = tiny_state(architecture, value, config, reference_seed=1)
    rollout = draw(state.model.lm, PROMPTS, config)
    padding = rollout.attention_mask_BL == 0
    assert padding[:, :5].any()
    assert padding[:, 5:].any()
    other = dataclasses.replace(rollout, input_ids_BL=torch.where(padding, 9, rollout.input_ids_BL))
    assert_same_run(everything_of(state, rollout, config), everything_of(state, other, config))


@values
@pytest.mark.parametrize("garbage", [math.nan, 1e30, -math.inf])
def test_nan_and_huge_numbers_outside_the_mask_change_no_bit_of_any_metric_or_weight(value, garbage):
    config = tiny_config(learning_rate=1e-2, whiten_rewards=True)
    state = tiny_state("gpt2", value, config, reference_seed=1)
    rollout = draw(state.model.lm, PROMPTS, config)
    assert not rollout.response_mask_BT.all()
    assert_same_run(everything_of(state, rollout, config), everything_of(state, rollout, config, garbage=garbage))


@pytest.mark.parametrize("garbage", [math.nan, 1e30])
def test_garbage_outside_the_mask_of_the_scores_changes_no_bit_of_a_whole_step(monkeypatch, garbage):
    config, right = tiny_config(learning_rate=1e-2), ppo.score_rollout

    def run():
        state = tiny_state("llama", "separate", config, reference_seed=1)
        result = step_once(state, config)
        return result.metrics | {"kl of each": result.kl_B.tolist()}, snapshot(state.model)

    def with_garbage(model, reference, rollout, *rest):
        scores = right(model, reference, rollout, *rest)
        for field in dataclasses.fields(scores):
            getattr(scores, field.name)[~rollout.response_mask_BT] = garbage
        return scores

    clean = run()
    monkeypatch.setattr(ppo, "score_rollout", with_garbage)
    assert_same_run(run(), clean)


@architectures
@values
def test_one_sequence_alone_makes_a_batch(architecture, value):
    config = tiny_config(batch_size=1, minibatch_size=1, micro_batch_size=1)
    result = step_once(tiny_state(architecture, value, config), config)
    assert result.metrics["ratio_max_dev_first"] == 0.0
    assert result.metrics["reward_var"] == 0.0
    assert log_row(1, result.metrics)["nonfinite"] == []


@pytest.mark.parametrize("longest", [1, 9])
def test_responses_of_one_token_and_longer_prompts_train_too(longest):
    config = tiny_config(max_new_tokens=longest, batch_size=4, minibatch_size=2, micro_batch_size=1)
    prompts = [[2] * 20, [3], [4] * 7, [5, 6]]
    metrics = step_once(tiny_state("llama", "separate", config), config, prompts=prompts).metrics
    assert metrics["ratio_max_dev_first"] == 0.0
    assert 1.0 <= metrics["response_length_mean"] <= longest
    assert log_row(1, metrics)["nonfinite"] == []
