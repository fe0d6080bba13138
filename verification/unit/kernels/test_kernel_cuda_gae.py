"""The CUDA kernel of advantages against float64, whole rows and rows that are split over time."""

import math

import pytest
import torch
from cuda_kernels import CHUNK, MANY_ROWS, EmulatedKernels
from kernel_oracles import gae_by_definition, same_bits


def gae_case(batch, tokens, dtype=torch.float32, density=0.7):
    rewards, values = torch.randn(batch, tokens, dtype=dtype), torch.randn(batch, tokens, dtype=dtype)
    return rewards, values, torch.rand(batch, tokens) < density, torch.randn(batch, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        (41, 401),
        (3, 1271),
        (1, 1),
        (5, 1),
        (1, 17),
        (2, 0),
        (0, 7),
        (300, 20),
        (2, 512),
        (3, 4096),
        (2, 5003),
        (1, 20000),
    ],
)
@pytest.mark.parametrize("with_bootstrap", [False, True])
def test_gae_equals_the_sum_of_discounted_residuals(kernels, batch, tokens, dtype, with_bootstrap):
    rewards, values, mask, bootstrap = gae_case(batch, tokens, dtype)
    bootstrap = bootstrap if with_bootstrap else None
    got = kernels.gae(rewards, values, mask, bootstrap, 0.99, 0.9)
    if tokens <= 1271:
        expected = gae_by_definition(rewards, values, mask, 0.99, 0.9, bootstrap)
    else:  # the definition takes a time quadratic in the tokens
        from rlhf_kernels import reference

        wide = [rewards.double(), values.double(), mask, None if bootstrap is None else bootstrap.double()]
        expected = reference.gae(*wide, 0.99, 0.9)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=tolerance)
    assert same_bits(got[1][mask], (got[0] + values)[mask])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "tokens"), [(5, 401), (1, 1), (3, 512), (2, 2 * CHUNK + 57), (2, 0)])
@pytest.mark.parametrize("which", ["both", "gamma", "lam"])
def test_gae_takes_gamma_and_lambda_per_token(kernels, batch, tokens, dtype, which):
    rewards, values, mask, bootstrap = gae_case(batch, tokens, dtype)
    mask[0, CHUNK - 5 : CHUNK + 9] = False
    gammas, lams = (0.9 + 0.1 * torch.rand(batch, tokens, dtype=dtype) for _ in range(2))
    gammas[~mask] = lams[~mask] = math.nan
    gammas, lams = (None if which == "lam" else gammas), (None if which == "gamma" else lams)
    got = kernels.gae_per_token(rewards, values, mask, bootstrap, gammas, lams, 0.99, 0.95)
    expected = gae_by_definition(
        rewards, values, mask, 0.99 if gammas is None else gammas, 0.95 if lams is None else lams, bootstrap
    )
    tolerance = 2e-6 if dtype == torch.float32 else 1e-11
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=tolerance)
    assert same_bits(got[1][mask], (got[0] + values)[mask])


def test_gae_per_token_splits_few_long_rows_and_gets_the_bits_of_whole_rows(kernels):
    rewards, values, mask, bootstrap = gae_case(2, CHUNK + 3)
    gammas, lams = torch.rand(2, 2, CHUNK + 3)
    few = kernels.gae_per_token(rewards, values, mask, bootstrap, gammas, lams)
    inputs = (rewards, values, mask, bootstrap, gammas, lams)
    whole = kernels.gae_per_token(*(x.repeat(MANY_ROWS // 2, *[1] * (x.dim() - 1)) for x in inputs))
    assert all(same_bits(a, b[:2]) for a, b in zip(few, whole, strict=True))


@pytest.mark.parametrize("tokens", [CHUNK + 1, CHUNK + 4])  # read word by word, and in vectors
def test_gae_splits_few_long_rows_and_gets_the_bits_of_whole_rows(kernels, tokens):
    rewards, values, mask, bootstrap = gae_case(3, tokens)
    mask[1, CHUNK - 5 :] = False  # the next value comes from across the border
    few = kernels.gae(rewards, values, mask, bootstrap)
    many = [x.repeat(math.ceil(MANY_ROWS / 3), *[1] * (x.dim() - 1)) for x in (rewards, values, mask, bootstrap)]
    launches = kernels.launches() if isinstance(kernels, EmulatedKernels) else 0
    whole = kernels.gae(*many)
    assert all(same_bits(a, b[:3]) for a, b in zip(few, whole, strict=True))
    if isinstance(kernels, EmulatedKernels):
        assert kernels.launches() == launches + 1
        kernels.gae(rewards, values, mask, bootstrap)
        assert kernels.launches() == launches + 4


@pytest.mark.parametrize("tokens", [57, 64, CHUNK + 7])
@pytest.mark.parametrize("garbage", [math.nan, 1e30, -math.inf])
def test_gae_is_not_changed_by_what_lies_outside_the_mask(kernels, tokens, garbage):
    rewards, values, mask, bootstrap = gae_case(5, tokens)
    mask[3], mask[4] = False, True
    clean = kernels.gae(rewards, values, mask, bootstrap)
    rewards[~mask] = values[~mask] = garbage
    for a, b in zip(clean, kernels.gae(rewards, values, mask, bootstrap), strict=True):
        assert same_bits(a, b)
        assert (a[~mask] == 0).all()


@pytest.mark.parametrize(("gamma", "lam"), [(0.0, 0.9), (0.9, 0.0), (1.0, 1.0), (0.0, 0.0), (1.0, 0.0)])
def test_gae_at_the_ends_of_its_parameters(kernels, gamma, lam):
    rewards, values, mask, bootstrap = gae_case(4, 300, torch.float64)
    got = kernels.gae(rewards, values, mask, bootstrap, gamma, lam)
    for g, e in zip(got, gae_by_definition(rewards, values, mask, gamma, lam, bootstrap), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


def test_gae_spreads_nan_and_infinity_to_the_tokens_before_only(kernels):
    rewards, values, mask, _ = gae_case(2, 700, density=2.0)
    clean = kernels.gae(rewards, values, mask)[0]
    rewards[0, 300], rewards[1, 300] = math.nan, math.inf
    got = kernels.gae(rewards, values, mask)[0]
    assert got[0, :301].isnan().all()
    assert (got[1, :301] == math.inf).all()
    assert same_bits(got[:, 301:], clean[:, 301:])


def test_gae_takes_any_strides(kernels):
    rewards, values, mask, bootstrap = gae_case(12, 36)
    expected = kernels.gae(rewards, values, mask, bootstrap)
    strided = [kernels.put(t.t().contiguous()).t() for t in (rewards, values, mask)]
    every_second = kernels.put(torch.stack([bootstrap, bootstrap], 1).flatten())[::2]
    shifted = [kernels.put(torch.cat([t[:1, :1].expand(12, 1), t], 1))[:, 1:] for t in (rewards, values, mask)]
    flat = [kernels.put(torch.cat([t.flatten()[:1], t.flatten()]))[1:].view(12, 36) for t in (rewards, values, mask)]
    for tensors in (strided, shifted, flat):
        got = kernels.gae(*tensors, every_second)
        assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
