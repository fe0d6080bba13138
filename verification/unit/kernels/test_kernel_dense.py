"""Activations, norms and sums against float64."""

import math

import pytest
import torch
from torch.nn import functional

import rlhf_kernels
from rlhf_kernels.dense import column_sums

ACTIVATIONS = {
    "gelu": (rlhf_kernels.gelu, lambda x: functional.gelu(x, approximate="tanh")),
    "silu": (rlhf_kernels.silu, functional.silu),
}


def value_and_slope(function, x):
    x = x.clone().requires_grad_()
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach().double(), slope.double()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_and_its_slope_are_within_six_parts_in_ten_million_of_float64(name):
    ours, theirs = ACTIVATIONS[name]
    x = torch.linspace(-40.0, 40.0, 100_003)
    exact = value_and_slope(theirs, x.double())
    for mine, torchs, right in zip(value_and_slope(ours, x), value_and_slope(theirs, x), exact, strict=True):
        scale = right.abs().clamp_min(0.1)  # relative, but where there is hardly anything
        error, torchs_error = (((result - right).abs() / scale).max().item() for result in (mine, torchs))
        assert error < 6e-7
        assert error < 2.5 * torchs_error


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_of_huge_numbers_is_the_number_or_zero_and_nan_stays_nan(name):
    ours, _ = ACTIVATIONS[name]
    value, slope = value_and_slope(ours, torch.tensor([1e30, -1e30, 3e38, -3e38, math.inf, math.nan, 0.0]))
    assert value[0] == pytest.approx(1e30)
    assert value[1] == value[3] == value[6] == 0.0
    assert value[2] == pytest.approx(3e38)
    assert value[4] == math.inf
    assert math.isnan(value[5])
    assert slope[[0, 2, 4]].tolist() == [1.0, 1.0, 1.0]
    assert slope[[1, 3]].abs().max() < 1e-30
    assert slope[6] == 0.5


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_an_activation_of_another_dtype_is_that_of_float64_rounded(name, dtype):
    ours, theirs = ACTIVATIONS[name]
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-14}[dtype]
    for mine, right in zip(value_and_slope(ours, x), value_and_slope(theirs, x.double()), strict=True):
        torch.testing.assert_close(mine, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_element_of_an_activation_does_not_depend_on_those_beside_it(name):
    ours, _ = ACTIVATIONS[name]
    x = torch.randn(70_001, generator=torch.Generator().manual_seed(1))
    whole = ours(x)
    assert torch.equal(whole[5:], ours(x[5:]))
    assert torch.equal(whole[:9].reshape(3, 3).t(), ours(x[:9].reshape(3, 3).t()))
    assert ours(x[:0]).shape == (0,)


NORMS = {
    "layer norm": (rlhf_kernels.layer_norm, functional.layer_norm, 2),
    "rms norm": (rlhf_kernels.rms_norm, functional.rms_norm, 1),
}


def norm_results(function, x, parameters, upstream, **shape):
    x, *parameters = (one.clone().requires_grad_() for one in (x, *parameters))
    y = function(x, *shape.values(), *parameters, eps=1e-5)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], upstream)]


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 16), (70, 40), (129, 384), (0, 7)])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_a_norm_and_its_gradients_are_no_further_from_float64_than_torchs(name, shape, offset):
    ours, theirs, count = NORMS[name]
    draw = torch.Generator().manual_seed(5)
    x, upstream = torch.randn(shape, generator=draw) + offset, torch.randn(shape, generator=draw)
    parameters = [torch.randn(shape[-1], generator=draw) for _ in range(count)]
    got = norm_results(ours, x, parameters, upstream)
    torchs = norm_results(theirs, x, parameters, upstream, normalized_shape=(shape[-1],))
    wide = [one.double() for one in (x, *parameters, upstream)]
    exact = norm_results(theirs, wide[0], wide[1:-1], wide[-1], normalized_shape=(shape[-1],))
    for mine, torchs_own, right in zip(got, torchs, exact, strict=True):
        assert mine.shape == right.shape
        if right.numel():
            error, allowed = ((one - right).abs().max().item() for one in (mine, torchs_own))
            assert error <= 2 * allowed + 1e-6 * max(1.0, right.abs().max().item())


@pytest.mark.parametrize("name", NORMS)
def test_a_row_of_a_norm_does_not_depend_on_those_beside_it(name):
    ours, _, count = NORMS[name]
    x, *parameters = torch.randn(3 + count, 77, 24, generator=torch.Generator().manual_seed(6))[:, :, :]
    parameters = [one[0] for one in parameters[:count]]
    whole = ours(x, *parameters)
    assert torch.equal(whole[40:43], ours(x[40:43], *parameters))
    assert torch.equal(whole[7], ours(x[7], *parameters))
    assert torch.equal(whole, ours(x.t().contiguous().t(), *parameters))


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_of_what_is_not_finite_is_not_finite_in_that_row_alone(name):
    ours, _, count = NORMS[name]
    x = torch.randn(4, 19, generator=torch.Generator().manual_seed(7))
    x[1, 18], x[2, 3] = math.nan, math.inf
    y = ours(x, *[torch.ones(19)] * count)
    assert y[[0, 3]].isfinite().all()
    assert not y[1].isfinite().any()
    assert not y[2, 3].isfinite()


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 16), (100, 17), (1000, 130)])
def test_column_sums_are_those_of_float64_rounded(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    for matrix in (x, x.t().contiguous().t(), torch.cat([x, x], dim=1)[:, : shape[1]]):
        torch.testing.assert_close(column_sums(matrix), matrix.double().sum(dim=0).float(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (7, 9), (3, 5, 40), (40_001,)])
def test_a_sum_of_squares_is_that_of_float64(shape, dtype):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 1e3).to(dtype)
    assert rlhf_kernels.sum_of_squares(x) == pytest.approx(float((x.double() ** 2).sum()), rel=1e-13)
    if len(shape) == 2:
        assert rlhf_kernels.sum_of_squares(x.t()) == rlhf_kernels.sum_of_squares(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_squares_of_many_are_those_of_each(dtype):
    generator = torch.Generator().manual_seed(3)
    shapes = [(40_001,), (0,), (3, 5), (16_384,), ()]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    tensors.append(tensors[2].t())
    assert rlhf_kernels.sums_of_squares(tensors) == [rlhf_kernels.sum_of_squares(x) for x in tensors]
    assert rlhf_kernels.sums_of_squares([]) == []


def test_a_sum_of_squares_of_float32_overflows_never_and_shows_what_is_not_finite():
    assert rlhf_kernels.sum_of_squares(torch.full((100,), 3e38)) == pytest.approx(9e78, rel=1e-6)
    assert rlhf_kernels.sum_of_squares(torch.full((3,), 1e-40)) == pytest.approx(3e-80, rel=1e-4)
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.zeros(50)
        x[37] = bad
        assert not math.isfinite(rlhf_kernels.sum_of_squares(x))
