import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracles import gae_by_definition, same_bits

from rlhf_kernels import gae


def random_case(batch, tokens, dtype=torch.float32, density=0.7):
    rewards, values = torch.randn(batch, tokens, dtype=dtype), torch.randn(batch, tokens, dtype=dtype)
    return rewards, values, torch.rand(batch, tokens) < density, torch.randn(batch, dtype=dtype)


def test_gives_the_literal_numbers_of_the_design(backend):
    advantages, returns = gae(
        torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
        torch.tensor([[0.5, 0.25, 100.0], [0.5, 7.0, 0.25]]),
        torch.tensor([[True, True, False], [True, False, True]]),
        gamma=1.0,
        lam=0.95,
        backend=backend,
    )
    torch.testing.assert_close(advantages, torch.tensor([[0.4625, 0.75, 0.0], [0.4625, 0.0, 0.75]]))
    torch.testing.assert_close(returns, torch.tensor([[0.9625, 1.0, 0.0], [0.9625, 0.0, 1.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("batch", "tokens"), [(41, 401), (3, 1271), (1, 1), (5, 1), (1, 17), (2, 0), (0, 7), (2000, 20)]
)
@pytest.mark.parametrize("with_bootstrap", [False, True])
def test_equals_the_sum_of_discounted_residuals(backend, batch, tokens, dtype, with_bootstrap):
    rewards, values, mask, bootstrap = random_case(batch, tokens, dtype)
    bootstrap = bootstrap if with_bootstrap else None
    got = gae(rewards, values, mask, gamma=0.99, lam=0.9, bootstrap=bootstrap, backend=backend)
    expected = gae_by_definition(rewards, values, mask, 0.99, 0.9, bootstrap)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_token", ["gamma", "lam", "both", "a row", "one"])
def test_gamma_and_lambda_may_differ_by_token(backend, dtype, per_token):
    rewards, values, mask, bootstrap = random_case(19, 45, dtype)
    shape = {"a row": (19, 1), "one": ()}.get(per_token, (19, 45))
    gamma = 0.99 if per_token == "lam" else torch.rand(shape, dtype=dtype)
    lam = 0.9 if per_token == "gamma" else torch.rand(shape, dtype=dtype)
    got = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap, backend=backend)
    expected = gae_by_definition(rewards, values, mask, gamma, lam, bootstrap)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=tolerance)


def test_equal_gammas_give_the_bits_of_one_number(backend):
    rewards, values, mask, _ = random_case(21, 50)
    one = gae(rewards, values, mask, gamma=0.5, lam=0.75, backend=backend)
    each = gae(rewards, values, mask, gamma=torch.full((21, 50), 0.5), lam=torch.tensor(0.75), backend=backend)
    assert all(same_bits(a, b) for a, b in zip(one, each, strict=True))


def test_an_end_inside_a_row_is_a_gamma_of_zero(backend):
    """Two packed sequences are what they are alone."""
    rewards, values, mask, _ = random_case(3, 30, density=2.0)
    gamma = torch.full((3, 30), 0.9)
    gamma[:, 11] = 0.0
    packed, _ = gae(rewards, values, mask, gamma=gamma, lam=0.8, backend=backend)
    for part in (slice(0, 12), slice(12, 30)):
        alone, _ = gae(rewards[:, part], values[:, part], mask[:, part], gamma=gamma[:, part], lam=0.8, backend=backend)
        assert same_bits(packed[:, part], alone)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16])
