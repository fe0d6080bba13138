import dataclasses
import math

import pytest
import torch
from tiny_models import PROMPTS, draw, tiny_config, tiny_state
from trainer_cases import (
    algorithm_case,
    algorithms,
    architectures,
    assert_same_run,
    learned,
    rollout_of,
    step_once,
    values,
)

from rlhf_core import ppo, updates
from rlhf_core.metrics import log_row
from rlhf_core.scoring import Scores
from rlhf_core.targets import Targets


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
    assert_same_run(learned(state, rollout, config), learned(state, other, config))


def put_garbage_outside_the_mask(monkeypatch, garbage):
    """Into everything that the trainer computes from a rollout, in the gradient's pass too."""
    rows, score, make = updates.evaluate_rows, ppo.score_rollout, ppo.make_targets

    def spoil(x, mask):
        return None if x is None else torch.where(mask, x, garbage)

    def spoiled_rows(model, rollout, of, *rest):
        return tuple(spoil(x, rollout.response_mask_BT[of]) for x in rows(model, rollout, of, *rest))

    def spoiled_scores(model, reference, rollout, *rest):
        scores = score(model, reference, rollout, *rest)
        names = [field.name for field in dataclasses.fields(scores)]
        return Scores(**{name: spoil(getattr(scores, name), rollout.response_mask_BT) for name in names})

    def spoiled_targets(rewards, values, mask, config):
        targets, raw = make(spoil(rewards, mask), values, mask, config)
        return Targets(spoil(targets.advantages_BT, mask), spoil(targets.returns_BT, mask)), spoil(raw, mask)

    monkeypatch.setattr(updates, "evaluate_rows", spoiled_rows)
    monkeypatch.setattr(ppo, "score_rollout", spoiled_scores)
    monkeypatch.setattr(ppo, "make_targets", spoiled_targets)


@algorithms
@pytest.mark.parametrize("garbage", [math.nan, 1e30, -math.inf])
def test_nan_and_huge_numbers_outside_the_mask_change_no_bit_of_any_metric_or_weight(monkeypatch, algorithm, garbage):
    config, state = algorithm_case(algorithm, learning_rate=1e-2)
    rollout = rollout_of(config, state)
    assert not rollout.response_mask_BT.all()
    clean = learned(state, rollout, config)
    put_garbage_outside_the_mask(monkeypatch, garbage)
    assert_same_run(learned(state, rollout, config), clean)


@values
def test_garbage_outside_the_mask_changes_no_bit_when_rewards_are_whitened_too(monkeypatch, value):
    config = tiny_config(learning_rate=1e-2, whiten_rewards=True)
    state = tiny_state("gpt2", value, config, reference_seed=1)
    rollout = rollout_of(config, state)
    clean = learned(state, rollout, config)
    put_garbage_outside_the_mask(monkeypatch, math.nan)
    assert_same_run(learned(state, rollout, config), clean)


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
