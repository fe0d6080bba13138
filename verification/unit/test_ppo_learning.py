import numpy as np
import pytest
import torch
from tiny_models import EOS, PAD, tiny_config, tiny_state
from trainer_cases import CRITIC_FREE, architectures, values

from rlhf_core.ppo import (
    train,
)
from rlhf_core.rollout import left_pad


def next_token_distribution(lm, prompt):
    ids, _ = left_pad([prompt], PAD)
    with torch.no_grad():
        return lm(input_ids=ids).logits[0, -1].double().softmax(-1)


def bandit(architecture, value, score_of_token, steps, **settings):
    """Prompts of one kind, responses of one token: the policy's whole behaviour is one distribution."""
    config = tiny_config(
        max_new_tokens=1, batch_size=64, minibatch_size=32, micro_batch_size=32, epochs=4, steps=steps,
        missing_eos_penalty=0.0, kl_control="fixed", **settings,
    )  # fmt: skip
    state = tiny_state(architecture, value, config, vocabulary=5)
    start = next_token_distribution(state.reference.lm, [2])
    scores = torch.tensor(score_of_token)

    def reward(rollout):
        return scores[rollout.response_ids_BT[:, 0]]

    prompts = [[2]] * config.ppo.prompts_per_step
    for _ in train(state, lambda step: prompts, reward, config, eos_id=EOS, pad_id=PAD):
        pass
    return start, next_token_distribution(state.model.lm, [2])


@architectures
@values
def test_ppo_makes_the_one_rewarded_token_likely(architecture, value):
    start, end = bandit(architecture, value, [0.0, 0.0, 0.0, 1.0, 0.0], 12, learning_rate=1e-2, kl_coef=0.0)
    assert start[3] < 0.5
    assert end[3] > 0.9


@pytest.mark.parametrize("algorithm", CRITIC_FREE)
def test_every_algorithm_makes_the_one_rewarded_token_likely(algorithm):
    settings = {"algorithm": algorithm, "learning_rate": 1e-2, "kl_coef": 0.0}
    start, end = bandit("gpt2", None, [0.0, 0.0, 0.0, 1.0, 0.0], 12, **settings)
    assert start[3] < 0.5
    assert end[3] > 0.9


@architectures
def test_ppo_with_a_kl_penalty_reaches_the_optimum_that_is_known_in_closed_form(architecture):
    """The maximum of E[r] − β KL(π‖π_ref) is π* ∝ π_ref exp(r/β)."""
    scores, beta = [0.0, 0.3, -0.2, 0.5, 0.1], 0.5
    start, end = bandit(
        architecture, "separate", scores, 50, learning_rate=1e-2, kl_coef=beta, whiten_advantages=False, value_coef=1.0
    )
    optimum = start * torch.exp(torch.tensor(scores, dtype=torch.float64) / beta)
    optimum /= optimum.sum()

    def kl(p):
        return float((p * (p / optimum).log()).sum())

    assert kl(start) > 0.05
    assert kl(end) < 0.1 * kl(start)
    assert np.abs((end - optimum).numpy()).max() < 0.05
