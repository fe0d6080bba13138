"""Logits further apart than float32 holds, at a temperature that brings them back together: as in float64."""

import numpy as np
import pytest
import torch
from kernel_oracles import kept_tokens, logp_and_entropy, same_bits

from rlhf_kernels import linear_token_logprobs, ops, sample_tokens, token_logprobs

TEMPERATURES = [1e36, 4e36, 1e38, 3e38, 1e39, 1e42, 1e300]
ROWS = torch.tensor(
    [[-3e38, 3e38, 0.0], [3.38e38, -3.38e38, -3.38e38], [3e38, 3e38, 3e38], [-1e38, 1e38, -3e38], [0.1, -0.2, 0.3]]
)
LABELS = torch.tensor([0, 1, 2, 2, 1])
APART = torch.tensor([3e38, -3e38, 1e38, -3.38e38]).repeat(1500)  # [6000]: several blocks of the native code


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_and_entropy_are_those_of_float64(backend, temperature, dtype):
    for logits, labels in ((ROWS, LABELS), (APART[None], torch.tensor([5]))):
        logits = logits.to(dtype)
        exact = logp_and_entropy(logits, labels, temperature)
        found = token_logprobs(logits, labels, temperature=temperature, with_entropy=True, backend=backend)
        for ours, right in zip(found, exact, strict=True):
            torch.testing.assert_close(ours.double(), right, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_gradient_is_that_of_float64(backend, temperature):
    logits, exact = ROWS.clone().requires_grad_(), ROWS.double().requires_grad_()
    found = token_logprobs(logits, LABELS, temperature=temperature, with_entropy=True, backend=backend)
    logp = torch.log_softmax(exact / temperature, -1)
    right = logp.gather(-1, LABELS[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    upstream = 1e35  # so that gradients are numbers of usual size
    (ours,) = torch.autograd.grad((found[0].sum() + found[1].sum()) * upstream, logits)
    (wanted,) = torch.autograd.grad((right[0].sum() + right[1].sum()) * upstream, exact)
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=2e-6 * upstream / temperature + 2**-126)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_log_probabilities_from_hidden_states_are_those_of_float64(backend, temperature):
    """The logits that they have are ROWS, made of a part that the weight gives and one that the bias gives."""
    given = ROWS[:, None].sum(1) / 2e19, torch.eye(3) * 1e19, torch.tensor([-1e37, 2e37, 0.0])
    hidden, weight, bias = (x.clone().requires_grad_() for x in given)
    wide = [x.double().requires_grad_() for x in given]
    exact = torch.nn.functional.linear(*wide)
    for keep_logits in (False, True):
        found = linear_token_logprobs(
            hidden, weight, LABELS, bias=bias, temperature=temperature, keep_logits=keep_logits, backend=backend
        )
        right = torch.log_softmax(exact / temperature, -1).gather(-1, LABELS[:, None])[:, 0]
        torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=2e-6)
        ours = torch.autograd.grad(found.sum() * 1e18, (hidden, weight))
        theirs = torch.autograd.grad(right.sum() * 1e18, wide[:2], retain_graph=True)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (2, 1.0), (0, 0.7)])
def test_a_draw_is_that_of_float64(backend, temperature, top_k, top_p):
    uniforms = torch.linspace(0.01, 0.999, 41, dtype=torch.float64)
    for row in ROWS:
        kept = kept_tokens(row, temperature, top_k, top_p)
        cumulative = np.cumsum(list(kept.values()))
        clear = np.abs(cumulative[:, None] - uniforms.numpy()).min(0) > 1e-6  # of both sides of a border
        right = [list(kept)[min((cumulative <= u).sum(), len(kept) - 1)] for u in uniforms.numpy()]
        logits = row.expand(len(uniforms), -1)
        drawn = sample_tokens(logits, uniforms, temperature=temperature, top_k=top_k, top_p=top_p, backend=backend)
        assert [i for i, sure in zip(drawn.ids.tolist(), clear, strict=True) if sure] == [
            i for i, sure in zip(right, clear, strict=True) if sure
        ]
        if clear.all():
            filtered = torch.tensor([kept[i] for i in right], dtype=torch.float64).log()
            torch.testing.assert_close(drawn.filtered_logprobs.double(), filtered, rtol=1e-6, atol=2e-6)
        assert same_bits(drawn.logprobs, token_logprobs(logits, drawn.ids, temperature=temperature, backend=backend))


@pytest.mark.parametrize("temperature", [1e36, 1e37, 1e38])
def test_where_nothing_overflows_a_huge_temperature_has_the_bits_that_it_had(temperature):
    logits, labels = torch.rand(20, 300) * 3e38, torch.arange(20)
    by_api = token_logprobs(logits, labels, temperature=temperature, with_entropy=True)
    for ours, plain in zip(by_api, ops.token_logprobs(logits, labels, temperature, True, None), strict=True):
        assert same_bits(ours, plain)
