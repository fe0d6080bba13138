"""Sizes and memory layouts at the edge of what a tensor can be."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_oracles import logp_and_entropy, same_bits, whitened

from rlhf_kernels import available_backends, gae, linear_token_logprobs, sample_tokens, token_logprobs, whiten

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


def test_any_temperature_however_high_gives_the_uniform_distribution(backend):
    logits = torch.tensor([[1.0, 2.0, -3.0, -math.inf]], requires_grad=True)
    for temperature in (1e38, 1e45, 1e300):
        logp, entropy = token_logprobs(
            logits, torch.tensor([1]), temperature=temperature, with_entropy=True, backend=backend
        )
        assert float(logp.detach()) == pytest.approx(-math.log(3), abs=1e-6)
        assert float(entropy.detach()) == pytest.approx(math.log(3), abs=1e-6)
        (gradient,) = torch.autograd.grad([logp, entropy], logits, [torch.ones(1)] * 2)
        assert float(gradient.abs().max()) < 1e-37
        drawn = sample_tokens(logits, torch.tensor([0.999]), temperature=temperature, backend=backend)
        assert drawn.ids.tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_temperature_so_small_that_logits_overflow_gives_the_limit(backend, dtype):
    """The largest logits share the probability and nothing else has any, in results and gradients."""
    largest = 3e38 if dtype != torch.float64 else 1e308
    logits = torch.tensor([[1.0, 2.0, -1.0, -math.inf], [0.5, -0.5, 0.5, -1.0], [-1.0, -1.0, -1.0, -1.0]], dtype=dtype)
    logits = (logits * (largest / 2)).requires_grad_()
    if dtype == torch.float64 and backend != "reference":
        backend = "auto"
    for label, expected in enumerate([[-math.inf, -math.log(2), -math.log(4)], [0.0, -math.inf, -math.log(4)]]):
        logp, entropy = token_logprobs(
            logits, torch.full((3,), label), temperature=1e-30, with_entropy=True, backend=backend
        )
        assert logp.tolist() == pytest.approx(expected, abs=1e-6)
        assert entropy.tolist() == pytest.approx([0.0, math.log(2), math.log(4)], abs=1e-6)
        (gradient,) = torch.autograd.grad([logp, entropy], logits, [torch.ones(3, dtype=logp.dtype)] * 2)
        assert gradient.isfinite().all()
    drawn = sample_tokens(logits, torch.tensor([0.7, 0.7, 0.7]), temperature=1e-30, backend=backend)
    assert drawn.ids.tolist() == [1, 2, 2]
    expected = [0.0, -math.log(2), -math.log(4)]
    assert drawn.logprobs.tolist() == drawn.filtered_logprobs.tolist() == pytest.approx(expected, abs=1e-6)
    hidden, weight = torch.tensor([[largest / 2]], dtype=dtype), torch.tensor([[1.0], [2.0], [-1.0]], dtype=dtype)
    logp = [
        linear_token_logprobs(hidden, weight, torch.tensor([label]), temperature=1e-30, backend=backend).item()
        for label in range(3)
    ]
    assert logp == [-math.inf, 0.0, -math.inf]


def test_a_vocabulary_without_tokens_and_rows_has_results_at_any_temperature(backend):
    for temperature in (0.5, 2.0):
        got = token_logprobs(torch.ones(0, 0), torch.ones(0).long(), temperature=temperature, backend=backend)
        assert got.shape == (0,)


@pytest.mark.parametrize("name", NATIVE)
def test_rows_may_lie_more_than_two_to_the_31_elements_apart(name):
    """The memory between them is never touched, so it is never there."""
    memory = torch.empty(2**31 + 300, dtype=torch.bfloat16)
    logits = memory.as_strided((2, 37), (2**31 + 200, 1))
    logits.copy_(torch.randn(2, 37))
    dense, labels, uniforms = logits.clone(), torch.tensor([3, 36]), torch.tensor([0.2, 0.9])
    for options in ({}, {"top_k": 5}, {"top_p": 0.5}):
        pair = (sample_tokens(x, uniforms, backend=name, **options) for x in (logits, dense))
        assert all(same_bits(a, b) for a, b in zip(*pair, strict=True))
    results = []
    for x in (logits.requires_grad_(), dense.requires_grad_()):
        logp, entropy = token_logprobs(x, labels, with_entropy=True, backend=name)
        gradient = torch.ops.rlhf_kernels.token_logprobs_backward(
            x.detach(), labels, torch.zeros(2, 2), entropy.detach(), torch.ones(2), None, 1.0, None
        )
        results.append([logp.detach(), entropy.detach(), gradient])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 33, 1023, 1024, 1025])
def test_rows_that_are_read_together_are_those_that_are_read_alone(name, vocabulary):
    logits, labels = torch.randn(19, vocabulary) * 3, torch.randint(0, vocabulary, (19,))
    logits[4], logits[5, 0], logits[6, -1] = -math.inf, math.nan, math.inf
    labels[[0, 9, 18]] = -100
    together = token_logprobs(logits, labels, with_entropy=True, ignore_index=-100, backend=name)
    for row in range(19):
        one = slice(row, row + 1)
        alone = token_logprobs(logits[one], labels[one], with_entropy=True, ignore_index=-100, backend=name)
        assert all(same_bits(a, b[one]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("name", NATIVE)
def test_results_that_span_huge_pages_are_those_of_small_ones(name):
    """`pages.h` asks for their memory in other pieces: nothing beside them may change."""
    rewards, values = torch.randn(2, 1025, 1030)
    mask = torch.rand(1025, 1030) < 0.9
    whole = gae(rewards, values, mask, gamma=0.99, lam=0.95, backend=name)
    parts = [
        gae(*(t[i : i + 7] for t in (rewards, values, mask)), gamma=0.99, lam=0.95, backend=name)
        for i in range(0, 1025, 7)
    ]
    assert all(same_bits(a, torch.cat(b)) for a, b in zip(whole, zip(*parts, strict=True), strict=True))
    white = whiten(rewards, mask, backend=name)
    torch.testing.assert_close(white.double(), whitened(rewards, mask, shift_mean=True), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", NATIVE)
def test_a_gradient_of_more_than_two_to_the_31_elements(name):
    row = (torch.randn(1, 131_072) * 3).bfloat16()
    labels = torch.randint(0, 131_072, (17_000,))
    upstream = torch.randn(17_000)
    results = []
    for rows in (slice(None), slice(-5, None)):
        x = row.expand(len(labels[rows]), -1).requires_grad_()
        logp = token_logprobs(x, labels[rows], backend=name)
        (gradient,) = torch.autograd.grad(logp, x, upstream[rows])  # 4.2 GiB
        results.append([logp.detach()[-5:], gradient[-5:].clone()])
        del gradient
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    ids = [sample_tokens(row.expand(n, -1), upstream.sigmoid()[-n:], top_p=0.9, backend=name).ids for n in (17_000, 5)]
    assert same_bits(ids[0][-5:], ids[1])


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


def needs(gib):
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) / 2**20
    if available < gib:
        pytest.skip(f"needs {gib} GiB of memory, and {available:.1f} are available")


@pytest.mark.slow
@pytest.mark.parametrize("name", NATIVE)
def test_a_row_of_more_than_two_to_the_31_logits(name):
    needs(5)
    logits = torch.full((1, 2**31 + 37), -3.0, dtype=torch.bfloat16)
    logits[0, -1] = 20.0
    others, last = logits.numel() - 1, torch.tensor([logits.numel() - 1])
    logp, entropy = token_logprobs(logits, last, with_entropy=True, backend=name)
    mass = 1 + others * math.exp(-23.0)
    assert logp.item() == pytest.approx(-math.log(mass), rel=1e-5)
    # H = ln Z + 23 (1 - p): p is the probability of the last logit, and every other one lies 23 below it.
    assert entropy.item() == pytest.approx(math.log(mass) + 23 * (1 - 1 / mass), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NATIVE)
def test_the_last_of_more_than_two_to_the_31_elements_are_whitened(name):
    needs(19)
    x, mask = torch.zeros(1, 2**31 + 37), torch.zeros(1, 2**31 + 37, dtype=torch.bool)
    x[0, -8:], mask[0, -8:] = torch.linspace(-3, 5, 8), True
    alone = whiten(x[:, -8:].clone(), mask[:, -8:], backend=name)
    torch.testing.assert_close(whiten(x, mask, backend=name)[:, -8:], alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("shape", [(1, 2**31 + 37), (2**21 + 1, 1024)], ids=["one row", "many rows"])
def test_the_last_of_more_than_two_to_the_31_elements_have_their_advantages(name, shape):
    """What is zero and only read is never there (numpy asks for it so); the two results are, 16 GiB."""
    needs(18)
    rewards, values, mask = (torch.from_numpy(np.zeros(shape, kind)) for kind in (np.float32, np.float32, np.bool_))
    rewards[-1, -8:], values[-1, -8:], mask[-1, -8:] = torch.arange(8.0), torch.linspace(-3, 5, 8), True
    ends = [x[-1:, -8:].clone() for x in (rewards, values, mask)]
    bootstrap = torch.full(shape[:1], 2.0)
    found = gae(rewards, values, mask, gamma=0.99, lam=0.95, bootstrap=bootstrap, backend=name)
    alone = gae(*ends, gamma=0.99, lam=0.95, bootstrap=bootstrap[-1:], backend=name)
    assert all(same_bits(whole[-1:, -8:], end) for whole, end in zip(found, alone, strict=True))
    assert all(torch.count_nonzero(whole) <= 8 for whole in found)


FENCED = """
import torch
from fenced_memory import fenced
from rlhf_kernels import gae, gelu, linear, linear_token_logprobs, sample_tokens, sum_of_squares, token_logprobs, whiten
from rlhf_kernels.cpu import launch

