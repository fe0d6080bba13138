import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import few_examples, same_bits

from rlhf_core.losses import (
    clipped_policy_losses,
    clipped_value_losses,
    kl_k2,
    kl_k3,
    kl_losses,
    log_ratio,
    loss_count,
    loss_sum,
    masked_sum,
)

LOG2 = math.log(2.0)


def random_case(seed, batch=5, length=7):
    """New and old log-probs, advantages, values, old values, returns in float64, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(batch, length, generator=generator, dtype=torch.float64) for _ in range(6)]
    tensors[0] = tensors[1] + 0.3 * tensors[0]
    return tensors, torch.rand(batch, length, generator=generator) < 0.6


def test_masked_sum_adds_what_is_inside():
    x = torch.tensor([[1.0, 20.0], [math.nan, 4.0]], requires_grad=True)
    total = masked_sum(x, torch.tensor([[True, False], [False, True]]))
    total.backward()
    assert total.item() == 5.0
    assert x.grad.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_log_ratio_is_the_difference_inside_and_zero_outside():
    ratio = log_ratio(
        torch.tensor([-1.0, math.nan, 3.0]), torch.tensor([-1.5, 2.0, math.inf]), torch.tensor([1, 0, 0]) > 0
    )
    assert ratio.tolist() == [0.5, 0.0, 0.0]


# ρ, A, loss max(−ρA, −clip(ρ)A) with ε = 0.2, and its derivative by log ρ
POLICY_CASES = [
    (1.5, 2.0, -2.4, 0.0),  # clipped: nothing more to gain
    (1.5, -2.0, 3.0, 3.0),  # a worse token made likelier: never clipped
    (0.5, 2.0, -1.0, -1.0),
    (0.5, -2.0, 1.6, 0.0),
    (1.1, 1.0, -1.1, -1.1),
    (0.9, -1.0, 0.9, 0.9),
    (1.0, 3.0, -3.0, -3.0),
]


def test_the_policy_loss_is_the_hand_worked_example_token_by_token():
    ratios, advantages, losses, gradients = (
        torch.tensor([column], dtype=torch.float64) for column in zip(*POLICY_CASES, strict=True)
    )
    x = ratios.log().requires_grad_()
    got = clipped_policy_losses(x, advantages, torch.ones_like(ratios, dtype=torch.bool), clip_range=0.2)
    got.sum().backward()
    torch.testing.assert_close(got, losses, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.grad, gradients, rtol=0, atol=1e-12)


# V, V_old, R, ½ max((V−R)², (clipped−R)²) with ε = 0.2, and its derivative by V
VALUE_CASES = [
    (1.0, 0.5, 2.0, 0.845, 0.0),  # clipped to 0.7, (0.7 − 2)² = 1.69 is worse
    (1.0, 0.5, 0.0, 0.5, 1.0),  # 1² is worse than 0.7²
    (0.6, 0.5, 0.0, 0.18, 0.6),  # inside the range both are the same
    (-1.0, 0.5, -1.5, 0.845 + 0.775, 0.0),  # clipped to 0.3, (0.3 + 1.5)² = 3.24
    (-1.0, 0.5, 3.0, 8.0, -4.0),
]


def test_the_value_loss_is_the_hand_worked_example_token_by_token():
    for value, old, target, expected, gradient in VALUE_CASES:
        v = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
        old_value, returns = (torch.tensor([[x]], dtype=torch.float64) for x in (old, target))
        loss = clipped_value_losses(v, old_value, returns, torch.tensor([[True]]), clip_range=0.2)
        loss.backward()
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        assert v.grad.item() == pytest.approx(gradient, abs=1e-12)


def test_k3_is_the_hand_worked_number():
    x = torch.tensor([LOG2, -LOG2, 0.0, 3.0], dtype=torch.float64)
    expected = [0.5 - 1 + LOG2, 2.0 - 1 - LOG2, 0.0, math.exp(-3.0) + 2.0]
    torch.testing.assert_close(kl_k3(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("x", [1e-3, -1e-3, 3e-4, 1e-2])
def test_k3_keeps_its_digits_in_float32_where_the_ratio_is_near_one(x):
    exact = x * x / 2 - x**3 / 6 + x**4 / 24
    assert kl_k3(torch.tensor(x)).item() == pytest.approx(exact, rel=3e-3)


@few_examples
@given(st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=50), st.sampled_from([torch.float32, torch.float64]))
def test_k3_is_never_negative(xs, dtype):
    assert (kl_k3(torch.tensor(xs, dtype=dtype)) >= 0).all()


def test_k3_is_never_negative_over_all_magnitudes():
    magnitudes = torch.logspace(-30, 1.9, 20_000, dtype=torch.float64).float()
    for x in (magnitudes, -magnitudes):
        assert (kl_k3(x) >= 0).all()


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 1.5])
def test_the_kl_estimators_have_the_bias_and_spread_that_the_design_states_for_gaussians(mu):
    """q = N(0, 1), p = N(μ, 1): log q/p = μ²/2 − μx, integrated over q by Gauss–Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    weights = weights / math.sqrt(2 * math.pi)
    x = mu**2 / 2 - mu * nodes
    kl = mu**2 / 2
    k3 = kl_k3(torch.from_numpy(x)).numpy()
    for estimate, bias, spread in (
        (x, 0.0, 2 / mu),
        (x**2 / 2, mu**2 / 4, math.sqrt(2 + mu**2)),
        (k3, 0.0, math.sqrt(math.exp(mu**2) - 1 - mu**2) / kl),
    ):
        mean = float(weights @ estimate)
        deviation = math.sqrt(float(weights @ (estimate - mean) ** 2))
        assert mean / kl - 1 == pytest.approx(bias, abs=1e-9)
        assert deviation / kl == pytest.approx(spread, rel=1e-9)


