import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import few_examples, same_bits

from rlhf_core.advantages import (
    adapt_kl_coef,
    group_mean_advantages,
    group_standard_scores,
    kl_penalties,
    last_token_index,
    leave_one_out_advantages,
    penalize_missing_eos,
    sequence_returns,
    token_rewards,
)

MASK = torch.tensor([[True, True, False], [True, False, True], [False, False, False], [True, True, True]])


def test_last_token_index_is_the_place_of_the_last_true():
    assert last_token_index(MASK).tolist() == [1, 2, 0, 2]
    assert last_token_index(torch.tensor([[True], [False]])).tolist() == [0, 0]


def test_token_rewards_are_the_hand_worked_numbers():
    logprobs = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -7.0, -3.0], [-1.0, -1.0, -1.0], [-0.5, -0.5, -0.5]])
    reference = torch.tensor([[-1.5, -1.0, -4.0], [-0.5, -2.0, -3.5], [-2.0, -2.0, -2.0], [-0.5, -0.5, -1.5]])
    rewards = token_rewards(torch.tensor([2.0, -1.0, 5.0, 0.25]), logprobs, reference, MASK, kl_coef=0.1)
    expected = [
        [-0.05, 2.1, 0.0],  # −0.1 · 0.5;  2 − 0.1 · (−1);  outside
        [0.05, 0.0, -1.05],  # −0.1 · (−0.5);  outside;  −1 − 0.1 · 0.5
        [0.0, 0.0, 0.0],  # no response token, no reward
        [0.0, 0.0, 0.15],  # 0.25 − 0.1 · 1
    ]
    torch.testing.assert_close(rewards, torch.tensor(expected), rtol=0, atol=2e-7)


@few_examples
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 9), st.floats(0, 2))
def test_a_rows_rewards_sum_to_its_score_less_beta_times_its_kl(seed, batch, length, kl_coef):
    generator = torch.Generator().manual_seed(seed)
    logprobs, reference = (-torch.rand(batch, length, generator=generator, dtype=torch.float64) for _ in range(2))
    scores = torch.randn(batch, generator=generator, dtype=torch.float64)
    mask = torch.rand(batch, length, generator=generator) < 0.6
    rewards = token_rewards(scores, logprobs, reference, mask, kl_coef=kl_coef)
    for row in range(batch):
        inside = [t for t in range(length) if mask[row, t]]
        kl = math.fsum(float(logprobs[row, t] - reference[row, t]) for t in inside)
        expected = float(scores[row]) - kl_coef * kl if inside else 0.0
        assert math.fsum(rewards[row].tolist()) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("garbage", [math.nan, 1e30, math.inf])
def test_what_lies_outside_the_mask_changes_no_bit_of_the_rewards(garbage):
    generator = torch.Generator().manual_seed(1)
    logprobs, reference = torch.randn(4, 3, generator=generator), torch.randn(4, 3, generator=generator)
    scores = torch.randn(4, generator=generator)
    clean = token_rewards(scores, logprobs, reference, MASK, kl_coef=0.3)
    for dirty in (logprobs, reference):
        dirty[~MASK] = garbage
        assert same_bits(token_rewards(scores, logprobs, reference, MASK, kl_coef=0.3), clean)
    scores[2] = garbage  # the row without a response token has no place for its score either
    assert same_bits(token_rewards(scores, logprobs, reference, MASK, kl_coef=0.3), clean)


def test_only_a_response_that_did_not_end_pays_the_penalty():
    scores = penalize_missing_eos(torch.tensor([1.0, 1.0, -2.0]), torch.tensor([True, False, False]), 0.5)
    assert scores.tolist() == [1.0, 0.5, -2.5]


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.2),  # on target: it stays
        (6.6, 0.20064),  # 0.2 (1 + 0.1 · 64/2000)
        (12.0, 0.20128),  # the error 1 is clipped to 0.2
        (5.4, 0.19936),  # 0.2 (1 − 0.1 · 64/2000)
        (0.0, 0.19872),  # the error −1 is clipped to −0.2
        (-3.0, 0.19872),
    ],
)
def test_the_kl_coefficient_follows_the_hand_worked_controller(kl, expected):
    assert adapt_kl_coef(0.2, kl, target=6.0, n=64, horizon=2000) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("estimator", "expected"), [("k1", [0.5, -1.0]), ("k2", [0.125, 0.5]), ("k3", [math.exp(-0.5) - 0.5, math.e - 2.0])]
)
def test_the_penalties_of_the_reward_are_the_hand_worked_numbers(estimator, expected):
    logprobs, reference = torch.tensor([[-1.0, -2.0]]).double(), torch.tensor([[-1.5, -1.0]]).double()
    torch.testing.assert_close(kl_penalties(logprobs, reference, estimator), torch.tensor([expected]).double())
    rewards = token_rewards(
        torch.tensor([3.0]), logprobs, reference, torch.tensor([[True, True]]), kl_coef=0.1, estimator=estimator
    )
    assert rewards[0].tolist() == pytest.approx([-0.1 * expected[0], 3.0 - 0.1 * expected[1]])


