"""The CUDA kernel of whitening against numpy."""

import math

import pytest
import torch
from kernel_oracles import same_bits, whitened


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape", [(41, 401), (3, 1271), (1,), (0,), (2, 0, 3), (7, 11, 13), (4096,), (4097,), (40, 2000)]
)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_equals_numpy(kernels, shape, dtype, shift_mean):
    x, mask = torch.randn(shape, dtype=dtype) * 3 + 2, torch.rand(shape) < 0.6
    got = kernels.whiten(x, mask, shift_mean)
    assert got.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got.double(), whitened(x, mask, shift_mean), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("garbage", [math.nan, 1e30, math.inf])
def test_whitening_is_not_changed_by_what_lies_outside_the_mask(kernels, garbage):
    x, mask = torch.randn(13, 501), torch.rand(13, 501) < 0.5
    mask.view(-1)[4096:] = False  # a chunk without a token
    clean = kernels.whiten(x, mask)
    x[~mask] = garbage
    assert same_bits(kernels.whiten(x, mask), clean)
    assert same_bits(kernels.whiten(x, torch.zeros_like(mask)), torch.zeros_like(x))


def test_whitening_does_not_lose_a_small_variance_beside_a_large_mean(kernels):
    x = 1e4 + torch.randn(10_000, dtype=torch.float64).mul(0.01)
    got = kernels.whiten(x, torch.ones_like(x, dtype=torch.bool))
    assert abs(float(got.mean())) < 1e-6
    assert abs(float(got.var(correction=0)) - 1.0) < 2e-4  # the 1e-8 beside a variance of 1e-4


def test_whitening_takes_any_strides(kernels):
    x, mask = torch.randn(9, 14), torch.rand(9, 14) < 0.5
    strided = kernels.whiten(kernels.put(x.t().contiguous()).t(), kernels.put(mask.t().contiguous()).t())
    assert same_bits(strided, kernels.whiten(x, mask))
