"""The losses of the reward model against literal numbers, and the report against counts by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from rlhf_core.preferences import bradley_terry_loss, centering_loss
from rlhf_core.reward_report import JudgedPairs, pair_report


def loss(chosen, rejected, margin=0.0, tie=0.0):
    values = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (chosen, rejected))
    c, r = values
    total = bradley_terry_loss(c, r, torch.tensor([margin]).double(), torch.tensor([tie]).double())
    return total, torch.autograd.grad(total, (c, r))


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ((0.0, 0.0), 0.6931471805599453),
        ((2.0, 1.0), 0.31326168751822286),  # ln(1 + e^-1)
        ((1.0, 2.0), 1.3132616875182228),
        ((2.0, 1.0, 1.0), 0.6931471805599453),  # the margin takes the lead away
        ((2.0, 1.0, 0.0, 1.0), 0.8132616875182228),  # the mean of both
        ((1e4, -1e4), 0.0),
        ((-1e4, 1e4), 2e4),  # no overflow
    ],
)
def test_the_loss_of_a_pair(arguments, value):
    assert loss(*arguments)[0].item() == pytest.approx(value, rel=1e-12, abs=1e-12)


def test_the_gradient_is_the_probability_of_being_wrong():
    _, (chosen, rejected) = loss(0.7, 0.2, 0.1)
    wrong = 1 / (1 + math.exp(0.4))
    assert (chosen.item(), rejected.item()) == (pytest.approx(-wrong), pytest.approx(wrong))


def test_a_tie_pulls_the_two_together_from_either_side():
    assert loss(1.0, 0.0, tie=1.0)[1][0].item() > 0
    assert loss(0.0, 1.0, tie=1.0)[1][0].item() < 0
    assert loss(0.5, 0.5, tie=1.0)[1][0].item() == 0


def test_losses_are_sums_over_pairs():
    chosen, rejected = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -3.0])
    zero = torch.zeros(2)
    one_by_one = sum(bradley_terry_loss(chosen[i : i + 1], rejected[i : i + 1], zero[:1], zero[:1]) for i in range(2))
    assert bradley_terry_loss(chosen, rejected, zero, zero).item() == pytest.approx(one_by_one.item())
    assert centering_loss(chosen, rejected).item() == 1.5**2 + 1.0


def test_centering_leaves_differences_alone_and_has_its_optimum_at_a_sum_of_zero():
    chosen = torch.tensor([3.0], requires_grad=True)
    rejected = torch.tensor([1.0], requires_grad=True)
    grads = torch.autograd.grad(centering_loss(chosen, rejected), (chosen, rejected))
    assert grads[0].item() == grads[1].item() == 8.0  # both move alike


def pairs(chosen, rejected, tie=None, chosen_length=None, rejected_length=None):
    n = len(chosen)
    return JudgedPairs(
        np.array(chosen, dtype=float),
        np.array(rejected, dtype=float),
        np.array(tie or [0] * n),
        np.array(chosen_length or range(1, n + 1)),
        np.array(rejected_length or [1] * n),
    )


def test_the_report_counted_by_hand():
    logit = math.log(3)  # σ = 0.75
    report = pair_report(
        pairs([logit, 0.0, 1.0, 5.0], [0.0, logit, 1.0, 2.0], [0, 0, 0, 1], [4, 2, 3, 9], [2, 5, 3, 9])
    )
    assert (report["pairs"], report["ties"]) == (3, 1)
    assert report["accuracy"] == 0.5  # one right, one wrong, one undecided
    assert report["log_loss"] == pytest.approx((math.log(4 / 3) + math.log(4) + math.log(2)) / 3, abs=1e-8)
    assert report["mean_tie_gap"] == 3.0
    # σ(ln 3) = 0.75 twice, one of them right; 0.5 once, half right.
    assert report["ece"] == pytest.approx((2 * abs(0.5 - 0.75) + 0) / 3, abs=1e-8)
    assert [one["pairs"] for one in report["reliability"]] == [1, 2]
    assert report["length"]["chosen_longer"] == {"pairs": 1, "accuracy": 1.0}
    assert report["length"]["chosen_shorter"] == {"pairs": 1, "accuracy": 0.0}
    assert report["length"]["equally_long"] == {"pairs": 1, "accuracy": 0.5}


def test_a_model_that_pays_length_is_found_out():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 50, (2, 200))
    report = pair_report(pairs(lengths[0] / 10, lengths[1] / 10, None, lengths[0].tolist(), lengths[1].tolist()))
    assert report["length"]["pearson"] == pytest.approx(1.0)
    assert report["length"]["chosen_longer"]["accuracy"] == 1.0
    assert report["length"]["chosen_shorter"]["accuracy"] == 0.0


def test_a_calibrated_model_has_a_small_calibration_error_and_an_overconfident_one_has_not():
    generator = np.random.default_rng(1)
    d = generator.normal(0, 2, 20_000)
    wins = generator.random(20_000) < 1 / (1 + np.exp(-d))
    signed = np.where(wins, d, -d)  # the chosen one is the winner
    zero = np.zeros_like(signed)
    assert pair_report(pairs(signed, zero))["ece"] < 0.015
    over = pair_report(pairs(5 * signed, zero))
    assert over["ece"] > 0.15
    assert over["accuracy"] == pair_report(pairs(signed, zero))["accuracy"]


def test_figures_without_a_pair_are_none_and_correlations_are_scipys():
    empty = pair_report(pairs([1.0], [0.0], [1]))
    assert (empty["accuracy"], empty["ece"], empty["reliability"]) == (None, None, [])
    assert pair_report(pairs([1.0], [1.0]))["length"]["pearson"] is None
    given = pairs([0.3, 0.1, 0.9], [0.2, 0.8, 0.4], None, [3, 1, 4], [1, 5, 9])
    expected = stats.spearmanr([0.3, 0.1, 0.9, 0.2, 0.8, 0.4], [3, 1, 4, 1, 5, 9]).statistic
    assert pair_report(given)["length"]["spearman"] == pytest.approx(expected, abs=1e-8)
