"""Sizes and memory layouts at the edge of what a tensor can be."""

import math

import pytest
import torch
from kernel_oracles import logp_and_entropy, same_bits

from rlhf_kernels import available_backends, gae, linear_token_logprobs, sample_tokens, token_logprobs

NATIVE = [name for name in available_backends() if name not in ("reference", "cuda")]


@pytest.mark.parametrize("name", NATIVE)
def test_rows_may_lie_far_apart(name):
    memory = torch.full((3, 2_000_003), math.nan)
    logits = memory[:, 1_000_000:1_000_037]
    logits.copy_(torch.randn(3, 37))
    labels = torch.tensor([0, 36, 5])
    got = token_logprobs(logits, labels, with_entropy=True, backend=name)
    dense = token_logprobs(logits.contiguous(), labels, with_entropy=True, backend=name)
    assert all(same_bits(a, b) for a, b in zip(got, dense, strict=True))


@pytest.mark.parametrize("name", NATIVE)
def test_one_row_may_stand_for_many(name):
    row, labels = torch.randn(1, 50), torch.arange(50)
    got = token_logprobs(row.expand(50, 50), labels, backend=name)
    assert same_bits(got, token_logprobs(row.repeat(50, 1), labels, backend=name))


def test_a_mask_of_minus_infinity_over_everything_gives_nan_there_and_nowhere_else(backend):
    logits = torch.randn(3, 20)
    logits[1] = -math.inf
    logits.requires_grad_()
    logp, entropy = token_logprobs(logits, torch.tensor([0, 1, 2]), with_entropy=True, backend=backend)
    assert logp.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"row 1 .*nothing but -inf"):
        sample_tokens(logits, torch.rand(3), backend=backend)


def test_the_gradient_at_a_masked_label_is_that_of_torch(backend):
    logits = torch.randn(2, 6)
    logits[0, 2] = -math.inf
    gradients = []
    for function in (
        lambda x: token_logprobs(x, torch.tensor([2, 3]), backend=backend),
        lambda x: torch.log_softmax(x, -1).gather(-1, torch.tensor([[2], [3]]))[:, 0],
    ):
        x = logits.clone().requires_grad_()
        logp = function(x)
        assert float(logp[0].detach()) == -math.inf
        gradients.append(torch.autograd.grad(logp, x, torch.ones(2))[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", NATIVE)
def test_a_vocabulary_of_one_and_a_single_token(name):
    hidden, weight = torch.randn(3, 4), torch.randn(1, 4)
    assert linear_token_logprobs(hidden, weight, torch.zeros(3).long(), backend=name).tolist() == [0.0, 0.0, 0.0]
    drawn = sample_tokens(torch.randn(3, 1), torch.rand(3), top_k=5, top_p=0.1, backend=name)
    assert drawn.ids.tolist() == [0, 0, 0]
    assert drawn.filtered_logprobs.tolist() == [0.0, 0.0, 0.0]
    one = torch.ones(2, 1)
    advantages, returns = gae(one, one * 0.25, one, gamma=0.9, lam=0.9, backend=name)
    assert advantages.tolist() == [[0.75], [0.75]]
    assert returns.tolist() == [[1.0], [1.0]]


@pytest.mark.slow
@pytest.mark.parametrize("name", NATIVE)
def test_more_than_two_to_the_31_elements(name):
    """One stored row seen 40,000 times reaches past 2^31 by its indices, and a real tensor by its addresses."""
    row = torch.randn(1, 60_000)
    labels = torch.randint(0, 60_000, (40_000,))
    got = token_logprobs(row.expand(40_000, -1), labels, backend=name)
    alone = token_logprobs(row.expand(9, -1), labels[-9:], backend=name)
    assert same_bits(got[-9:], alone)
    stored = torch.zeros(3, 2**30 - 1, dtype=torch.bfloat16)  # 6 GiB
    stored[2, -3:] = torch.tensor([4.0, 5.0, 6.0])
    tail = stored[:, -3:]
    labels = torch.tensor([0, 1, 2])
    expected, _ = logp_and_entropy(tail, labels)
    torch.testing.assert_close(token_logprobs(tail, labels, backend=name).double(), expected, rtol=1e-6, atol=1e-6)
    whole = token_logprobs(stored, labels + 2**30 - 4, backend=name)
    mass = 2**30 - 4 + math.exp(4) + math.exp(5) + math.exp(6)
    assert float(whole[2]) == pytest.approx(6.0 - math.log(mass), abs=1e-4)
    assert float(whole[0]) == pytest.approx(-math.log(2**30 - 1), abs=1e-4)
