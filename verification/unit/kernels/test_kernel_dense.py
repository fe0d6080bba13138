"""Activations, transposition and sums of squares against float64."""

import math

import pytest
import torch
from torch.nn import functional

import rlhf_kernels
from rlhf_kernels.dense import transposed

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


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 16), (16, 3), (17, 5), (33, 67), (130, 129)])
def test_a_transposed_matrix_is_a_contiguous_copy(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for matrix in (x, x.t(), x.double()):
        result = transposed(matrix)
        assert result.is_contiguous()
        assert torch.equal(result, matrix.t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (7, 9), (3, 5, 40), (40_001,)])
def test_a_sum_of_squares_is_that_of_float64(shape, dtype):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 1e3).to(dtype)
    assert rlhf_kernels.sum_of_squares(x) == pytest.approx(float((x.double() ** 2).sum()), rel=1e-13)
    if len(shape) == 2:
        assert rlhf_kernels.sum_of_squares(x.t()) == rlhf_kernels.sum_of_squares(x)


def test_a_sum_of_squares_of_float32_overflows_never_and_shows_what_is_not_finite():
    assert rlhf_kernels.sum_of_squares(torch.full((100,), 3e38)) == pytest.approx(9e78, rel=1e-6)
    assert rlhf_kernels.sum_of_squares(torch.full((3,), 1e-40)) == pytest.approx(3e-80, rel=1e-4)
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.zeros(50)
        x[37] = bad
        assert not math.isfinite(rlhf_kernels.sum_of_squares(x))
