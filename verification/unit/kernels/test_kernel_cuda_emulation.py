"""What the emulation shows of every CUDA kernel: no order of threads, no other row changes a bit, none reads too far.

It runs what a GPU would, thread by thread, so what it cannot show is left to `test_kernel_cuda_device.py`: the
processor's own exponential, streams, graphs and speed.
"""

import math
import sys

import pytest
import torch
from cuda_kernels import DTYPES, random_case, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracles import same_bits


def everything(kernels, seed, rows, vocabulary, dtype):
    """The results of every kernel, forward and backward, on one random case with awkward rows."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(rows + 3, vocabulary, generator=generator)
    logits = (random * 10 ** (seed % 4 - 2)).to(dtype)
    logits[-1], logits[-2, 0] = -math.inf, math.nan
    logits[0, : vocabulary // 3] = -math.inf
    labels = torch.randint(0, vocabulary, (rows + 3,), generator=generator)
    grads = torch.randn(2, rows + 3, generator=generator)
    forward = kernels.token_logprobs(logits, labels)
    mask = torch.rand(random.shape, generator=generator) < 0.7
    return [
        *forward,
        kernels.backward(logits, labels, forward, grads[0], grads[1]),
        *kernels.gae(random, random * random, mask, random[:, 0].contiguous()),
        *kernels.gae_per_token(random, random, mask, None, random.sigmoid(), None),
        kernels.whiten(random, mask),
    ]


@given(
    st.integers(0, 2**31),
    st.integers(1, 4),
    st.integers(1, 300) | st.sampled_from([2047, 2048, 2049, 4100, 6145]),
    st.sampled_from(DTYPES),
    st.integers(1, 2**31),
)
@settings(max_examples=15, deadline=None)
def test_the_order_in_which_threads_run_changes_no_bit(emulated, seed, rows, vocabulary, dtype, order):
    emulated.set_order(0)
    expected = everything(emulated, seed, rows, vocabulary, dtype)
    emulated.set_order(order)
    got = everything(emulated, seed, rows, vocabulary, dtype)
    emulated.set_order(0)
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@given(st.integers(2, 12), st.integers(1, 700), st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_a_row_does_not_depend_on_the_rows_beside_it(emulated, rows, vocabulary, seed):
    torch.manual_seed(seed)
    logits, labels = random_case((rows, vocabulary))
    order = torch.randperm(rows)
    forward, moved = emulated.token_logprobs(logits, labels), emulated.token_logprobs(logits[order], labels[order])
    assert all(same_bits(a[order], b) for a, b in zip(forward, moved, strict=True))
    assert same_bits(emulated.token_logprobs(logits[-1:], labels[-1:])[0], forward[0][-1:])


FENCED = """
import sys, torch
from pathlib import Path
from cuda_kernels import EmulatedKernels
from fenced_memory import fenced as fenced_copy

kernels = EmulatedKernels(Path(sys.argv[1]))

def fenced(tensor, at_start):
    # vector reads are held to the tensor itself, but for what shares the first 16 bytes with it
    copy = fenced_copy(tensor, at_start)
    first = copy.data_ptr()
    kernels.allow(first // 16 * 16, first + copy.nbytes)
    return copy

for at_start in (True, False):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for vocabulary in (1, 2, 7, 8, 9, 15, 16, 17, 64, 250, 257, 2500, 4500, 9001):
            logits = fenced(torch.randn(3, vocabulary).to(dtype), at_start)
            labels = torch.tensor([0, vocabulary - 1, vocabulary // 2])
            forward = kernels.token_logprobs(logits, fenced(labels, at_start))
            assert forward[0].isfinite().all()
            kernels.backward(logits, labels, forward, torch.ones(3), torch.ones(3))
    for dtype in (torch.float32, torch.float64):
        for tokens in (1, 3, 4, 5, 127, 128, 129, 2047, 2048, 2049, 2052):
            x = fenced(torch.randn(3, tokens, dtype=dtype), at_start)
            mask = fenced(torch.rand(3, tokens) < 0.5, at_start)
            kernels.gae(x, x, mask, fenced(torch.randn(3, dtype=dtype), at_start))
            kernels.gae_per_token(x, x, mask, None, x, x)
            kernels.whiten(x, mask)
print("stayed inside")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages with mprotect")
def test_nothing_outside_the_tensors_is_read(emulated_library):
    done = run_script(FENCED, emulated_library)
    assert done.stdout.strip() == "stayed inside", (done.returncode, done.stderr)
