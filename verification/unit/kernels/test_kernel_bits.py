"""Same bits from every instruction set, any number of threads, and whatever state the processor is left in."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracles import same_bits

import rlhf_kernels

if "cython" not in rlhf_kernels.available_backends():
    pytest.skip("the Cython kernels are not built", allow_module_level=True)

from rlhf_kernels.cpu import launch
from rlhf_kernels.dense import GELU, Norm, column_sums
from rlhf_kernels.products import linear_between

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _best_instruction_set_afterwards() -> Iterator[None]:
    yield
    launch.use_instruction_set(None)
    torch.set_flush_denormal(False)


def everything(seed: int, rows: int, vocabulary: int, dtype: torch.dtype, temperature: float) -> list[torch.Tensor]:
    """The results of every kernel, forward and backward, on one random case with awkward rows."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(rows + 4, vocabulary, generator=generator)
    logits = (random * 10 ** (seed % 4 - 2)).to(dtype)
    logits[-1], logits[-2, 0], logits[-3] = -math.inf, math.nan, 1e-41
    logits[0, : vocabulary // 3] = -math.inf
    labels = torch.randint(0, vocabulary, (rows + 4,), generator=generator)
    logits.requires_grad_()
    logp, entropy = rlhf_kernels.token_logprobs(logits, labels, temperature=temperature, with_entropy=True)
    upstream = torch.randn(2, rows + 4, generator=generator)
    (gradient,) = torch.autograd.grad([logp, entropy], logits, [upstream[0], upstream[1]])
    results = [logp.detach(), entropy.detach(), gradient]
    uniforms = torch.rand(rows, generator=generator, dtype=torch.float64)
    for options in ({}, {"top_k": 1 + vocabulary // 3}, {"top_p": 0.7}, {"top_k": 1 + vocabulary // 2, "top_p": 0.9}):
        results += rlhf_kernels.sample_tokens(logits[:rows], uniforms, temperature=temperature, **options)
    results += linear_results(generator, rows, min(vocabulary, 2100), dtype)
    for activation in (rlhf_kernels.gelu, rlhf_kernels.silu):  # native for float32 and bfloat16
        x = (random * 5).to(torch.float32 if dtype == torch.float16 else dtype).requires_grad_()
        y = activation(x)
        results += [y.detach(), *torch.autograd.grad(y.sum(), x)]
    results += [column_sums(random), torch.tensor(rlhf_kernels.sum_of_squares(random))]
    results += layer_results(random[:, :700], generator)
    mask = torch.rand(random.shape, generator=generator) < 0.7
    for x in (random, random.double()):
        results += rlhf_kernels.gae(x, x * x, mask, gamma=0.99, lam=0.95, bootstrap=x[:, 0].contiguous())
        results += rlhf_kernels.gae(x, x * x, mask, gamma=mask * x.abs().clamp(max=1), lam=torch.full_like(x, 0.5))
        results += [rlhf_kernels.whiten(x, mask), rlhf_kernels.whiten(x, mask, shift_mean=False)]
    return results


def layer_results(x: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor]:
    """Of norm and product, activation and product, as in a transformer's layer, with all gradients."""
    x = x.nan_to_num().contiguous().requires_grad_()
    width = x.shape[1]
    shapes = (width,), (width,), (37, width), (37,), (width, 37)
    parameters = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    scale, shift, up, bias, down = parameters
    results = []
    for norm in (Norm(1e-5, centered=True), Norm(1e-5, centered=False)):
        moved = (scale, shift) if norm.centered else (scale,)
        h = linear_between(x, up, bias, before=norm, parameters=moved)
        y = linear_between(h, down.t().contiguous().t(), None, before=GELU, residual=x)
        results += [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *moved, up, bias, down])]
    return results


def linear_results(generator: torch.Generator, rows: int, vocabulary: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Of small integers, whose products and sums are exact: what is left is the kernels' part."""
    hidden, weight = (torch.randint(-3, 4, (n, 5), generator=generator).to(dtype) for n in (rows, vocabulary))
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    hidden.requires_grad_()
    results = rlhf_kernels.linear_token_logprobs(hidden, weight, labels, temperature=0.7, with_entropy=True)
    return [result.detach() for result in results]


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b)
    for position, (x, y) in enumerate(zip(a, b, strict=True)):
        assert same_bits(x, y), f"result {position} differs"


@pytest.mark.skipif(len(launch.usable_instruction_sets()) < 2, reason="this processor has one instruction set")
@given(
    st.integers(0, 2**31),
    st.integers(1, 6),
    st.integers(1, 300) | st.sampled_from([2047, 2048, 2049, 4100, 6145]),
    st.sampled_from(DTYPES),
    st.sampled_from([1.0, 0.3, 2.5]),
)
@settings(max_examples=40, deadline=None)
def test_every_instruction_set_gives_the_same_bits(seed, rows, vocabulary, dtype, temperature):
    results = []
    for name in launch.usable_instruction_sets():
        launch.use_instruction_set(name)
        results.append(everything(seed, rows, vocabulary, dtype, temperature))
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.skipif(len(launch.usable_instruction_sets()) < 2, reason="this processor has one instruction set")
def test_every_float16_and_bfloat16_number_is_read_and_written_the_same():
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)
        x = x[x.isfinite()][:, None].expand(-1, 3).clone()
        x[:, 1], x[:, 2] = 0.0, 1.0
        x.requires_grad_()
        labels = torch.zeros(len(x), dtype=torch.int64)
        results = []
        for name in launch.usable_instruction_sets():
            launch.use_instruction_set(name)
            logp, entropy = rlhf_kernels.token_logprobs(x, labels, with_entropy=True)
            scale = torch.logspace(-9, 4, len(x))
            (gradient,) = torch.autograd.grad([logp, entropy], x, [scale, scale])
            results.append([logp.detach(), entropy.detach(), gradient])
        for other in results[1:]:
            assert_same(results[0], other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), [(37, 5003), (3, 60000), (5000, 33)])
