import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import few_examples, same_bits

from rlhf_core.advantages import adapt_kl_coef, last_token_index, penalize_missing_eos, token_rewards

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
