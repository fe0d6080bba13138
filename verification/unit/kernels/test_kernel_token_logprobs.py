import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracles import logp_and_entropy, same_bits

from rlhf_kernels import available_backends, token_logprobs

SHAPES = [(41, 401), (3, 1271), (1, 1), (6, 1), (0, 5), (2, 3, 17), (4, 2048), (4, 2049), (2, 50257), (5, 16), (5, 15)]
NATIVE = [name for name in available_backends() if name not in ("reference", "cuda")]


def random_case(shape, dtype=torch.float32, scale=4.0):
    logits = (torch.randn(shape) * scale).to(dtype)
    return logits, torch.randint(0, shape[-1], shape[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_equals_float64(backend, shape, dtype, temperature):
    logits, labels = random_case(shape, dtype)
    logp, entropy = token_logprobs(logits, labels, temperature=temperature, with_entropy=True, backend=backend)
    expected_logp, expected_entropy = logp_and_entropy(logits, labels, temperature)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp.double(), expected_logp, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=2e-6, atol=2e-5)
    alone = token_logprobs(logits, labels, temperature=temperature, backend=backend)
    assert same_bits(alone, logp)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize(("rows", "vocabulary", "scale"), [(64, 50257, 3.0), (512, 258, 3.0), (64, 8192, 20.0)])
def test_native_error_is_no_larger_than_torchs_own(name, rows, vocabulary, scale):
    logits, labels = random_case((rows, vocabulary), scale=scale)
    logp, entropy = token_logprobs(logits, labels, with_entropy=True, backend=name)
    exact_logp, exact_entropy = logp_and_entropy(logits, labels)
    torch_all = torch.log_softmax(logits, -1)
    torch_logp = torch_all.gather(-1, labels[:, None])[:, 0]
    torch_entropy = -(torch_all.exp() * torch_all).sum(-1)
    assert (logp - exact_logp).abs().max() <= (torch_logp - exact_logp).abs().max()
    assert (entropy - exact_entropy).abs().max() <= (torch_entropy - exact_entropy).abs().max()


def test_a_uniform_row_has_the_logarithm_of_its_size(backend):
    for size in (1, 2, 7, 1000, 32000):
        logp, entropy = token_logprobs(torch.zeros(1, size), torch.tensor([0]), with_entropy=True, backend=backend)
        assert float(logp) == pytest.approx(-math.log(size), rel=1e-6, abs=0)
        assert float(entropy) == pytest.approx(math.log(size), rel=2e-6, abs=0)


def test_a_vocabulary_of_one_is_certain(backend):
    logp, entropy = token_logprobs(torch.tensor([[-7.0]]), torch.tensor([0]), with_entropy=True, backend=backend)
    assert logp.tolist() == [0.0]
    assert entropy.tolist() == [0.0]


def test_large_logits_lose_nothing(backend):
    logits = torch.tensor([[1e4, 1e4 + 1, 1e4 - 2], [-3e38, 3e38, 0.0], [1e-30, 0.0, -1e-30]])
    labels = torch.tensor([0, 1, 2])
    got = token_logprobs(logits, labels, with_entropy=True, backend=backend)
    for g, e in zip(got, logp_and_entropy(logits, labels), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-6, atol=1e-6)


def test_a_logit_of_minus_infinity_is_a_token_of_no_probability(backend):
    logits = torch.randn(3, 40)
    logits[:, 5:30] = -math.inf
    logits = logits.requires_grad_()
    labels = torch.tensor([0, 39, 10])  # the last label is a masked token
    logp, entropy = token_logprobs(logits, labels, with_entropy=True, backend=backend)
    without = torch.cat([logits[:, :5], logits[:, 30:]], 1).detach()
    expected_logp, expected_entropy = logp_and_entropy(without, torch.tensor([0, 14, 0]))
    torch.testing.assert_close(logp[:2].double(), expected_logp[:2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-6, atol=1e-6)
    assert logp[2].item() == -math.inf
    (gradient,) = torch.autograd.grad(logp[:2].sum() + entropy.sum(), logits)
    assert gradient.isfinite().all()
    assert (gradient[:, 5:30] == 0).all()


def test_rows_that_are_no_distribution_give_nan_and_leave_the_others(backend):
    logits = torch.randn(5, 3000)
    clean = token_logprobs(logits, torch.zeros(5, dtype=torch.int64), with_entropy=True, backend=backend)
    logits[0, 2999], logits[1, 17], logits[2] = math.nan, math.inf, -math.inf
    logits = logits.requires_grad_()
    logp, entropy = token_logprobs(logits, torch.zeros(5, dtype=torch.int64), with_entropy=True, backend=backend)
    assert logp[:3].isnan().all()
    assert entropy[:3].isnan().all()
    assert same_bits(logp[3:].detach(), clean[0][3:])
    assert same_bits(entropy[3:].detach(), clean[1][3:])
    (gradient,) = torch.autograd.grad(logp.sum(), logits)
    assert gradient[:3].isnan().all()
    assert gradient[3:].isfinite().all()


def test_ignored_rows_give_zero_and_no_gradient_whatever_they_hold(backend):
    logits, labels = random_case((6, 33))
    logits[2], logits[4] = math.nan, math.inf
    labels[2] = labels[4] = -100
    logits = logits.requires_grad_()
    logp, entropy = token_logprobs(logits, labels, with_entropy=True, ignore_index=-100, backend=backend)
    ignored = labels == -100
    assert (logp[ignored] == 0).all()
    assert (entropy[ignored] == 0).all()
    (gradient,) = torch.autograd.grad(logp.sum() + entropy.sum(), logits)
    assert (gradient[ignored] == 0).all()
    rest, _ = logp_and_entropy(logits.detach()[~ignored], labels[~ignored])
    torch.testing.assert_close(logp[~ignored].double(), rest, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :-1],
        lambda x: x[:, 1:, 3:90],
        lambda x: x.transpose(0, 1),
        lambda x: x[::2, ::3],
        lambda x: x.transpose(1, 2),
        lambda x: x[..., ::2],
        lambda x: x[1],
        lambda x: x[1, 2],
        lambda x: x[:1].expand(3, -1, -1),
        lambda x: x.unflatten(1, (4, 3)).transpose(0, 2),
    ],
)
def test_reads_any_strides_and_returns_the_gradient_in_place(backend, view):
    logits = view(torch.randn(4, 12, 100)).detach().requires_grad_()
    labels = torch.randint(0, logits.shape[-1], logits.shape[:-1])
    dense = logits.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    results = []
    for x in (logits, dense):
        logp, entropy = token_logprobs(x, labels, with_entropy=True, backend=backend)
        (logp.sin().sum() + entropy.cos().sum()).backward()
        results.append((logp.detach(), entropy.detach(), x.grad))
    for strided, contiguous in zip(*results, strict=True):
        if backend == "reference":
            torch.testing.assert_close(strided, contiguous)
        else:
            assert same_bits(strided, contiguous)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_reference_gradient_is_exact(with_entropy):
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 6, -100])
    assert torch.autograd.gradcheck(
        lambda x: token_logprobs(
            x, labels, temperature=0.8, with_entropy=with_entropy, ignore_index=-100, backend="reference"
        ),
        logits,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(41, 401), (3, 1271), (7, 1), (0, 4), (2, 3, 17), (3, 50257)])