def test_any_number_of_threads_gives_the_same_bits(rows, vocabulary, dtype):
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(everything(7, rows, vocabulary, dtype, 0.9))
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_flushing_subnormals_in_the_calling_thread_changes_no_bit(dtype):
    before = everything(3, 5, 700, dtype, 1.0)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    flushed = everything(3, 5, 700, dtype, 1.0)
    still_set = float(torch.tensor([1e-40]) * 1.0) == 0.0
    torch.set_flush_denormal(False)
    assert still_set
    # the comparison itself must not flush, and the inputs were drawn in the same state
    assert_same(before[:2] + before[3:], flushed[:2] + flushed[3:])


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    source = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": source, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_environment_forces_an_instruction_set_and_a_wrong_one_is_named():
    code = "import rlhf_kernels.cpu.launch as l; print(l.INSTRUCTION_SETS[l._instruction_set])"
    assert run_python("-c", code, RLHF_KERNELS_ISA="sse2").stdout.strip() == "sse2"
    wrong = run_python("-c", code, RLHF_KERNELS_ISA="avx9000")
    assert wrong.returncode != 0
    assert "instruction set is 'avx9000'; this processor has sse2" in wrong.stderr


FORK_AND_SPAWN = """
import {first}, {second}
import multiprocessing, os, signal
import torch, rlhf_kernels

torch.set_num_threads(2)
X = torch.arange(3e5).remainder(977).div(100).reshape(300, 1000)
LABELS = torch.arange(300)

def work(_=None):
    return rlhf_kernels.token_logprobs(X, LABELS, backend="cython").numpy().tobytes()

if __name__ == "__main__":
    expected = work()
    torch.log_softmax(X, -1)  # torch's threads are running, too
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # waiting for threads that the fork did not copy would never end
        os._exit(0 if work() == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(work, [None]) == [expected]
    assert work() == expected
"""


@pytest.mark.parametrize(("first", "second"), [("torch", "rlhf_kernels"), ("rlhf_kernels", "torch")])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_works_in_both_import_orders_after_fork_and_after_spawn(first, second, tmp_path):
    script = tmp_path / "fork_and_spawn.py"
    script.write_text(FORK_AND_SPAWN.format(first=first, second=second))
    done = run_python(str(script))
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_kernels_and_torch_share_one_pool_of_threads(tmp_path):
    script = tmp_path / "threads.py"
    script.write_text(
        "import torch, rlhf_kernels, pathlib\n"
        "torch.set_num_threads(4)\n"
        "x = torch.zeros(300, 1000)\n"
        "count = lambda: len(list(pathlib.Path('/proc/self/task').iterdir()))\n"
        "torch.log_softmax(x, -1); with_torch = count()\n"
        "rlhf_kernels.token_logprobs(x, torch.zeros(300).long(), backend='cython')\n"
        "print(with_torch >= 4, count() - with_torch)\n"
    )
    assert run_python(str(script)).stdout.split() == ["True", "0"]
