"""The kernels beside torch's own way, each group on the same tensors.

Run `make bench`, or `pytest verification/benchmarks`. In a table only the ratios inside one group mean something.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import rlhf_kernels

pytest.importorskip("pytest_benchmark")

SHAPES = {"1024x50257": (1024, 50257), "384x151936": (384, 151936), "65536x258": (65536, 258)}


@pytest.fixture(autouse=True, scope="module")
def _two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=SHAPES)
def logits_and_labels(request: pytest.FixtureRequest) -> tuple[str, Tensor, Tensor]:
    rows, vocabulary = SHAPES[request.param]
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(rows, vocabulary, generator=generator) * 3
    return request.param, logits, torch.randint(0, vocabulary, (rows,), generator=generator)


def torch_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]


def torch_logprobs_and_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits, -1)
    return logp.gather(-1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def ours_with_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return rlhf_kernels.token_logprobs(logits, labels, with_entropy=True)


def forward_and_backward(function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], logits: Tensor, labels: Tensor):
    logits = logits.detach().requires_grad_()
    logp, entropy = function(logits, labels)
    (logp.sum() + entropy.sum()).backward()


def python_loop_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """The usual loop over time steps, without a mask."""
    last, advantages = torch.zeros_like(rewards[:, 0]), []
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        last = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * last
        advantages.append(last)
    return torch.stack(advantages[::-1], 1)


def run(benchmark, group: str, name: str, function: Callable[[], object]) -> None:
    benchmark.group, benchmark.name = group, name
    benchmark.pedantic(function, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("who", ["ours", "torch log_softmax.gather", "torch cross_entropy", "read once"])
def test_token_logprobs(benchmark, logits_and_labels, who):
    shape, logits, labels = logits_and_labels
    function = {
        "ours": lambda: rlhf_kernels.token_logprobs(logits, labels),
        "torch log_softmax.gather": lambda: torch_logprobs(logits, labels),
        "torch cross_entropy": lambda: torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
        "read once": logits.sum,
    }[who]
    run(benchmark, f"token_logprobs {shape} float32", who, function)


@pytest.mark.parametrize("who", ["ours", "ours bfloat16", "torch"])
def test_token_logprobs_and_entropy(benchmark, logits_and_labels, who):
    shape, logits, labels = logits_and_labels
    logits = logits.bfloat16() if who == "ours bfloat16" else logits
    function = torch_logprobs_and_entropy if who == "torch" else ours_with_entropy
    run(benchmark, f"token_logprobs with entropy {shape}", who, lambda: function(logits, labels))


@pytest.mark.parametrize("who", ["ours", "torch"])
def test_token_logprobs_and_entropy_backward(benchmark, logits_and_labels, who):
    shape, logits, labels = logits_and_labels
    function = torch_logprobs_and_entropy if who == "torch" else ours_with_entropy
    run(benchmark, f"forward and backward {shape}", who, lambda: forward_and_backward(function, logits, labels))


@pytest.mark.parametrize("who", ["ours", "python loop in torch", "copy the bytes"])
def test_gae(benchmark, who):
    rewards, values, mask = torch.randn(512, 1024), torch.randn(512, 1024), torch.ones(512, 1024, dtype=torch.bool)
    moved = torch.empty(512 * 1024 * 17 // 2, dtype=torch.uint8)
    target = torch.empty_like(moved)
    function = {
        "ours": lambda: rlhf_kernels.gae(rewards, values, mask, gamma=0.99, lam=0.95),
        "python loop in torch": lambda: python_loop_gae(rewards, values, 0.99, 0.95),
        "copy the bytes": lambda: target.copy_(moved),
    }[who]
    run(benchmark, "gae 512x1024 float32", who, function)


@pytest.mark.parametrize("who", ["ours", "ours top_k=50", "ours top_p=0.9", "torch softmax, multinomial, log_softmax"])
def test_sample_tokens(benchmark, who):
    logits, uniforms = torch.randn(32, 50257) * 3, torch.rand(32)

    def with_torch() -> Tensor:
        ids = torch.multinomial(torch.softmax(logits, -1), 1)
        return torch.log_softmax(logits, -1).gather(-1, ids)

    options = {"ours": {}, "ours top_k=50": {"top_k": 50}, "ours top_p=0.9": {"top_p": 0.9}}
    if who in options:
        run(benchmark, "sample 32x50257", who, lambda: rlhf_kernels.sample_tokens(logits, uniforms, **options[who]))
    else:
        run(benchmark, "sample 32x50257", who, with_torch)


@pytest.mark.parametrize("who", ["ours", "torch"])
def test_whiten(benchmark, who):
    x, mask = torch.randn(512, 1024), torch.rand(512, 1024) < 0.8

    def with_torch() -> Tensor:
        count = mask.sum()
        mean = (x * mask).sum() / count
        variance = ((x - mean).square() * mask).sum() / count
        return (x - mean) * torch.rsqrt(variance + 1e-8) * mask

    function = with_torch if who == "torch" else lambda: rlhf_kernels.whiten(x, mask)
    run(benchmark, "whiten 512x1024", who, function)


def test_the_lead_over_torch_has_not_collapsed():
    """Far below what is measured on an idle machine (see kernels/README.md), so that a busy one does not fail."""
    logits, labels = torch.randn(256, 50257), torch.randint(0, 50257, (256,))
    contestants = {
        "ours": lambda: rlhf_kernels.token_logprobs(logits, labels),
        "torch": lambda: torch_logprobs(logits, labels),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(7):  # in turns: both meet the same interruptions
        for name, function in contestants.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    ratio = statistics.median(seconds["torch"]) / statistics.median(seconds["ours"])
    assert ratio > 1.5, f"token_logprobs is only {ratio:.2f} times as fast as log_softmax().gather()"