@pytest.mark.parametrize("used", ["logp", "entropy", "both"])
def test_native_gradient_equals_float64_autograd(backend, shape, dtype, used):
    logits, labels = random_case(shape, dtype, scale=2.0)
    weight_logp, weight_entropy = torch.randn(shape[:-1]), torch.randn(shape[:-1])
    gradients = []
    for x, source in ((logits.clone(), backend), (logits.double(), "autograd")):
        x.requires_grad_()
        if source == "autograd":
            all_logp = torch.log_softmax(x / 0.9, -1)
            logp, entropy = all_logp.gather(-1, labels[..., None])[..., 0], -(all_logp.exp() * all_logp).sum(-1)
        else:
            logp, entropy = token_logprobs(x, labels, temperature=0.9, with_entropy=True, backend=backend)
        loss = (logp * weight_logp).sum() if used != "entropy" else 0.0
        loss = loss + ((entropy * weight_entropy).sum() if used != "logp" else 0.0)
        loss.backward()
        gradients.append(x.grad.double())
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=max(2e-6, tolerance * 2**-6))


@pytest.mark.parametrize("name", NATIVE)
def test_rows_without_upstream_gradient_are_not_read_again(name):
    logits, labels = random_case((4, 300))
    logits[1] = math.nan
    logits.requires_grad_()
    logp = token_logprobs(logits, labels, backend=name)
    (gradient,) = torch.autograd.grad(logp, logits, torch.tensor([1.0, 0.0, 0.0, 2.0]))
    assert (gradient[1:3] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", NATIVE)
def test_a_second_derivative_is_refused_by_the_native_kernel_and_given_by_the_reference(name):
    logits, labels = random_case((2, 5))
    logits.requires_grad_()
    (first,) = torch.autograd.grad(token_logprobs(logits, labels, backend="reference").sum(), logits, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), logits)[0].isfinite().all()
    (first,) = torch.autograd.grad(token_logprobs(logits, labels, backend=name).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="token_logprobs has no second derivative"):
        torch.autograd.grad(first.square().sum(), logits)


