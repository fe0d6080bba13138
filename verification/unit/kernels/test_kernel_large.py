"""Tensors of more than 2³¹ elements: what stands at their end is what it is in a tensor of its own."""

import math
import os

import pytest
import torch

from rlhf_kernels import sample_tokens, token_logprobs, whiten

pytestmark = pytest.mark.slow
MORE_THAN_INT32 = 2**31 + 37
GIB = 2**30


def needs(gib):
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    if available < gib:
        pytest.skip(f"needs {gib} GiB of memory, and {available:.1f} are free")


def test_the_last_rows_of_many():
    needs(10)
    vocabulary = 50304
    rows = MORE_THAN_INT32 // vocabulary + 1
    last = (torch.randn(4, vocabulary) * 3).bfloat16()
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16)
    logits[-4:] = last
    labels, uniforms, upstream = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), 0.5), torch.zeros(rows)
    labels[-4:] = torch.tensor([0, 7, vocabulary - 1, 123])
    upstream[-4:] = 1.0

    def results(logits, labels, upstream, uniforms):
        logits.requires_grad_()
        logp, entropy = token_logprobs(logits, labels, with_entropy=True)
        (grad,) = torch.autograd.grad(((logp + entropy) * upstream).sum(), logits)
        assert not grad[:-4].any()
        drawn = sample_tokens(logits.detach(), uniforms)
        return [one[-4:] for one in (logp, entropy, grad, *drawn)]

    large = results(logits, labels, upstream, uniforms)
    small = results(last, labels[-4:], upstream[-4:], uniforms[-4:])
    assert all(torch.equal(one, other) for one, other in zip(large, small, strict=True))


def test_one_row():
    needs(5)
    logits = torch.full((1, MORE_THAN_INT32), -3.0, dtype=torch.bfloat16)
    logits[0, -1] = 20.0
    logp, entropy = token_logprobs(logits, torch.tensor([MORE_THAN_INT32 - 1]), with_entropy=True)
    total = 1 + (MORE_THAN_INT32 - 1) * math.exp(-23.0)
    assert logp.item() == pytest.approx(-math.log(total), rel=1e-5)
    # H = ln Z + 23 (1 - p), where p is the probability of the last logit and every other lies 23 below it.
    assert entropy.item() == pytest.approx(math.log(total) + 23 * (1 - 1 / total), rel=1e-5)


def test_whitening_a_few_of_them():
    needs(19)
    x, mask = torch.zeros(1, MORE_THAN_INT32), torch.zeros(1, MORE_THAN_INT32, dtype=torch.bool)
    x[0, -8:], mask[0, -8:] = torch.linspace(-3, 5, 8), True
    last = x[:, -8:].clone()
    whitened = whiten(x, mask)
    torch.testing.assert_close(whitened[:, -8:], whiten(last, torch.ones(1, 8, dtype=torch.bool)))