def policy(new, old, advantages, mask):
    return clipped_policy_losses(log_ratio(new, old, mask), advantages, mask, clip_range=0.2).sum()


def value(values, old_values, returns, mask):
    return clipped_value_losses(values, old_values, returns, mask, clip_range=0.2).sum()


LOSSES = {"policy": (policy, slice(0, 3)), "value": (value, slice(3, 6))}


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradients_agree_with_finite_differences(name):
    loss, which = LOSSES[name]
    tensors, mask = random_case(3)
    first, *constants = tensors[which]
    assert torch.autograd.gradcheck(lambda x: loss(x, *constants, mask), first.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("garbage", [math.nan, 1e30, math.inf, -math.inf])
def test_what_lies_outside_the_mask_changes_no_bit_of_loss_or_gradient(name, garbage):
    loss, which = LOSSES[name]
    tensors, mask = random_case(4)
    tensors = [x.float() for x in tensors]

    def value_and_gradient(inputs):
        first = inputs[0].clone().requires_grad_()
        total = loss(first, *inputs[1:], mask)
        total.backward()
        return total, first.grad

    clean = value_and_gradient(tensors[which])
    for position in range(3):
        inputs = [x.clone() for x in tensors[which]]
        inputs[position][~mask] = garbage
        dirty = value_and_gradient(inputs)
        assert same_bits(clean[0], dirty[0])
        assert same_bits(clean[1], dirty[1])


@pytest.mark.parametrize("garbage", [math.nan, 1e30, math.inf])
def test_the_policy_loss_alone_keeps_garbage_in_the_log_ratio_out_of_its_gradient(garbage):
    x = torch.tensor([[0.1, garbage]], requires_grad=True)
    clipped_policy_losses(
        x, torch.tensor([[2.0, garbage]]), torch.tensor([[True, False]]), clip_range=0.2
    ).sum().backward()
    assert x.grad.tolist() == [[pytest.approx(-2 * math.exp(0.1), rel=1e-6), 0.0]]


@pytest.mark.parametrize("name", LOSSES)
def test_a_mask_without_any_token_gives_zero_loss_and_zero_gradient(name):
    loss, which = LOSSES[name]
    first, *constants = random_case(5)[0][which]
    first.requires_grad_()
    total = loss(first, *constants, torch.zeros_like(first, dtype=torch.bool))
    total.backward()
    assert total.item() == 0.0
    assert not first.grad.any()


@few_examples
@given(st.integers(0, 10**6), st.integers(1, 12), st.data())
def test_the_sum_over_any_split_into_micro_batches_is_the_whole(seed, batch, data):
    tensors, mask = random_case(seed, batch=batch)
    sizes = []
    while sum(sizes) < batch:
        sizes.append(data.draw(st.integers(1, batch - sum(sizes))))
    for loss, which in LOSSES.values():
        whole = loss(*tensors[which], mask).item()
        parts = zip(*(x.split(sizes) for x in (*tensors[which], mask)), strict=True)
        assert math.fsum(loss(*part).item() for part in parts) == pytest.approx(whole, rel=1e-12, abs=1e-12)


@few_examples
@given(st.integers(0, 10**6))
def test_the_losses_agree_with_loops_over_plain_numbers(seed):
    (new, old, advantages, values, old_values, returns), mask = random_case(seed, batch=3, length=4)
    policy_sum, value_sum = 0.0, 0.0
    for b, t in np.argwhere(mask.numpy()):
        ratio, advantage = math.exp(new[b, t].item() - old[b, t].item()), advantages[b, t].item()
        policy_sum += max(-ratio * advantage, -min(max(ratio, 0.8), 1.2) * advantage)
        v, v_old, target = values[b, t].item(), old_values[b, t].item(), returns[b, t].item()
        clipped = min(max(v, v_old - 0.2), v_old + 0.2)
        value_sum += 0.5 * max((v - target) ** 2, (clipped - target) ** 2)
    assert policy(new, old, advantages, mask).item() == pytest.approx(policy_sum, rel=1e-12, abs=1e-12)
    assert value(values, old_values, returns, mask).item() == pytest.approx(value_sum, rel=1e-12, abs=1e-12)


# -- what a loss is the mean of ----------------------------------------------------------------------------------------

LOSSES_BT = torch.tensor([[1.0, 2.0, 0.0], [4.0, 0.0, 6.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
MASK = torch.tensor([[True, True, False], [True, False, True], [True, False, False], [False, False, False]])


@pytest.mark.parametrize(
    ("loss_mean", "numerator", "denominator"),
    [("token", 16.0, 5), ("sum", 16.0, 4), ("constant", 16.0, 40), ("sequence", 1.5 + 5.0 + 3.0, 4)],
)
def test_a_minibatchs_loss_is_the_hand_worked_quotient(loss_mean, numerator, denominator):
    assert loss_sum(LOSSES_BT, MASK, loss_mean).item() == numerator
    assert loss_count(MASK, loss_mean, 10) == denominator
    parts = [loss_sum(LOSSES_BT[rows], MASK[rows], loss_mean).item() for rows in ([0], [1, 2], [3])]
    assert sum(parts) == numerator


def test_an_unknown_mean_is_named():
    with pytest.raises(ValueError, match="loss_mean is 'tokens'; choose from token, sequence, sum, constant"):
        loss_count(MASK, "tokens", 10)


# -- KL penalties in the loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "ratio", "x", "loss", "gradient"),
    [
        ("k2", 1.0, LOG2, LOG2**2 / 2, LOG2),
        ("k2", 1.5, LOG2, LOG2**2 / 2, LOG2),
        ("k3", 1.0, LOG2, LOG2 - 0.5, 0.5),  # 1 − e^{−x}
        ("k3", 1.5, -LOG2, 1.0 - LOG2, -1.0),
        ("k3-weighted", 1.0, LOG2, LOG2 - 0.5, LOG2),  # x, as for k2
        ("k3-weighted", 1.5, LOG2, 1.5 * (LOG2 - 0.5), 1.5 * LOG2),  # ρ x
    ],
)
def test_the_kl_penalties_and_their_gradients_are_the_hand_worked_numbers(estimator, ratio, x, loss, gradient):
    logprob = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    got = kl_losses(estimator, logprob + 1.0 + x, logprob + 1.0 + math.log(ratio))
    got.sum().backward()
    assert got.item() == pytest.approx(loss, rel=1e-12)
    assert logprob.grad.item() == pytest.approx(gradient, rel=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k4"])
def test_k1_is_refused_in_the_loss(estimator):
    with pytest.raises(ValueError, match=f"'{estimator}' has no place in the loss; take k2, k3 or k3-weighted"):
        kl_losses(estimator, torch.zeros(1, 1), torch.zeros(1, 1))


def expected_penalty_gradient(penalty, behaviour_shift):
    """E_old[∇ penalty] of a softmax over four actions, and the gradients of KL(π‖π_ref) and KL(π_ref‖π)."""
    theta = torch.tensor([0.4, -0.3, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-0.2, 0.5, 0.3, 0.1], dtype=torch.float64).log_softmax(0)
    old = (theta.detach() + behaviour_shift * torch.tensor([0.3, 0.1, -0.4, 0.2])).log_softmax(0)
    logp = theta.log_softmax(0)
    [got] = torch.autograd.grad((old.exp() * penalty(logp - ref, logp - old)).sum(), theta, retain_graph=True)
    [reverse] = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), theta, retain_graph=True)
    [forward] = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), theta)
    return got, reverse, forward