@given(st.integers(1, 5), st.integers(1, 200), st.integers(-40, 40), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_adding_a_constant_to_the_logits_changes_no_bit_where_the_sum_is_exact(rows, vocabulary, shift, seed):
    torch.manual_seed(seed)
    logits = torch.randint(-64, 64, (rows, vocabulary)) / 8.0
    labels = torch.randint(0, vocabulary, (rows,))
    before = token_logprobs(logits, labels, with_entropy=True, temperature=0.6)
    after = token_logprobs(logits + float(shift), labels, with_entropy=True, temperature=0.6)
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))


@given(st.integers(1, 20), st.integers(1, 3000), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_a_row_does_not_depend_on_the_rows_beside_it(rows, vocabulary, seed):
    torch.manual_seed(seed)
    logits, labels = random_case((rows, vocabulary))
    logits.requires_grad_()
    order = torch.randperm(rows)
    logp, entropy = token_logprobs(logits, labels, with_entropy=True)
    (gradient,) = torch.autograd.grad(logp.sum() + entropy.sum(), logits)
    moved = logits.detach()[order].requires_grad_()
    moved_logp, moved_entropy = token_logprobs(moved, labels[order], with_entropy=True)
    (moved_gradient,) = torch.autograd.grad(moved_logp.sum() + moved_entropy.sum(), moved)
    assert same_bits(moved_logp.detach(), logp.detach()[order])
    assert same_bits(moved_entropy.detach(), entropy.detach()[order])
    assert same_bits(moved_gradient, gradient[order])
    last = token_logprobs(logits.detach()[-1:], labels[-1:])
    assert same_bits(last, logp.detach()[-1:])


@given(st.integers(1, 400), st.floats(0.05, 20.0), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_log_probabilities_sum_to_one_and_entropy_is_in_range(vocabulary, temperature, seed):
    torch.manual_seed(seed)
    logits = (torch.randn(vocabulary) * 5).expand(vocabulary, vocabulary)
    logp, entropy = token_logprobs(
        logits, torch.arange(vocabulary), temperature=temperature, with_entropy=True, backend="auto"
    )
    assert (logp <= 0).all()
    assert float(logp.double().exp().sum()) == pytest.approx(1.0, abs=2e-6)
    assert 0.0 <= float(entropy[0]) <= math.log(vocabulary) + 1e-5


def test_refuses_bad_arguments_with_value_and_position(backend):
    logits, labels = random_case((2, 3, 5))
    for value in (5, -1, -100):
        bad = labels.clone()
        bad[1, 2] = value
        with pytest.raises(IndexError, match=rf"label {value} at position \(1, 2\) is outside \[0, 5\)"):
            token_logprobs(logits, bad, backend=backend)
    with pytest.raises(ValueError, match=r"labels must have shape \(2, 3\), got \(2, 2\)"):
        token_logprobs(logits, labels[:, :2], backend=backend)
    with pytest.raises(TypeError, match=r"labels must be torch\.int64, got torch\.int32"):
        token_logprobs(logits, labels.int(), backend=backend)
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        token_logprobs(labels, labels[:, 0], backend=backend)
    with pytest.raises(ValueError, match="scalar"):
        token_logprobs(torch.tensor(1.0), torch.tensor(0), backend=backend)
    with pytest.raises(ValueError, match="empty vocabulary"):
        token_logprobs(torch.empty(2, 0), torch.zeros(2, dtype=torch.int64), backend=backend)
    for temperature in (0.0, -1.0, math.nan, math.inf, 1e-40):
        with pytest.raises(ValueError, match="temperature is"):
            token_logprobs(logits, labels, temperature=temperature, backend=backend)


@pytest.mark.parametrize("name", NATIVE)
def test_float64_logits_go_to_the_reference_unless_a_native_kernel_was_named(name):
    logits = torch.randn(2, 5, dtype=torch.float64)
    labels = torch.tensor([1, 2])
    assert token_logprobs(logits, labels).dtype == torch.float64
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        token_logprobs(logits, labels, backend=name)
