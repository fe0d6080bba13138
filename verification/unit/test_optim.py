import math

import pytest
import torch

from rlhf_core.optim import adamw, add_gradients, clip_gradients, gradients, set_learning_rate, total_norm


def adam_by_hand(start, gradient_of_step, rates, beta2, eps, decay):
    """Loshchilov and Hutter (2019), algorithm 2, on Python floats."""
    x, m, v = list(start), [0.0] * len(start), [0.0] * len(start)
    for step, (gradient, rate) in enumerate(zip(gradient_of_step, rates, strict=True), start=1):
        for i, g in enumerate(gradient):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            m_hat, v_hat = m[i] / (1 - 0.9**step), v[i] / (1 - beta2**step)
            x[i] -= rate * (m_hat / (math.sqrt(v_hat) + eps) + decay * x[i])
    return x


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_adamw_takes_the_steps_of_an_independent_loop_under_a_changing_rate(dtype, tolerance, decay):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, generator=generator, dtype=torch.float64).to(dtype)
    steps = torch.randn(20, 7, generator=generator, dtype=torch.float64).to(dtype)
    rates = [1e-2 * (1 - step / 20) for step in range(20)]
    parameter = torch.nn.Parameter(start.clone())
    optimizer = adamw([parameter], lr=123.0, beta2=0.95, eps=1e-6, weight_decay=decay)
    for gradient, rate in zip(steps, rates, strict=True):
        set_learning_rate(optimizer, rate)
        parameter.grad = gradient.clone()
        optimizer.step()
    expected = adam_by_hand(start.tolist(), steps.tolist(), rates, 0.95, 1e-6, decay)
    torch.testing.assert_close(
        parameter.detach().double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


def test_the_total_norm_is_that_of_all_gradients_as_one_vector():
    assert total_norm([torch.tensor([[3.0], [0.0]]), torch.tensor(4.0), torch.zeros(0)]) == 5.0
    assert total_norm([torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t()]) == pytest.approx(math.sqrt(30.0), rel=1e-7)
    assert total_norm([]) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_total_norm_shows_a_gradient_that_is_not_finite(bad):
    assert not math.isfinite(total_norm([torch.ones(3), torch.tensor([1.0, bad])]))


def test_clipping_scales_all_gradients_alike_and_only_when_they_are_too_long():
    grads = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    clip_gradients(grads, 5.0, 5.0)
    assert [grad.tolist() for grad in grads] == [[3.0, 0.0], [[4.0]]]
    clip_gradients(grads, 5.0, 1.0)
    torch.testing.assert_close(grads[0], torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(grads[1], torch.tensor([[0.8]]))
    assert total_norm(grads) == pytest.approx(1.0, rel=1e-6)


def test_gradients_are_the_tensors_themselves_and_leave_out_parameters_without_one():
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    (a.sum() * 2).backward()
    (only,) = gradients([a, b])
    assert only is a.grad


def test_gradients_are_added_in_place_and_left_out_where_there_is_none():
    one, untouched = (torch.nn.Parameter(torch.zeros(3, 2)) for _ in range(2))
    add_gradients([one, untouched], [torch.ones(3, 2), None])
    place = one.grad
    add_gradients([one, untouched], [torch.ones(3, 2), None])
    assert one.grad is place
    assert one.grad.tolist() == [[2.0, 2.0]] * 3
    assert untouched.grad is None