def close(a, b):
    return float((a - b).abs().max()) < 1e-14


def named(estimator):
    return lambda x, log_rho: kl_losses(estimator, x, log_rho)


def test_on_policy_k2_and_weighted_k3_pull_along_the_kl_and_k3_along_the_other_direction():
    got, reverse, forward = expected_penalty_gradient(named("k2"), 0.0)
    assert close(got, reverse)
    assert close(expected_penalty_gradient(named("k3-weighted"), 0.0)[0], reverse)
    assert close(expected_penalty_gradient(named("k3"), 0.0)[0], forward)
    assert not close(reverse, forward)


def test_off_policy_only_the_weighted_estimator_keeps_the_gradient_of_the_kl():
    got, reverse, _ = expected_penalty_gradient(named("k3-weighted"), 1.0)
    assert close(got, reverse)
    assert not close(expected_penalty_gradient(named("k2"), 1.0)[0], reverse)


def test_k1_in_the_loss_would_pull_nowhere():
    got, reverse, _ = expected_penalty_gradient(lambda x, log_rho: x, 0.0)
    assert close(got, torch.zeros(4))
    assert not close(reverse, torch.zeros(4))


@pytest.mark.parametrize("mu", [0.3, 1.0])
def test_k2_of_losses_has_the_gaussian_mean_of_the_design(mu):
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    x = torch.from_numpy(mu**2 / 2 - mu * nodes)
    mean = float(weights @ kl_k2(x).numpy()) / math.sqrt(2 * math.pi)
    assert mean == pytest.approx(mu**2 / 2 * (1 + mu**2 / 4), rel=1e-9)
