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
    kl_k3,
    log_ratio,
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