def same(function, *tensors):
    copies = torch.clone, lambda x: fenced(x, at_start=True), lambda x: fenced(x, at_start=False)
    free, *fences = (function(*map(copy, tensors)) for copy in copies)
    return all(torch.equal(a, b) for found in fences for a, b in zip(free, found, strict=True))

def logprobs(logits, labels, uniforms):
    logits.requires_grad_()
    found = token_logprobs(logits, labels, with_entropy=True)
    drawn = sample_tokens(logits.detach(), uniforms, top_p=0.9)
    return *found, *drawn, *torch.autograd.grad(found[0].sum() + found[1].sum(), logits)

def head(hidden, weight, labels):
    hidden.requires_grad_(), weight.requires_grad_()
    found = linear_token_logprobs(hidden, weight, labels, with_entropy=True)
    y = linear(hidden, weight)
    return *found, y, *torch.autograd.grad(found[0].sum() + y.sum(), [hidden, weight])

def estimated(x, mask, gammas):
    advantages = [one for gamma in (0.9, gammas) for one in gae(x, x, mask, gamma=gamma, lam=0.9)]
    return *advantages, whiten(x, mask)

def each(x):
    x.requires_grad_()
    y = gelu(x)
    return y, torch.tensor(sum_of_squares(x)), *torch.autograd.grad(y.sum(), x)

