"""The CUDA kernels beside their peers and beside the limit, which is the bandwidth of a copy measured on the same GPU.

`pytest verification/benchmarks/test_bench_cuda.py -s` prints the rows of the table in kernels/README.md. Times are
the GPU's own (events around a call, the median of many); a peer that is not installed is skipped.
"""

import importlib.util
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rlhf_kernels
from rlhf_kernels.cuda import extension

pytestmark = pytest.mark.cuda

ROWS, VOCABULARY = 8192, 151_936
BATCH, TOKENS = 4096, 4096
NEEDED_BYTES = 32 << 30


@pytest.fixture(autouse=True)
def _room_and_kernels():
    if (reason := extension.why_missing()) is not None:
        pytest.skip(f"no CUDA kernels: {reason}")
    free, _ = torch.cuda.mem_get_info()
    if free < NEEDED_BYTES:
        pytest.skip(f"needs {NEEDED_BYTES >> 30} GiB of GPU memory, {free >> 30} are free")
    torch.manual_seed(1)


def milliseconds(function: Callable[[], object], repeats: int = 30) -> float:
    """The median time of a call on the GPU."""
    for _ in range(3):
        function()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in marks:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def copied_bytes_per_millisecond() -> float:
    """Read and written by a copy that is far larger than the cache."""
    source = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source))


def logits_and_labels() -> tuple[Tensor, Tensor]:
    logits = torch.empty(ROWS, VOCABULARY, dtype=torch.bfloat16, device="cuda").normal_(std=3.0)
    return logits, torch.randint(0, VOCABULARY, (ROWS,), device="cuda")


def rewards_values_and_mask() -> tuple[Tensor, Tensor, Tensor]:
    rewards, values = torch.randn(2, BATCH, TOKENS, device="cuda")
    return rewards, values, torch.rand(BATCH, TOKENS, device="cuda") < 0.9


def our_calls() -> dict[str, tuple[Callable[[], object], int]]:
    """Each call, and the bytes that it must at least read and write."""
    logits, labels = logits_and_labels()
    operators = torch.ops.rlhf_kernels
    _, entropy, statistics_ = operators.token_logprobs(logits, labels, 1.0, True, None)
    upstream = torch.randn(2, ROWS, device="cuda")
    rewards, values, mask = rewards_values_and_mask()
    tokens = BATCH * TOKENS
    return {
        "token_logprobs": (lambda: rlhf_kernels.token_logprobs(logits, labels), logits.nbytes),
        "token_logprobs with entropy": (
            lambda: rlhf_kernels.token_logprobs(logits, labels, with_entropy=True),
            logits.nbytes,
        ),
        "its gradient": (
            lambda: operators.token_logprobs_backward(
                logits, labels, statistics_, entropy, upstream[0], upstream[1], 1.0, None
            ),
            2 * logits.nbytes,
        ),
        "gae": (lambda: rlhf_kernels.gae(rewards, values, mask, gamma=0.99, lam=0.95), tokens * (4 + 4 + 1 + 4 + 4)),
        "whiten": (lambda: rlhf_kernels.whiten(rewards, mask), tokens * (2 * (4 + 1) + 4)),
    }


def torch_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, labels[:, None])[:, 0]


def torch_logprobs_and_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits.float(), -1)
    return logp.gather(-1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def peers(logits: Tensor, labels: Tensor) -> dict[str, tuple[str, Callable[[], object]]]:
    """Which of our calls a peer is compared with, and its own call."""
    compiled, compiled_both = torch.compile(torch_logprobs), torch.compile(torch_logprobs_and_entropy)
    alone, both = "token_logprobs", "token_logprobs with entropy"
    found: dict[str, tuple[str, Callable[[], object]]] = {
        "torch.compile, log_softmax and gather": (alone, lambda: compiled(logits, labels)),
        "torch.compile, with entropy": (both, lambda: compiled_both(logits, labels)),
    }
    if importlib.util.find_spec("trl"):
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax

        found["TRL selective_log_softmax"] = (alone, lambda: selective_log_softmax(logits, labels))
        found["TRL selective_log_softmax and entropy_from_logits"] = (
            both,
            lambda: (selective_log_softmax(logits, labels), entropy_from_logits(logits)),
        )
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

        # Liger leaves out the last position of a sequence: one row more, so that it reads as many as ours.
        longer = torch.cat([logits, logits[:1]]).unsqueeze(0)
        found["Liger fused_selective_log_softmax"] = (
            alone,
            lambda: fused_selective_log_softmax(longer, labels.unsqueeze(0), 1.0),
        )
    return found


def test_share_of_the_bandwidth_of_a_copy():
    """The target is 85 %; far below it something is wrong."""
    bandwidth = copied_bytes_per_millisecond()
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}: a copy moves {bandwidth / 1e9:.2f} TB/s")
    shares = {}
    for name, (call, moved) in our_calls().items():
        took = milliseconds(call)
        shares[name] = moved / took / bandwidth
        print(f"| {name} | {took:.3f} ms | {shares[name]:.0%} |")
    assert all(shares[name] > 0.5 for name in ("token_logprobs", "token_logprobs with entropy", "gae")), shares


def test_ahead_of_every_peer():
    """The target is to be ahead of each; noise must not fail it."""
    ours = {name: milliseconds(call) for name, (call, _) in our_calls().items()}
    ratios = {}
    for name, (rival, call) in peers(*logits_and_labels()).items():
        took = milliseconds(call, repeats=5)
        ratios[name] = took / ours[rival]
        print(f"| {name} | {took:.3f} ms | {ratios[name]:.2f} × {rival} |")
    assert all(ratio > 0.8 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("name", ["token_logprobs", "token_logprobs with entropy", "its gradient", "gae", "whiten"])
def test_cuda_kernels(benchmark, name):
    """The same for pytest-benchmark: wall time of one call and waiting for it."""
    call, _ = our_calls()[name]
    benchmark.group, benchmark.name = f"cuda {name}", "ours"

    def run() -> None:
        call()
        torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=20, warmup_rounds=3)
