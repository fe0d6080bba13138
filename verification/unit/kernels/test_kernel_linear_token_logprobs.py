import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracles import logp_and_entropy, same_bits

from rlhf_kernels import available_backends, linear_token_logprobs, token_logprobs

NATIVE = [name for name in available_backends() if name not in ("reference", "cuda")]
SHAPES = [(7, 5, 11), (41, 17, 401), (1, 1, 1), (4, 3, 1), (0, 8, 9), (3, 64, 4099), (2100, 8, 2050)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def random_case(rows, size, vocabulary, dtype=torch.float32):
    hidden, weight = torch.randn(rows, size), torch.randn(vocabulary, size) / math.sqrt(size)
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, vocabulary, (rows,)), torch.randn(vocabulary).to(dtype)


def exact(hidden, weight, labels, bias, temperature=1.0):
    logits = hidden.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    logp = torch.log_softmax(logits / temperature, -1)
    return logp.gather(-1, labels[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_float64(backend, shape, dtype, with_bias):
    hidden, weight, labels, bias = random_case(*shape, dtype)
    bias = bias if with_bias else None
    got = linear_token_logprobs(hidden, weight, labels, bias=bias, temperature=0.8, with_entropy=True, backend=backend)
    for g, e in zip(got, exact(hidden, weight, labels, bias, 0.8), strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g.double(), e, rtol=TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])
    alone = linear_token_logprobs(hidden, weight, labels, bias=bias, temperature=0.8, backend=backend)
    assert same_bits(alone, got[0])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("used", ["logp", "entropy", "both"])
def test_gradients_equal_float64_autograd(backend, shape, dtype, used):
    inputs = random_case(*shape, dtype)
    labels = inputs[2]
    upstream = torch.randn(2, shape[0])
    gradients = []
    for exactly in (False, True):
        hidden, weight, _, bias = (
            t if t.dtype == torch.int64 else (t.double() if exactly else t.clone()).requires_grad_() for t in inputs
        )
        if exactly:
            logp, entropy = exact(hidden, weight, labels, bias, 0.9)
        else:
            logp, entropy = linear_token_logprobs(
                hidden, weight, labels, bias=bias, temperature=0.9, with_entropy=True, backend=backend
            )
        loss = (logp * upstream[0]).sum() if used != "entropy" else 0.0
        loss = loss + ((entropy * upstream[1]).sum() if used != "logp" else 0.0)
        loss.backward()
        gradients.append((hidden.grad, weight.grad, bias.grad))
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == dtype
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(
            ours.double(), theirs, rtol=TOLERANCE[dtype], atol=8 * TOLERANCE[dtype] * scale + 1e-7
        )


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equal_logits_give_the_bits_of_token_logprobs(name, dtype):
    """Integers make every product exact, whatever its order."""
    hidden, weight = torch.randint(-3, 4, (65, 6)).to(dtype), torch.randint(-3, 4, (5000, 6)).to(dtype)
    labels = torch.randint(0, 5000, (65,))
    got = linear_token_logprobs(hidden, weight, labels, with_entropy=True, temperature=0.7, backend=name)
    expected = token_logprobs(hidden @ weight.T, labels, with_entropy=True, temperature=0.7, backend=name)
    assert all(same_bits(g, e) for g, e in zip(got, expected, strict=True))


def test_takes_leading_dimensions_and_any_strides(backend):
    hidden, weight, labels, bias = random_case(24, 10, 33)
    expected = linear_token_logprobs(hidden, weight, labels, bias=bias, backend=backend)
    folded = linear_token_logprobs(
        hidden.view(2, 3, 4, 10).transpose(0, 2),
        weight.T.contiguous().T,
        labels.view(2, 3, 4).transpose(0, 2),
        bias=torch.stack([bias, bias], 1)[:, 0],
        backend=backend,
    )
    torch.testing.assert_close(folded.transpose(0, 2).reshape(-1), expected)
    one = linear_token_logprobs(hidden[0], weight, labels[0], bias=bias, backend=backend)
    torch.testing.assert_close(one, expected[0])


def test_ignored_rows_change_nothing_whatever_they_hold(backend):
    hidden, weight, labels, bias = random_case(9, 6, 2100)
    labels[2] = labels[5] = -100
    results = []
    for garbage in (0.0, math.nan, math.inf):
        h = hidden.clone()
        h[labels == -100] = garbage
        inputs = [t.clone().requires_grad_() for t in (h, weight, bias)]
        logp, entropy = linear_token_logprobs(
            inputs[0], inputs[1], labels, bias=inputs[2], with_entropy=True, ignore_index=-100, backend=backend
        )
        assert (logp[labels == -100] == 0).all()
        assert (entropy[labels == -100] == 0).all()
        gradients = torch.autograd.grad(logp.sum() + entropy.sum(), inputs)
        assert (gradients[0][labels == -100] == 0).all()
        results.append([logp.detach(), entropy.detach(), *gradients])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
    counted = labels != -100
    expected, _ = exact(hidden[counted], weight, labels[counted], bias)
    torch.testing.assert_close(results[0][0][counted].double(), expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("name", NATIVE)
def test_rows_without_upstream_gradient_reach_no_gradient_whatever_they_hold(name):
    hidden, weight, labels, _ = random_case(6, 5, 40)
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    results = []
    for garbage in (0.5, math.nan):
        h, w = hidden.clone(), weight.clone().requires_grad_()
        h[mask == 0] = garbage
        h.requires_grad_()
        logp = linear_token_logprobs(h, w, labels, backend=name)
        results.append(torch.autograd.grad(logp, [h, w], mask))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert all(g.isfinite().all() for g in results[1])


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [*SHAPES, (50, 96, 2500), (1100, 1040, 30)])
@pytest.mark.parametrize("upstream", ["all rows", "some rows", "the last rows", "none"])
def test_kept_logits_change_no_bit_of_results_and_gradients(name, dtype, shape, upstream):
    inputs = random_case(*shape, dtype)
    rows = torch.arange(shape[0])
    wanted = {"all rows": rows >= 0, "some rows": rows % 3 == 1, "the last rows": rows >= 96, "none": rows < 0}[
        upstream
    ]
    results = []
    for keep in (False, True):
        hidden, weight, labels, bias = (t.clone() for t in inputs)
        learned = [t.requires_grad_() for t in (hidden, weight, bias)]
        logp, entropy = linear_token_logprobs(
            hidden, weight, labels, bias=bias, temperature=0.9, with_entropy=True, keep_logits=keep, backend=name
        )
        loss = (logp * wanted).sum() + (entropy * wanted).sum()
        again = torch.autograd.grad(loss, learned, retain_graph=True)
        results.append([logp.detach(), entropy.detach(), *again])
        assert all(same_bits(a, b) for a, b in zip(torch.autograd.grad(loss, learned), again, strict=True))
    assert all(same_bits(kept, made) for made, kept in zip(*results, strict=True))


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_kept_logits_leave_what_is_frozen_alone(name, frozen):
    hidden, weight, labels, bias = random_case(5, 8, 40)
    inputs = {"hidden": hidden, "weight": weight, "bias": bias}
    gradients = []
    for keep in (False, True):
        h, w, b = (one.clone().requires_grad_(name_of != frozen) for name_of, one in inputs.items())
        logp = linear_token_logprobs(h, w, labels, bias=b, keep_logits=keep, backend=name)
        logp.sum().backward()
        assert {"hidden": h, "weight": w, "bias": b}[frozen].grad is None
        gradients.append([one.grad for one in (h, w, b) if one.grad is not None])
    assert all(same_bits(kept, made) for made, kept in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", NATIVE)
def test_kept_logits_spare_a_product(name, monkeypatch):
    from rlhf_kernels.cpu import logits

    products = []
    product_into = logits.product_into
    monkeypatch.setattr(logits, "product_into", lambda *args: (products.append(args), product_into(*args)))
    hidden, weight, labels, _ = random_case(6, 8, 3000)
    for keep, expected in ((False, 4), (True, 2)):  # of two parts, in the forward and in the backward pass
        products.clear()
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        linear_token_logprobs(h, w, labels, keep_logits=keep, backend=name).sum().backward()
        assert len(products) == expected


def test_only_what_needs_a_gradient_gets_one(backend):
    hidden, weight, labels, bias = random_case(5, 4, 7)
    hidden.requires_grad_()
    linear_token_logprobs(hidden, weight, labels, bias=bias, backend=backend).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    weight.requires_grad_()
    frozen = hidden.detach()
    linear_token_logprobs(frozen, weight, labels, bias=bias, backend=backend).sum().backward()
    assert weight.grad is not None
    assert bias.grad is None


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits_where_the_products_are_exact(name, dtype):
    hidden, weight = torch.randint(-3, 4, (2300, 6)).to(dtype), torch.randint(-3, 4, (4100, 6)).to(dtype)
    labels, results = torch.randint(0, 4100, (2300,)), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        h = hidden.clone().requires_grad_()
        logp, entropy = linear_token_logprobs(h, weight, labels, with_entropy=True, backend=name)
        results.append([logp.detach(), entropy.detach()])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_same_call_gives_the_same_bits(backend):
    hidden, weight, labels, bias = random_case(300, 16, 3000)
    results = []
    for _ in range(3):
        inputs = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        logp = linear_token_logprobs(inputs[0], inputs[1], labels, bias=inputs[2], backend=backend)
        results.append([logp.detach(), *torch.autograd.grad(logp.sin().sum(), inputs)])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_rows_that_are_no_distribution_give_nan_and_leave_the_others(backend):
    hidden, weight, labels, _ = random_case(3, 4, 10)
    clean = linear_token_logprobs(hidden, weight, labels, with_entropy=True, backend=backend)
    hidden[1, 2] = math.nan
    logp, entropy = linear_token_logprobs(hidden, weight, labels, with_entropy=True, backend=backend)
    assert logp.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]
    assert same_bits(logp[::2], clean[0][::2])


def test_a_bias_of_minus_infinity_masks_a_token(backend):
    hidden, weight, labels, bias = random_case(6, 4, 10)
    bias[3], labels[0], labels[1:] = -math.inf, 3, 4
    hidden.requires_grad_()
    logp, entropy = linear_token_logprobs(hidden, weight, labels, bias=bias, with_entropy=True, backend=backend)
    assert float(logp[0].detach()) == -math.inf
    expected = logp_and_entropy((hidden.detach() @ weight.T + bias)[:, [0, 1, 2, 4, 5, 6, 7, 8, 9]], labels - 1)
    torch.testing.assert_close(logp[1:].detach().double(), expected[0][1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.detach().double(), expected[1], rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(logp[1:].sum() + entropy.sum(), hidden)
    assert gradient.isfinite().all()


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 2200), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_the_gradient_of_a_log_probability_moves_the_bias_by_nothing_in_total(rows, size, vocabulary, seed):
    torch.manual_seed(seed)
    hidden, weight, labels, bias = random_case(rows, size, vocabulary)
    bias.requires_grad_()
    linear_token_logprobs(hidden, weight, labels, bias=bias).sum().backward()
    assert float(bias.grad.double().sum()) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("name", NATIVE)
def test_a_second_derivative_is_refused(name):
    hidden, weight, labels, _ = random_case(3, 4, 5)
    hidden.requires_grad_()
    logp = linear_token_logprobs(hidden, weight, labels, backend=name)
    (first,) = torch.autograd.grad(logp.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_token_logprobs has no second derivative; backend='reference'"):
        torch.autograd.grad(first.square().sum(), hidden)


def test_the_reference_is_twice_differentiable():
    hidden, weight, labels, bias = (t if t.dtype == torch.int64 else t.double() for t in random_case(3, 4, 5))
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradgradcheck(
        lambda h, w, b: linear_token_logprobs(h, w, labels, bias=b, with_entropy=True, temperature=0.7), inputs
    )


def test_refuses_bad_arguments_with_value_and_position(backend):
    hidden, weight, labels, bias = random_case(4, 3, 5)
    for value in (5, -1, -100):
        bad = labels.clone()
        bad[2] = value
        with pytest.raises(IndexError, match=rf"label {value} at position \(2,\) is outside \[0, 5\)"):
            linear_token_logprobs(hidden, weight, bad, backend=backend)
    with pytest.raises(ValueError, match=r"weight must have shape \(5, 3\), got \(5, 2\)"):
        linear_token_logprobs(hidden, weight[:, :2], labels, backend=backend)
    with pytest.raises(TypeError, match=r"weight must be torch\.float32, got torch\.bfloat16"):
        linear_token_logprobs(hidden, weight.bfloat16(), labels, backend=backend)
    with pytest.raises(ValueError, match=r"bias must have shape \(5,\), got \(4,\)"):
        linear_token_logprobs(hidden, weight, labels, bias=bias[:4], backend=backend)
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\), got \(3,\)"):
        linear_token_logprobs(hidden, weight, labels[:3], backend=backend)
    with pytest.raises(TypeError, match=r"labels must be torch\.int64"):
        linear_token_logprobs(hidden, weight, labels.int(), backend=backend)
    with pytest.raises(ValueError, match="empty vocabulary"):
        linear_token_logprobs(hidden, weight[:0], labels, backend=backend)
    with pytest.raises(ValueError, match="temperature is 0"):
        linear_token_logprobs(hidden, weight, labels, temperature=0.0, backend=backend)


@pytest.mark.parametrize("name", NATIVE)
def test_opcheck_compile_meta_and_autocast(name):
    hidden, weight, labels, bias = random_case(6, 4, 19)
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    torch.library.opcheck(torch.ops.rlhf_kernels.linear_token_logprobs, (hidden, weight, labels, bias, 0.9, True, -100))

    def loss(h, w, b):
        logp, entropy = linear_token_logprobs(h, w, labels, bias=b, with_entropy=True)
        return (logp + 0.1 * entropy).sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(same_bits(a, b) for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True))
    on_meta = linear_token_logprobs(hidden.to("meta"), weight.to("meta"), labels.to("meta"))
    assert on_meta.shape == (6,)
    assert on_meta.device.type == "meta"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(same_bits(a, b) for a, b in zip(torch.autograd.grad(loss(*inputs), inputs), expected, strict=True))


PEAK = """
import sys, torch, rlhf_kernels
torch.set_num_threads(2)
N, H, V = 2048, 384, 50257
hidden, weight, labels = torch.randn(N, H), torch.randn(V, H), torch.randint(0, V, (N,))
if sys.argv[1] == "backward":
    hidden.requires_grad_(), weight.requires_grad_()
    hidden.grad, weight.grad = torch.zeros(N, H), torch.zeros(V, H)
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
def step(n):
    logp, entropy = rlhf_kernels.linear_token_logprobs(
        hidden[:n], weight, labels[:n], with_entropy=True, keep_logits=sys.argv[2] == "keep")
    if sys.argv[1] == "backward":
        (logp.sum() + entropy.sum()).backward()
small = weight[:64]
rlhf_kernels.linear_token_logprobs(hidden[:8], small, labels[:8] % 64, with_entropy=True)  # threads and libraries
before = peak()
step(N)
print((peak() - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif("cython" not in available_backends(), reason="the Cython kernels are not built")
@pytest.mark.parametrize(("what", "limit_mib"), [("forward", 64), ("backward", 64 + 50257 * 384 * 4 / 2**20)])
@pytest.mark.parametrize("keep", ["keep", "make again"])
def test_the_extra_peak_memory_is_a_part_of_the_logits(what, limit_mib, keep):
    """The logits alone would take 393 MiB. The backward pass also returns the weight's gradient, of 74 MiB."""
    source = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, what, keep],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert float(done.stdout) < limit_mib