for name in launch.usable_instruction_sets():
    launch.use_instruction_set(name)
    for count in range(1, 40):
        assert same(each, torch.randn(count)), (name, count)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for vocabulary in (*range(1, 36), 250, 257, 258, 2500, 4501):
            labels, uniforms = torch.tensor([0, vocabulary - 1, vocabulary // 2]), torch.tensor([0.1, 0.5, 0.9])
            assert same(logprobs, torch.randn(3, vocabulary).to(dtype), labels, uniforms), (name, dtype, vocabulary)
    for rows, width, vocabulary in ((1, 1, 1), (5, 3, 7), (7, 17, 33), (13, 40, 258)):
        tensors = torch.randn(rows, width), torch.randn(vocabulary, width), torch.arange(rows) % vocabulary
        assert same(head, *tensors), (name, rows, width, vocabulary)
    for dtype in (torch.float32, torch.float64):
        for rows, tokens in ((1, 1), (3, 15), (3, 17), (16, 16), (17, 127), (33, 129)):
            tensors = torch.randn(rows, tokens, dtype=dtype), torch.rand(rows, tokens) < 0.5
            assert same(estimated, *tensors, torch.rand(rows, tokens, dtype=dtype)), (name, dtype, rows, tokens)
print("stayed inside")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages with mprotect")
@pytest.mark.skipif(not NATIVE, reason="the extensions are not built")
def test_nothing_outside_the_tensors_is_read():
    path = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
    done = subprocess.run([sys.executable, "-c", path + FENCED], capture_output=True, text=True)
    assert done.stdout.strip() == "stayed inside", (done.returncode, done.stderr)
