"""`rlhf_kernels.linear`: the product, and that each of its rows stands alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from rlhf_kernels import linear
from rlhf_kernels.products import available

pytestmark = pytest.mark.skipif(not available(), reason="this torch has no oneDNN")

widths = st.sampled_from([1, 2, 3, 7, 16, 33, 96, 257, 384])


def matrices(rows, inner, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, inner, generator=generator), torch.randn(columns, inner, generator=generator)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@given(rows=st.integers(1, 40), inner=widths, columns=widths)
def test_is_the_product_of_float64(rows, inner, columns):
    x, weight = matrices(rows, inner, columns)
    bias = torch.linspace(-1, 1, columns)
    expected = functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(linear(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5 * inner**0.5)


@given(rows=st.integers(2, 200), inner=widths, columns=widths, data=st.data())
def test_a_row_has_the_same_bits_whatever_rows_stand_beside_it(rows, inner, columns, data):
    x, weight = matrices(rows, inner, columns)
    whole = linear(x, weight)
    some = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=5))
    assert torch.equal(linear(x[some], weight), whole[some])
    assert torch.equal(linear(x[some[0]], weight), whole[some[0]])  # a vector


@given(rows=st.integers(1, 60), inner=widths, columns=widths)
def test_has_the_same_bits_however_the_weight_lies_in_memory(rows, inner, columns):
    x, weight = matrices(rows, inner, columns)
    assert torch.equal(linear(x, weight.t().contiguous().t()), linear(x, weight))


@pytest.mark.parametrize("shape", [(640, 384, 1152), (129, 96, 256), (7, 33, 1), (1, 384, 96), (448, 257, 2)])
def test_product_and_gradients_have_the_same_bits_for_any_number_of_threads(threads, shape):
    results = []
    for count in (1, 2, 4):
        threads(count)
        x, weight = (one.requires_grad_() for one in matrices(*shape))
        bias = torch.zeros(shape[2], requires_grad=True)
        out = linear(x, weight, bias)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out.detach(), x.grad, weight.grad, bias.grad])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_threads_would_show_in_a_sum_that_is_split(threads):
    x = torch.randn(300_001, generator=torch.Generator().manual_seed(0))
    sums = set()
    for count in (1, 2, 3, 4):
        threads(count)
        sums.add(x.sum().item())
    assert len(sums) > 1


def test_gradients_are_those_of_torch():
    x, weight = (one.double().requires_grad_() for one in matrices(9, 16, 5))
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    functional.linear(x, weight, bias).square().sum().backward()
    got = [one.detach().float().requires_grad_() for one in (x, weight, bias)]
    linear(*got).square().sum().backward()
    for ours, theirs in zip(got, (x, weight, bias), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


def test_what_needs_no_gradient_gets_none():
    x, weight = matrices(4, 6, 3)
    linear(x.requires_grad_(), weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (2, 0, 3)])
def test_empty_matrices_are_what_they_are_in_torch(shape):
    x, weight = matrices(*shape)
    assert torch.equal(linear(x, weight), functional.linear(x, weight))


def test_leading_dimensions_are_kept():
    x, weight = matrices(12, 8, 5)
    assert torch.equal(linear(x.view(3, 4, 8), weight), linear(x, weight).view(3, 4, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs_own(dtype):
    x, weight = (one.to(dtype) for one in matrices(6, 8, 5))
    assert torch.equal(linear(x, weight), functional.linear(x, weight))


def test_autocast_is_torchs_own():
    x, weight = matrices(6, 8, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


def test_a_second_derivative_is_refused():
    x, weight = (one.requires_grad_() for one in matrices(6, 8, 5))
    (grad,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_widths_that_do_not_fit_are_refused():
    x, weight = matrices(6, 8, 5)
    with pytest.raises(RuntimeError):
        linear(x[:, :7], weight)
