import math

import pytest
import torch
from kernel_oracles import same_bits, whitened

from rlhf_kernels import whiten


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(41, 401), (3, 1271), (1,), (0,), (2, 0, 3), (7, 11, 13), (40, 2000)])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_equals_numpy(backend, shape, dtype, shift_mean):
    x, mask = torch.randn(shape, dtype=dtype) * 3 + 2, torch.rand(shape) < 0.6
    got = whiten(x, mask, shift_mean=shift_mean, backend=backend)
    assert got.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got.double(), whitened(x, mask, shift_mean), rtol=tolerance, atol=tolerance)


def test_gives_literal_numbers(backend):
    x, mask = torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False])
    torch.testing.assert_close(whiten(x, mask, backend=backend), torch.tensor([-1.0, 1.0, 0.0]))
    torch.testing.assert_close(whiten(x, mask, shift_mean=False, backend=backend), torch.tensor([1.0, 3.0, 0.0]))


def test_an_empty_mask_gives_zeros_and_one_token_its_mean(backend):
    x = torch.tensor([5.0, math.nan])
    assert same_bits(whiten(x, torch.tensor([False, False]), backend=backend), torch.zeros(2))
    one = torch.tensor([True, False])
    assert whiten(x, one, backend=backend).tolist() == [0.0, 0.0]
    assert whiten(x, one, shift_mean=False, backend=backend).tolist() == [5.0, 0.0]


@pytest.mark.parametrize("garbage", [math.nan, 1e30, math.inf])
def test_what_lies_outside_the_mask_changes_no_bit(backend, garbage):
    x, mask = torch.randn(37, 501), torch.rand(37, 501) < 0.5
    clean = whiten(x, mask, backend=backend)
    x[~mask] = garbage
    assert same_bits(whiten(x, mask, backend=backend), clean)


def test_does_not_lose_a_small_variance_beside_a_large_mean(backend):
    x = 1e4 + torch.randn(10_000, dtype=torch.float64).mul(0.01)
    got = whiten(x, torch.ones_like(x, dtype=torch.bool), backend=backend)
    assert abs(float(got.mean())) < 1e-6
    assert abs(float(got.var(correction=0)) - 1.0) < 2e-4  # the 1e-8 beside a variance of 1e-4


def test_takes_non_contiguous_tensors(backend):
    x, mask = torch.randn(9, 14), torch.rand(9, 14) < 0.5
    assert same_bits(
        whiten(x.t().contiguous().t(), mask.t().contiguous().t(), backend=backend), whiten(x, mask, backend=backend)
    )


def test_refuses_bad_arguments_by_name(backend):
    x = torch.randn(3)
    with pytest.raises(ValueError, match=r"mask must have shape \(3,\), got \(2,\)"):
        whiten(x, torch.ones(2, dtype=torch.bool), backend=backend)
    with pytest.raises(ValueError, match=r"mask is 2\.0 at position \(1,\); it must be 0 or 1"):
        whiten(x, torch.tensor([1.0, 2.0, 0.0]), backend=backend)
    with pytest.raises(TypeError, match=r"x must be .*got torch\.int64"):
        whiten(x.long(), torch.ones(3, dtype=torch.bool), backend=backend)
    with pytest.raises(RuntimeError, match="whiten has no gradient"):
        whiten(x.requires_grad_(), torch.ones(3, dtype=torch.bool), backend=backend)
