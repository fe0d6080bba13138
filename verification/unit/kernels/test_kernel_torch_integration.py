"""The functions as torch sees them: schema, shapes without data, gradients, tangents, in-place changes, compiling."""

from contextlib import nullcontext

import pytest
import torch
from kernel_oracles import same_bits
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import rlhf_kernels
from rlhf_kernels import products
from rlhf_kernels.attention import attend

if "cython" not in rlhf_kernels.available_backends():
    pytest.skip("the Cython kernels are not built", allow_module_level=True)


def cases():
    logits, labels = torch.randn(6, 19), torch.randint(0, 19, (6,))
    mask = torch.rand(6, 19) < 0.5
    operators = torch.ops.rlhf_kernels
    statistics, entropy, grad = torch.zeros(6, 2), torch.rand(6), torch.randn(6)
    yield operators.gae, (logits, logits * 2, mask, None, 0.9, 0.8)
    yield operators.gae, (logits.double(), logits.double(), mask, torch.randn(6).double(), 0.9, 0.8)
    yield operators.whiten, (logits, mask, True)
    yield operators.token_logprobs, (logits.clone().requires_grad_(), labels, 0.7, True, None)
    yield operators.token_logprobs, (logits.bfloat16().requires_grad_(), labels, 1.0, False, -100)
    yield (
        operators.token_logprobs,
        (torch.randn(2, 9, 7)[:, :-1].requires_grad_(), torch.zeros(2, 8).long(), 1.0, True, 0),
    )
    yield operators.token_logprobs_backward, (logits, labels, statistics, entropy, grad, grad, 1.0, None)
    yield operators.token_logprobs_backward, (logits, labels, statistics, entropy, None, grad, 1.0, None)
    yield operators.sample_tokens, (logits, torch.rand(6), 1.0, 3, 0.9)


@pytest.mark.parametrize("case", range(9))
def test_opcheck(case):
    operator, arguments = list(cases())[case]
    torch.library.opcheck(operator, arguments)


def loss(logits, labels, rewards, mask):
    logp, entropy = rlhf_kernels.token_logprobs(logits, labels, temperature=0.9, with_entropy=True)
    advantages, _ = rlhf_kernels.gae(rewards, rewards * 0.5, mask, gamma=0.99, lam=0.95)
    return (logp * rlhf_kernels.whiten(advantages, mask)).sum() + 0.01 * entropy.sum()


def test_compiles_as_one_graph_with_the_same_result():
    logits, labels = torch.randn(3, 7, 50), torch.randint(0, 50, (3, 7))
    rewards, mask = torch.randn(3, 7), torch.rand(3, 7) < 0.8
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (loss, compiled):
        x = logits.clone().requires_grad_()
        value = function(x, labels, rewards, mask)
        value.backward()
        gradients.append((value.detach(), x.grad))
    assert same_bits(gradients[0][1], gradients[1][1])
    torch.testing.assert_close(gradients[0][0], gradients[1][0])


def test_runs_under_inference_mode_autocast_and_on_fake_tensors():
    logits, labels = torch.randn(4, 9), torch.randint(0, 9, (4,))
    expected = rlhf_kernels.token_logprobs(logits, labels)
    with torch.inference_mode():
        assert same_bits(rlhf_kernels.token_logprobs(logits, labels), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(rlhf_kernels.token_logprobs(logits, labels), expected)
    with FakeTensorMode() as mode:
        fake = rlhf_kernels.token_logprobs(mode.from_tensor(logits), mode.from_tensor(labels))
        assert fake.shape == (4,)


WEIGHT, LABELS, SIDES = torch.linspace(-2, 1, 50 * 8).view(50, 8).sin(), torch.arange(12), torch.tensor([0, 12])
DIFFERENTIABLE = {
    "token_logprobs": lambda x: rlhf_kernels.token_logprobs(x @ WEIGHT.T, LABELS, with_entropy=True),
    "linear_token_logprobs": lambda x: rlhf_kernels.linear_token_logprobs(x, WEIGHT, LABELS, with_entropy=True),
    "of some rows": lambda x: rlhf_kernels.linear_token_logprobs(x, WEIGHT, LABELS, with_entropy=True, ignore_index=3),
    "of rows in two dimensions": lambda x: rlhf_kernels.linear_token_logprobs(
        x.view(3, 4, 8), WEIGHT, LABELS.view(3, 4), with_entropy=True
    ),
    "keep_logits": lambda x: rlhf_kernels.linear_token_logprobs(
        x, WEIGHT.clone().requires_grad_(), LABELS, with_entropy=True, keep_logits=True
    ),
    "linear": lambda x: rlhf_kernels.linear(x, WEIGHT),
    "linear of three dimensions": lambda x: rlhf_kernels.linear(x.view(3, 4, 8), WEIGHT, WEIGHT[:, 0]),
    "linear of bfloat16": lambda x: rlhf_kernels.linear(x.bfloat16(), WEIGHT.bfloat16()),
    "gelu": rlhf_kernels.gelu,
    "silu": rlhf_kernels.silu,
    "layer_norm": lambda x: rlhf_kernels.layer_norm(x, WEIGHT[0], WEIGHT[1]),
    "rms_norm": lambda x: rlhf_kernels.rms_norm(x, WEIGHT[0]),
    "attend": lambda x: attend(*[x.view(12, 2, 4)] * 3, SIDES, 0.3),
}
scripting = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated"
)  # torch's own, where a tangent is made
differentiable = pytest.mark.parametrize("function", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE.keys())


