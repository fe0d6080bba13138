import dataclasses
import math

import pytest
import torch
from tiny_models import same_bits

from rlhf_core.config import PPOConfig
from rlhf_core.targets import make_targets

REWARDS = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
VALUES_OF_DESIGN = torch.tensor([[0.5, 0.25, 100.0], [0.5, 7.0, 0.25]])
MASK = torch.tensor([[True, True, False], [True, False, True]])
PLAIN = PPOConfig(gamma=1.0, lam=0.95, whiten_advantages=False)


def test_targets_are_the_literal_numbers_of_the_design():
    targets, raw = make_targets(REWARDS, VALUES_OF_DESIGN, MASK, PLAIN)
    torch.testing.assert_close(raw, torch.tensor([[0.4625, 0.75, 0.0], [0.4625, 0.0, 0.75]]))
    torch.testing.assert_close(targets.returns_BT, torch.tensor([[0.9625, 1.0, 0.0], [0.9625, 0.0, 1.0]]))
    assert same_bits(targets.advantages_BT, raw)


def test_advantages_are_whitened_over_the_mask_of_the_whole_batch_and_returns_are_not():
    targets, raw = make_targets(REWARDS, VALUES_OF_DESIGN, MASK, dataclasses.replace(PLAIN, whiten_advantages=True))
    scaled = 0.14375 / math.sqrt(0.14375**2 + 1e-8)  # the four lie 0.14375 on either side of their mean 0.60625
    torch.testing.assert_close(targets.advantages_BT, scaled * torch.tensor([[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]))
    torch.testing.assert_close(raw[MASK].mean(), torch.tensor(0.60625))
    torch.testing.assert_close(targets.returns_BT[0], torch.tensor([0.9625, 1.0, 0.0]))


def test_rewards_are_scaled_to_variance_one_with_their_mean_kept():
    config = dataclasses.replace(PLAIN, whiten_rewards=True, lam=1.0)
    _, raw = make_targets(REWARDS, torch.zeros(2, 3), MASK, config)
    # rewards 0, 1, 0, 1: mean ½, deviation ½, so they become −½ and 1½; with λ = 1 and V = 0 advantages are their sums
    torch.testing.assert_close(raw, torch.tensor([[1.0, 1.5, 0.0], [1.0, 0.0, 1.5]]), rtol=1e-6, atol=1e-6)


# Two prompts of two completions; R = 1, 2 and 4, 0 by the sums of their rewards.
GROUPED = torch.tensor([[0.0, 1.0, 9.0], [-1.0, 9.0, 3.0], [4.0, 9.0, 9.0], [0.5, -0.5, 0.0]])
GROUPED_MASK = torch.tensor([[True, True, False], [True, False, True], [True, False, False], [True, True, True]])


def targets_of(algorithm, **settings):
    config = PPOConfig(algorithm=algorithm, **({"whiten_advantages": False} | settings))
    return make_targets(GROUPED, None, GROUPED_MASK, config)


@pytest.mark.parametrize(
    ("algorithm", "of_each"),
    [
        ("dr-grpo", [-0.5, 0.5, 2.0, -2.0]),
        ("rloo", [-1.0, 1.0, 4.0, -4.0]),
        ("grpo", [-math.sqrt(0.5), math.sqrt(0.5), math.sqrt(0.5), -math.sqrt(0.5)]),
        ("reinforce++-baseline", [-0.5, 0.5, 2.0, -2.0]),
    ],
)
def test_a_group_estimator_gives_every_token_of_a_response_its_advantage(algorithm, of_each):
    targets, raw = targets_of(algorithm, group_size=2)
    expected = torch.where(GROUPED_MASK, torch.tensor(of_each)[:, None], 0.0)
    torch.testing.assert_close(raw, expected, rtol=2e-6, atol=0)
    assert same_bits(targets.advantages_BT, raw)
    assert targets.returns_BT is None


def test_reward_to_go_sums_what_comes_after():
    _, raw = targets_of("reinforce++")
    expected = [[1.0, 1.0, 0.0], [2.0, 0.0, 3.0], [4.0, 0.0, 0.0], [0.0, -0.5, 0.0]]
    torch.testing.assert_close(raw, torch.tensor(expected))
    _, discounted = targets_of("reinforce++", gamma=0.5)
    assert discounted[0].tolist() == [0.5, 1.0, 0.0]
    assert discounted[1].tolist() == [0.5, 0.0, 3.0]  # −1 + ½ · 3: what lies outside the mask is no step


@pytest.mark.parametrize("algorithm", ["reinforce++", "reinforce++-baseline", "rloo", "grpo", "dr-grpo"])
def test_advantages_are_whitened_over_the_batch_where_the_algorithm_says_so(algorithm):
    whitened = algorithm.startswith("reinforce++")
    targets, raw = targets_of(algorithm, whiten_advantages=None, group_size=2)
    on = targets.advantages_BT[GROUPED_MASK]
    assert same_bits(targets.advantages_BT, raw) != whitened
    if whitened:
        assert float(on.mean()) == pytest.approx(0.0, abs=1e-6)
        assert float(on.var(correction=0)) == pytest.approx(1.0, rel=1e-5)