def test_a_mask_of_zeros_and_ones_is_a_mask(backend, dtype):
    rewards, values, mask, _ = random_case(5, 9)
    expected = gae(rewards, values, mask, gamma=0.9, lam=0.8, backend=backend)
    got = gae(rewards, values, mask.to(dtype), gamma=0.9, lam=0.8, backend=backend)
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("batch", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 1024])
def test_a_row_does_not_depend_on_the_rows_beside_it(backend, batch, tokens):
    rewards, values, mask, bootstrap = random_case(batch, tokens)
    together = gae(rewards, values, mask, gamma=0.99, lam=0.95, bootstrap=bootstrap, backend=backend)
    for b in (0, batch // 2, batch - 1):
        one = slice(b, b + 1)
        alone = gae(
            rewards[one], values[one], mask[one], gamma=0.99, lam=0.95, bootstrap=bootstrap[one], backend=backend
        )
        assert all(same_bits(a, t[one]) for a, t in zip(alone, together, strict=True))


@pytest.mark.parametrize("garbage", [math.nan, 1e30, -math.inf])
def test_what_lies_outside_the_mask_changes_no_bit(backend, garbage):
    rewards, values, mask, bootstrap = random_case(23, 57)
    mask[3], mask[4] = False, True
    clean = gae(rewards, values, mask, gamma=0.99, lam=0.95, bootstrap=bootstrap, backend=backend)
    gammas, lams = torch.rand(2, 23, 57)
    each = gae(rewards, values, mask, gamma=gammas, lam=lams, backend=backend)
    rewards[~mask] = values[~mask] = gammas[~mask] = lams[~mask] = garbage
    same = gae(rewards, values, mask, gamma=gammas, lam=lams, backend=backend)
    assert all(same_bits(a, b) for a, b in zip(each, same, strict=True))
    dirty = gae(rewards, values, mask, gamma=0.99, lam=0.95, bootstrap=bootstrap, backend=backend)
    for a, b in zip(clean, dirty, strict=True):
        assert same_bits(a, b)
        assert (a[~mask] == 0).all()


def test_returns_are_advantages_plus_values_to_the_bit(backend):
    rewards, values, mask, _ = random_case(31, 63)
    advantages, returns = gae(rewards, values, mask, gamma=0.97, lam=0.9, backend=backend)
    assert same_bits(returns[mask], (advantages + values)[mask])


def test_takes_non_contiguous_tensors(backend):
    rewards, values, mask, bootstrap = random_case(12, 34)
    expected = gae(rewards, values, mask, gamma=0.99, lam=0.95, bootstrap=bootstrap, backend=backend)
    strided = [t.t().contiguous().t() for t in (rewards, values, mask)]
    every_second = torch.stack([bootstrap, bootstrap], 1).flatten()[::2]
    got = gae(*strided, gamma=0.99, lam=0.95, bootstrap=every_second, backend=backend)
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 30), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_padding_and_the_order_of_rows_change_no_bit(batch, tokens, padding, seed):
    torch.manual_seed(seed)
    rewards, values, mask, bootstrap = random_case(batch, tokens)
    advantages, _ = gae(rewards, values, mask, gamma=0.99, lam=0.95, bootstrap=bootstrap)
    left, right = torch.full((batch, padding), math.nan), torch.full((batch, 3), 1e30)
    no, never = torch.zeros(batch, padding, dtype=torch.bool), torch.zeros(batch, 3, dtype=torch.bool)
    order = torch.randperm(batch)
    padded, _ = gae(
        torch.cat([left, rewards, right], 1)[order],
        torch.cat([left, values, right], 1)[order],
        torch.cat([no, mask, never], 1)[order],
        gamma=0.99,
        lam=0.95,
        bootstrap=bootstrap[order],
    )
    assert same_bits(padded[:, padding : padding + tokens], advantages[order])


@given(st.integers(1, 50), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_with_lambda_one_the_return_is_the_discounted_sum_of_rewards(tokens, seed):
    torch.manual_seed(seed)
    rewards, values, mask, _ = random_case(1, tokens, torch.float64, density=2.0)
    _, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    expected = sum(0.9**t * float(r) for t, r in enumerate(rewards[0]))
    assert math.isclose(float(returns[0, 0]), expected, rel_tol=1e-9, abs_tol=1e-9)


def test_refuses_bad_arguments_by_name(backend):
    r, v, m, b = random_case(2, 3)
    with pytest.raises(ValueError, match=r"values must have shape \(2, 3\), got \(2, 2\)"):
        gae(r, v[:, :2], m, gamma=1.0, lam=1.0, backend=backend)
    with pytest.raises(ValueError, match="2 dimensions"):
        gae(r[0], v[0], m[0], gamma=1.0, lam=1.0, backend=backend)
    with pytest.raises(ValueError, match=r"mask is 0\.5 at position \(1, 2\); it must be 0 or 1"):
        gae(r, v, torch.tensor([[1, 0, 1], [1, 1, 0.5]]), gamma=1.0, lam=1.0, backend=backend)
    with pytest.raises(ValueError, match=r"gamma must expand to shape \(2, 3\), got \(2, 4\)"):
        gae(r, v, m, gamma=torch.ones(2, 4), lam=1.0, backend=backend)
    with pytest.raises(TypeError, match=r"lam must be torch\.float32, got torch\.float64"):
        gae(r, v, m, gamma=1.0, lam=torch.ones(2, 3).double(), backend=backend)
    every = torch.ones_like(m)
    with pytest.raises(ValueError, match=r"lam is 1\.5 at position \(0, 1\); it must be in \[0, 1\]"):
        gae(r, v, every, gamma=1.0, lam=torch.tensor([[0.0, 1.5, 1.0]]), backend=backend)
    with pytest.raises(ValueError, match=r"gamma is nan at position \(0, 0\)"):
        gae(r, v, every, gamma=torch.tensor(math.nan), lam=1.0, backend=backend)
    with pytest.raises(RuntimeError, match="no gradient: pass detached"):
        gae(r, v, m, gamma=torch.ones(2, 3, requires_grad=True), lam=1.0, backend=backend)
    with pytest.raises(TypeError, match=r"got torch\.float16"):
        gae(r.half(), v.half(), m, gamma=1.0, lam=1.0, backend=backend)
    with pytest.raises(ValueError, match="bootstrap must have shape"):
        gae(r, v, m, gamma=1.0, lam=1.0, bootstrap=b[:1], backend=backend)
    with pytest.raises(ValueError, match=r"gamma is 1\.5"):
        gae(r, v, m, gamma=1.5, lam=1.0, backend=backend)
    with pytest.raises(ValueError, match="lam is nan"):
        gae(r, v, m, gamma=1.0, lam=math.nan, backend=backend)
    with pytest.raises(RuntimeError, match="no gradient: pass detached"):
        gae(r, v.requires_grad_(), m, gamma=1.0, lam=1.0, backend=backend)
    with torch.no_grad():
        gae(r, v, m, gamma=1.0, lam=1.0, backend=backend)