def results_of(function, x):
    found = function(x)
    return found if isinstance(found, tuple) else (found,)


@differentiable
def test_results_may_be_changed_in_place_before_the_backward_pass(function, monkeypatch):
    monkeypatch.setattr(products, "widens", lambda: True)
    gradients = []
    for change in (lambda y: y * 3 + 1, lambda y: y.mul_(3).add_(1)):
        x = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss = sum(change(y).square().sum() for y in results_of(function, x))
        gradients.append(torch.autograd.grad(loss, x)[0])
    assert gradients[0].any()
    assert same_bits(*gradients)


@scripting
@differentiable
@pytest.mark.parametrize("with_grad", [False, True])
def test_a_tangent_is_refused_and_not_left_out(function, with_grad, monkeypatch):
    monkeypatch.setattr(products, "widens", lambda: True)
    x = torch.randn(12, 8)
    with torch.set_grad_enabled(with_grad), forward_ad.dual_level():
        plain = [y.detach() for y in results_of(function, x)]  # others may be differentiated that way meanwhile
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert all(same_bits(a, b.detach()) for a, b in zip(plain, results_of(function, dual.detach()), strict=True))
        with pytest.raises(RuntimeError, match="no forward-mode derivative; RLHF_KERNELS_BACKEND=reference has one"):
            function(dual)


@scripting
@differentiable
def test_a_tangent_of_the_upstream_gradient_is_refused(function, monkeypatch):
    monkeypatch.setattr(products, "widens", lambda: True)
    x = torch.randn(12, 8, requires_grad=True)
    results = results_of(function, x)
    with forward_ad.dual_level():
        upstream = [forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)) for y in results]
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.autograd.grad(results, x, upstream)


@scripting
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_constants_of_the_loss_refuse_a_tangent(backend):
    mask = torch.ones(2, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.randn(2, 3), torch.ones(2, 3))
        with pytest.raises(RuntimeError, match="gae has no forward-mode derivative: pass detached tensors"):
            rlhf_kernels.gae(mask, dual, mask, gamma=1.0, lam=1.0, backend=backend)
        with pytest.raises(RuntimeError, match="whiten has no forward-mode derivative: pass detached tensors"):
            rlhf_kernels.whiten(dual, mask, backend=backend)
        rlhf_kernels.whiten(dual.detach(), mask, backend=backend)


@scripting
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_draw_and_a_sum_of_squares_refuse_a_tangent(backend, dtype, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", backend)
    logits, uniforms = torch.randn(2, 3, dtype=dtype), torch.tensor([0.2, 0.9], dtype=dtype)
    plain = rlhf_kernels.sample_tokens(logits, uniforms)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, torch.ones_like(x)) for x in (logits, uniforms)]
        for given in ((duals[0], uniforms), (logits, duals[1])):
            with pytest.raises(
                RuntimeError, match="sample_tokens has no forward-mode derivative: pass detached tensors"
            ):
                rlhf_kernels.sample_tokens(*given)
        for one, other in zip(plain, rlhf_kernels.sample_tokens(duals[0].detach(), uniforms), strict=True):
            assert same_bits(one, other)
        with pytest.raises(RuntimeError, match="sums_of_squares has no forward-mode derivative: pass detached tensors"):
            rlhf_kernels.sum_of_squares(duals[0])


@scripting
def test_the_reference_has_tangents():
    x, tangent = torch.randn(12, 50, dtype=torch.float64), torch.randn(12, 50, dtype=torch.float64)

    def logp(x):
        return rlhf_kernels.token_logprobs(x, LABELS, backend="reference")

    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(logp(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, (logp(x + 1e-6 * tangent) - logp(x - 1e-6 * tangent)) / 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
def test_tensors_without_data_have_results_without_data(dtype, backend, fake):
    given = torch.randn(12, 8, dtype=dtype), WEIGHT.to(dtype), LABELS, torch.ones(12, 8)
    mode = FakeTensorMode()
    x, weight, labels, mask = (mode.from_tensor(tensor) if fake else tensor.to("meta") for tensor in given)
    with mode if fake else nullcontext():
        results = [
            rlhf_kernels.token_logprobs(x, labels, backend=backend),
            rlhf_kernels.linear_token_logprobs(x, weight, labels, backend=backend),
            *rlhf_kernels.sample_tokens(x, x[:, 0], top_k=3, top_p=0.9, backend=backend),
            *rlhf_kernels.gae(x, x, mask, gamma=1.0, lam=0.9, backend=backend),
            rlhf_kernels.whiten(x, mask, backend=backend),
        ]
    assert [tuple(result.shape) for result in results] == [(12,)] * 5 + [(12, 8)] * 3
    assert [result.device for result in results] == [x.device] * 8
    with pytest.raises(ValueError, match="no squares to add up: a tensor is on the meta device, or fake"):
        rlhf_kernels.sum_of_squares(x)
