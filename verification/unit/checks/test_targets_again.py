"""The float64 loops against numbers worked out by hand."""

import dataclasses

import pytest

from rlhf_core.checks import targets_again as again
from rlhf_core.config import PPOConfig

CONFIG = PPOConfig(gamma=1.0, lam=0.95)


def of(algorithm, **changes):
    size = 1 if algorithm in ("ppo", "reinforce++") else 4
    return dataclasses.replace(CONFIG, algorithm=algorithm, group_size=size, batch_size=64, **changes)


def test_the_score_lands_on_the_last_token_and_every_token_pays_for_its_ratio():
    found = again.token_rewards([1.0, -1.0], [[0.5, -0.25], [2.0]], 0.1, CONFIG)
    assert found == [[-0.05, 1.025], [-1.2]]
    assert again.token_rewards([1.0], [[0.5, -0.25]], 0.1, of("grpo")) == [[0.0, 1.0]]


def test_rewards_are_scaled_and_keep_their_mean():
    (found,) = again.token_rewards([4.0], [[0.0, 0.0]], 0.0, dataclasses.replace(CONFIG, whiten_rewards=True))
    assert found == pytest.approx([1.0, 3.0])


def test_advantages_of_the_design():
    assert again.advantages([[0.0, 1.0]], [[0.5, 0.25]], CONFIG) == [pytest.approx([0.4625, 0.75])]


def test_without_a_value_model_what_is_still_to_come_counts():
    config = dataclasses.replace(of("reinforce++"), gamma=0.5)
    assert again.advantages([[1.0, 2.0, 4.0]], None, config) == [[3.0, 4.0, 4.0]]


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("dr-grpo", [-1.0, -1.0, -1.0, 3.0]),
        ("rloo", [-4 / 3, -4 / 3, -4 / 3, 4.0]),
        ("grpo", [-0.5, -0.5, -0.5, 1.5]),
    ],
)
def test_a_group_is_compared_with_itself(algorithm, expected):
    rewards = [[0.0, 1.0], [1.0], [0.5, 0.5], [5.0]] + [[2.0]] * 4
    found = again.advantages(rewards, None, of(algorithm))
    assert [tokens[0] for tokens in found] == pytest.approx([*expected, 0.0, 0.0, 0.0, 0.0], rel=1e-6)
    assert [len(tokens) for tokens in found] == [2, 1, 2, 1, 1, 1, 1, 1]


def test_penalties_are_the_three_estimators():
    assert again.penalty(0.5, CONFIG.recipe) == 0.5
    assert again.penalty(0.5, of("reinforce++-baseline").recipe) == 0.125
    assert again.penalty(0.5, of("grpo").recipe) == pytest.approx(0.1065306597)


def test_whitened_values_have_mean_0_and_variance_1():
    assert again.flat(again.whitened([[1.0, 3.0], [1.0, 3.0]])) == pytest.approx([-1.0, 1.0, -1.0, 1.0])


def test_prompts_whose_completions_agree_are_counted():
    assert again.zero_deviation_share([1.0, 1.0, 0.5, 1.0, 2.0, 2.0], 2) == pytest.approx(2 / 3)