def test_a_penalty_that_needs_a_gradient_has_no_place_in_the_reward():
    with pytest.raises(ValueError, match="'k3-weighted' has no place in the reward; take k1, k2 or k3"):
        kl_penalties(torch.zeros(1, 1), torch.zeros(1, 1), "k3-weighted")


def test_a_return_is_the_sum_over_the_mask():
    rewards = torch.tensor([[1.0, 2.0, math.nan], [1.0, math.inf, 4.0], [math.nan] * 3, [1.0, 1.0, 1.0]])
    assert sequence_returns(rewards, MASK).tolist() == [3.0, 5.0, 0.0, 3.0]


def gradient_of_a_penalty_in_the_reward(estimator, distance):
    """E_π[k ∇ log π] of a softmax at a distance from its reference, and the gradients of both directions of the KL."""
    ref = torch.tensor([-0.2, 0.5, 0.3, 0.1], dtype=torch.float64).log_softmax(0)
    direction = torch.tensor([1.0, -0.6, 0.2, -0.3], dtype=torch.float64)
    theta = (ref + distance * direction).requires_grad_()
    logp = theta.log_softmax(0)
    penalties = kl_penalties(logp.detach(), ref, estimator)
    [got] = torch.autograd.grad((logp.exp().detach() * penalties * logp).sum(), theta, retain_graph=True)
    [reverse] = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), theta, retain_graph=True)
    [forward] = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), theta)
    return got, reverse, forward


def test_only_k1_in_the_reward_has_the_gradient_of_the_kl():
    got, reverse, _ = gradient_of_a_penalty_in_the_reward("k1", 0.8)
    torch.testing.assert_close(got, reverse, rtol=0, atol=1e-15)
    got, reverse, forward = gradient_of_a_penalty_in_the_reward("k3", 0.8)
    torch.testing.assert_close(got, reverse - forward, rtol=0, atol=1e-15)
    for estimator in ("k2", "k3"):
        got, reverse, _ = gradient_of_a_penalty_in_the_reward(estimator, 0.01)
        assert float(got.norm()) < 0.02 * float(reverse.norm())  # near the reference they hardly pull


RETURNS = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0], dtype=torch.float64)


def test_the_group_estimators_are_the_hand_worked_numbers():
    assert group_mean_advantages(RETURNS, 3).tolist() == [-2.0, -1.0, 3.0, 0.0, 0.0, 0.0]
    assert leave_one_out_advantages(RETURNS, 3).tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, 0.0, 0.0, 0.0]
    scale = math.sqrt((4 + 1 + 9) / 2) + 1e-6
    expected = [-2 / scale, -1 / scale, 3 / scale, 0.0, 0.0, 0.0]
    assert group_standard_scores(RETURNS, 3).tolist() == pytest.approx(expected, rel=1e-15)


def test_a_group_that_nearly_agrees_is_scaled_up_and_one_that_agrees_is_not():
    near = torch.tensor([0.1, 0.1 + 1e-3, 0.1, 0.1], dtype=torch.float64)
    assert float(group_standard_scores(near, 4).abs().max()) > 1.0  # the bias of the division, in one line
    assert not group_standard_scores(torch.full((4,), 0.1).double(), 4).any()


@few_examples
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 6))
def test_a_groups_advantages_sum_to_zero_and_know_nothing_of_other_groups(seed, groups, size):
    returns = torch.randn(groups * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for estimate in (group_mean_advantages, leave_one_out_advantages, group_standard_scores):
        whole = estimate(returns, size)
        assert float(whole.reshape(groups, size).sum(dim=1).abs().max()) < 1e-12
        assert whole[:size].tolist() == estimate(returns[:size], size).tolist()
        assert estimate(returns + 7.0, size).tolist() == pytest.approx(whole.tolist(), rel=1e-9, abs=1e-9)


def expected_gradient(estimate, group_size):
    """E[(1/k) Σ_i A_i ∇ log π(a_i)] of a softmax over three actions, over every group of actions, and ∇ E[r]."""
    theta = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64)
    p, r = theta.softmax(0), torch.tensor([1.0, 0.0, 0.1], dtype=torch.float64)
    total = torch.zeros_like(theta)
    for actions in itertools.product(range(3), repeat=group_size):
        chosen = torch.tensor(actions)
        score_functions = torch.eye(3, dtype=torch.float64)[chosen] - p
        total += p[chosen].prod() * (estimate(r[chosen], group_size)[:, None] * score_functions).mean(dim=0)
    return total, p * (r - p @ r)


@pytest.mark.parametrize("group_size", [2, 3, 4])
def test_leave_one_out_is_unbiased_and_the_group_mean_is_short_by_k_minus_one_over_k(group_size):
    got, exact = expected_gradient(leave_one_out_advantages, group_size)
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-14)
    got, _ = expected_gradient(group_mean_advantages, group_size)
    torch.testing.assert_close(got, exact * (group_size - 1) / group_size, rtol=0, atol=1e-14)


def test_dividing_by_the_deviation_turns_the_expected_gradient():
    """The good action is rare: groups without it, which hardly differ, weigh as much as those that have it."""
    got, exact = expected_gradient(group_standard_scores, 4)
    assert float(got @ exact / (got.norm() * exact.norm())) < 0.6
