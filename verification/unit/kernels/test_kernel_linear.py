"""`rlhf_kernels.linear`: the product, that each of its elements stands alone, and what is computed on the way to it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from rlhf_core.numerics import cpu_flags
from rlhf_kernels import gelu, layer_norm, linear, products, rms_norm, silu
from rlhf_kernels.dense import GELU, SILU, Norm
from rlhf_kernels.products import available, linear_between, multiplies, multiply, multiply_widened

pytestmark = pytest.mark.skipif(not available(), reason="this processor has no fused multiply-add")

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


def one_after_the_other(a, b, start):
    """Σ_k a[m, k] b[k, n], rounded to float32 after each k: a float64 product of float32 numbers is exact."""
    total = np.broadcast_to(np.asarray(start, np.float32), (a.shape[0], b.shape[1]))
    for k in range(a.shape[1]):
        total = (a[:, k : k + 1].astype(np.float64) * b[k : k + 1].astype(np.float64) + total).astype(np.float32)
    return torch.from_numpy(np.array(total))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 700, 5), (30, 17, 33), (65, 390, 64), (100, 5, 300), (2, 0, 3)])
def test_every_element_is_added_up_in_the_order_of_the_inner_index(shape):
    x, weight = matrices(*shape)
    bias, residual = torch.linspace(-1, 1, shape[2]), torch.linspace(-9, 9, shape[0] * shape[2]).view(shape[::2])
    expected = one_after_the_other(x.numpy(), weight.t().numpy(), bias.numpy())
    assert torch.equal(multiply(x, weight.t(), bias), expected)
    assert torch.equal(multiply(x, weight.t(), bias, residual_MN=residual), residual + expected)
    out = residual.clone()
    assert multiply(x, weight.t(), out_MN=out, add=True) is out
    assert torch.equal(out, one_after_the_other(x.numpy(), weight.t().numpy(), residual.numpy()))


@given(rows=st.integers(1, 40), inner=widths, columns=widths, data=st.data())
def test_how_matrices_lie_in_memory_changes_no_bit(rows, inner, columns, data):
    a, b = matrices(rows, inner, columns)
    expected = multiply(a, b.t())
    layouts = {
        "rows": lambda x: x.contiguous(),
        "columns": lambda x: x.t().contiguous().t(),
        "gaps": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], dim=1)[:, : x.shape[1]],
        "strides": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=2)[:, :, 0],
    }
    names = st.sampled_from(sorted(layouts))
    left, right, out = layouts[data.draw(names)](a), layouts[data.draw(names)](b.t()), torch.zeros(rows, columns + 3)
    assert torch.equal(multiply(left, right, out_MN=out[:, 1:-2]), expected)
    assert torch.equal(out[:, 1:-2], expected)
    assert not out[:, [0, -2, -1]].any()  # and nothing else is written


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


BETWEEN = {
    "nothing": (None, 0, lambda x: x),
    "gelu": (GELU, 0, gelu),
    "silu": (SILU, 0, silu),
    "layer norm": (Norm(1e-5, centered=True), 2, layer_norm),
    "rms norm": (Norm(1e-6, centered=False), 1, rms_norm),
}


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("frozen", [None, "x", "weight"])
def test_what_is_computed_again_has_the_bits_of_what_is_kept(name, frozen):
    before, count, function = BETWEEN[name]
    values = *matrices(37, 50, 19), torch.linspace(-1, 1, 19), torch.randn(37, 19), torch.rand(50), torch.rand(50)
    results = []
    for kept in (False, True):
        x, weight, bias, residual, *parameters = (value.clone().requires_grad_() for value in values)
        parameters = tuple(parameters[:count])
        if frozen is not None:
            {"x": x, "weight": weight}[frozen].requires_grad_(False)
        if kept:
            y = residual + linear(function(x, *parameters), weight, bias)
        else:
            y = linear_between(x, weight, bias, before=before, parameters=parameters, residual=residual)
        y.square().sum().backward()
        results.append([y.detach(), *(one.grad for one in (x, weight, bias, residual, *parameters))])
    for again, once in zip(*results, strict=True):
        assert (again is None) == (once is None)
        assert again is None or torch.equal(again, once)


def test_what_goes_into_the_product_is_not_kept_for_the_backward_pass():
    x, weight = (one.requires_grad_() for one in matrices(64, 32, 16))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        linear_between(x, weight, None, before=GELU)
    assert {tensor.data_ptr() for tensor in saved} == {x.data_ptr(), weight.data_ptr()}


def test_the_reference_backend_turns_the_native_product_off(monkeypatch):
    x, weight = matrices(3, 4, 5)
    assert multiplies(x, weight)
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "reference")
    assert not multiplies(x, weight)
    assert torch.equal(linear(x, weight), functional.linear(x, weight))


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
def test_other_dtypes_are_torchs_own(dtype, monkeypatch):
    monkeypatch.setattr(products, "widens", lambda: False)
    x, weight = (one.to(dtype) for one in matrices(6, 8, 5))
    assert torch.equal(linear(x, weight), functional.linear(x, weight))


def test_autocast_is_torchs_own_where_torch_multiplies_bfloat16_fast(monkeypatch):
    monkeypatch.setattr(products, "widens", lambda: False)
    x, weight = matrices(6, 8, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight), functional.linear(x, weight))


class TestBfloat16AsFloat32:
    """Where torch has no fast way to products of bfloat16."""

    @pytest.fixture(autouse=True)
    def _without_the_instruction(self, monkeypatch):
        monkeypatch.setattr(products, "widens", lambda: True)

    @pytest.mark.parametrize("shape", [(1, 1, 1), (6, 8, 5), (33, 96, 257), (3, 40, 2500), (0, 4, 3), (4, 0, 3)])
    @pytest.mark.parametrize("turned", [False, True])
    def test_is_the_product_of_float32_rounded(self, shape, turned):
        x, weight = (one.bfloat16() for one in matrices(*shape))
        weight = weight.t().contiguous().t() if turned else weight
        bias = torch.linspace(-1, 1, shape[2]).bfloat16()
        expected = one_after_the_other(x.float().numpy(), weight.float().t().numpy(), bias.float().numpy())
        found = linear(x, weight, bias)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected.bfloat16())

    @pytest.mark.parametrize("turned", [False, True])
    @pytest.mark.parametrize("shape", [(6, 8, 5), (40, 96, 2100)])
    def test_gradients_are_those_of_float64_rounded(self, shape, turned):
        x, weight = (one.bfloat16() for one in matrices(*shape))
        weight = (weight.t().contiguous().t() if turned else weight).requires_grad_()
        x, bias = x.view(2, -1, shape[1]).requires_grad_(), torch.linspace(-1, 1, shape[2]).bfloat16().requires_grad_()
        upstream = torch.randn(2, shape[0] // 2, shape[2], generator=torch.Generator().manual_seed(7)).bfloat16()
        found = torch.autograd.grad(linear(x, weight, bias), (x, weight, bias), upstream)
        wide = [one.detach().double().requires_grad_() for one in (x, weight, bias)]
        expected = torch.autograd.grad(functional.linear(*wide), wide, upstream.double())
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == torch.bfloat16
            torch.testing.assert_close(one.double(), other, rtol=2**-8, atol=1e-4)
        assert found[1].stride() == weight.stride()

    def test_autocast_rounds_the_numbers_first_with_and_without_a_gradient(self):
        x, weight = (one.requires_grad_() for one in matrices(12, 40, 2100))
        with torch.autocast("cpu", torch.bfloat16):
            learned = linear(x, weight)
            with torch.no_grad():
                read = linear(x, weight)
        assert torch.equal(learned, linear(x.bfloat16(), weight.bfloat16()))
        assert torch.equal(read, learned)
        grads = torch.autograd.grad(learned.float().square().sum(), (x, weight))
        with torch.autocast("cpu", torch.bfloat16):
            torchs = torch.autograd.grad(functional.linear(x, weight).float().square().sum(), (x, weight))
        for one, other in zip(grads, torchs, strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-5 * float(other.abs().max()) / 8)

    def test_a_row_has_its_bits_alone_and_with_any_number_of_threads(self, threads):
        x, weight = (one.bfloat16() for one in matrices(64, 300, 1500))
        threads(1)
        whole = linear(x, weight)
        assert torch.equal(linear(x[5:6], weight), whole[5:6])
        threads(4)
        assert torch.equal(linear(x, weight), whole)

    def test_float32_sums_are_added_to_unrounded(self):
        a, b = (one.bfloat16() for one in matrices(6, 8, 5))
        out = torch.full((6, 5), 1 / 3)
        multiply_widened(a, b.t(), out_MN=out, add=True)
        assert torch.equal(out, one_after_the_other(a.float().numpy(), b.float().t().numpy(), np.float32(1 / 3)))

    def test_autocast_to_float16_and_the_reference_backend_are_torchs_own(self, monkeypatch):
        x, weight = matrices(6, 8, 5)
        with torch.autocast("cpu", torch.float16):
            for one, other in ((x, weight), (x.bfloat16(), weight.bfloat16())):
                assert linear(one, other).dtype == torch.float16
                assert torch.equal(linear(one, other), functional.linear(one, other))
        monkeypatch.setenv("RLHF_KERNELS_BACKEND", "reference")
        assert torch.equal(linear(x.bfloat16(), weight.bfloat16()), functional.linear(x.bfloat16(), weight.bfloat16()))


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="this system does not list the processor's features")
def test_bfloat16_is_widened_on_a_processor_without_instructions_for_it():
    if cpu_flags() & {"avx512_bf16", "avx_ne_convert"}:
        assert not products.widens()
    elif "avx512bw" not in cpu_flags():
        assert products.widens() is products.available()
    else:
        pytest.skip("torch has a way of its own for AVX-512 without these instructions, and may say so or not")


def test_bfloat16_is_widened_where_torch_does_not_say_what_it_can(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert products.widens.__wrapped__() is products.available()


def test_a_second_derivative_is_refused():
    x, weight = (one.requires_grad_() for one in matrices(6, 8, 5))
    (grad,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_widths_that_do_not_fit_are_refused():
    x, weight = matrices(6, 8, 5)
    with pytest.raises(RuntimeError):
        linear(x[:, :7], weight)
