import math

import pytest
import torch
from tiny_models import EOS, PAD, PROMPTS, same_bits, share_of_sevens, snapshot, tiny_config, tiny_state
from trainer_cases import architectures, step_once, values

from rlhf_core.finite import NonFiniteError
from rlhf_core.ppo import ppo_step


def assert_stops(state, config, name, reward=share_of_sevens):
    before, done = snapshot(state.model), state.step
    with pytest.raises(NonFiniteError, match=rf"^step {done + 1}: {name} is not finite") as raised:
        step_once(state, config, reward)
    assert isinstance(raised.value, FloatingPointError)
    assert "\n" not in str(raised.value)
    assert all(same_bits(before[key], tensor) for key, tensor in state.model.state_dict().items())
    assert state.step == done


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_stops_the_step_before_the_weights_change(bad):
    config = tiny_config()
    state = tiny_state("gpt2", "shared", config)
    step_once(state, config)

    def reward(rollout):
        scores = share_of_sevens(rollout)
        scores[3] = bad
        return scores

    assert_stops(state, config, "reward", reward)


@architectures
@values
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named_at_the_start_of_the_step(architecture, value, bad):
    config = tiny_config()
    state = tiny_state(architecture, value, config)
    name, parameter = list(state.model.named_parameters())[7]
    with torch.no_grad():
        parameter.view(-1)[1] = bad
    assert_stops(state, config, name.replace(".", r"\."))


def test_a_broken_reference_is_named():
    config = tiny_config()
    state = tiny_state("gpt2", "shared", config)
    state.reference.lm.transformer.wte.weight.fill_(math.nan)
    assert_stops(state, config, "ref_logprobs")


@pytest.mark.parametrize("value_coef", [0.5, 0.0])  # without weight it is in no gradient, and still in the log
def test_a_loss_that_explodes_is_named(value_coef):
    config = tiny_config(value_coef=value_coef)
    state = tiny_state("gpt2", "shared", config)
    assert_stops(state, config, "value_loss", lambda rollout: torch.full((8,), 1e30))


def test_a_gradient_that_is_not_finite_is_named_by_its_parameter():
    config = tiny_config()
    state = tiny_state("llama", "separate", config)
    state.model.value_trunk.norm.weight.register_hook(lambda gradient: gradient * math.nan)
    assert_stops(state, config, r"the gradient of value_trunk\.norm\.weight")


def test_weights_that_an_update_drives_to_infinity_are_named_before_anything_is_saved():
    config = tiny_config(minibatch_size=8, micro_batch_size=8, epochs=1, learning_rate=1e38, weight_decay=1e3)
    state = tiny_state("gpt2", "shared", config)
    with pytest.raises(NonFiniteError, match=r"^step 1: lm\.transformer\.\S+ is not finite"):
        step_once(state, config)
    assert state.step == 0


@pytest.mark.parametrize("shape", [(8, 1), (7,), (1,), ()])
def test_a_reward_of_the_wrong_shape_is_refused(shape):
    config = tiny_config()
    with pytest.raises(ValueError, match="one score a completion"):
        step_once(tiny_state("gpt2", "shared", config), config, lambda rollout: torch.zeros(shape))


def test_a_reward_with_a_gradient_or_of_whole_numbers_is_taken():
    config = tiny_config()
    for scores in (torch.ones(8, requires_grad=True), torch.ones(8, dtype=torch.int64)):
        result = step_once(tiny_state("gpt2", "shared", config), config, lambda rollout, scores=scores: scores)
        assert result.metrics["reward_mean"] == 1.0


@pytest.mark.parametrize("n", [7, 9])
def test_another_number_of_prompts_than_the_batch_size_is_refused(n):
    config = tiny_config()
    with pytest.raises(ValueError, match=f"{n} prompts; ppo.batch_size is 8 and ppo.group_size 1, so it takes 8"):
        ppo_step(
            tiny_state("gpt2", "shared", config), (PROMPTS * 2)[:n], share_of_sevens, config, eos_id=EOS, pad_id=PAD
        )
