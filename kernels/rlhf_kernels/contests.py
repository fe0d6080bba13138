"""The kernels beside other ways to compute the same, and beside the limit of the machine: what the benchmarks time.

A contest is a set of contestants over the same tensors; the peers come with `pip install -e .[peers]`. Times mean
something only as ratios inside one contest, taken in turns in one process.
"""

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.api import gae, linear_token_logprobs, sample_tokens, token_logprobs, whiten

OURS = "ours"
Contestants = dict[str, Callable[[], object]]

SHAPES = {"1024x50257": (1024, 50257), "384x151936": (384, 151936), "65536x258": (65536, 258)}
GAMMA, LAM = 0.99, 0.95


class PeerMissingError(Exception):
    """A peer is not installed; the message says how to."""


def peer(module: str, name: str) -> Any:
    """A function of another package."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise PeerMissingError(f"{error}: pip install -c constraints.txt -e '.[peers]' brings the peers") from error


def logits_and_labels(rows: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Logits N(0, 3²) and labels of a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(rows, vocabulary, generator=generator) * 3
    return logits, torch.randint(0, vocabulary, (rows,), generator=generator)


def torch_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """The usual way in torch."""
    return torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]


def torch_logprobs_and_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The usual way in torch, one log_softmax for both."""
    logp = torch.log_softmax(logits, -1)
    return logp.gather(-1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def python_loop_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """The usual loop over time steps, without a mask."""
    last, advantages = torch.zeros_like(rewards[:, 0]), []
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(last)
        last = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * last
        advantages.append(last)
    return torch.stack(advantages[::-1], 1)


def _trl(name: str, *arguments: Tensor) -> Callable[[], object]:
    function = peer("trl.trainer.utils", name)
    return lambda: function(*arguments)


def _trl_pair(logits: Tensor, labels: Tensor) -> Callable[[], object]:
    logp, entropy = _trl("selective_log_softmax", logits, labels), _trl("entropy_from_logits", logits)
    return lambda: (logp(), entropy())


def _numba_gae(rewards: Tensor, values: Tensor) -> Callable[[], object]:
    def loop(rewards, values, gamma, lam):  # type: ignore[no-untyped-def]
        advantages = rewards.copy()
        for row in range(rewards.shape[0]):
            next_value = last = rewards.dtype.type(0)
            for t in range(rewards.shape[1] - 1, -1, -1):
                last = rewards[row, t] + gamma * next_value - values[row, t] + gamma * lam * last
                next_value = values[row, t]
                advantages[row, t] = last
        return advantages, advantages + values

    compiled, arrays = peer("numba", "njit")(loop), (rewards.numpy(), values.numpy())
    return lambda: compiled(*arrays, GAMMA, LAM)


def _torchrl_gae(rewards: Tensor, values: Tensor) -> Callable[[], object]:
    function = peer("torchrl.objectives.value.functional", "vec_generalized_advantage_estimate")
    next_values = torch.cat([values[:, 1:], torch.zeros(values.shape[0], 1)], 1).unsqueeze(-1)
    done = torch.zeros(*rewards.shape, 1, dtype=torch.bool)
    done[:, -1] = True
    return lambda: function(GAMMA, LAM, values.unsqueeze(-1), next_values, rewards.unsqueeze(-1), done)


def _backward(
    function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, y: Tensor
) -> Callable[[], object]:
    leaf = x.clone().requires_grad_()
    logp, entropy = function(leaf, y)
    return lambda: torch.autograd.grad([logp, entropy], leaf, [torch.ones_like(logp)] * 2, retain_graph=True)


def _ours_with_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return token_logprobs(logits, labels, with_entropy=True)


def _logprobs(shape: str, who: str) -> Callable[[], object]:
    x, y = logits_and_labels(*SHAPES[shape])
    match who:
        case "ours":
            return lambda: token_logprobs(x, y)
        case "TRL selective_log_softmax":
            return _trl("selective_log_softmax", x, y)
        case "torch log_softmax.gather":
            return lambda: torch_logprobs(x, y)
        case "torch cross_entropy":
            return lambda: torch.nn.functional.cross_entropy(x, y, reduction="none")
    return x.sum


def _logprobs_and_entropy(shape: str, who: str) -> Callable[[], object]:
    x, y = logits_and_labels(*SHAPES[shape])
    x = x.bfloat16() if who == "ours bfloat16" else x.half() if who == "ours float16" else x
    if who == "limit: read once":
        return x.sum
    if who == "TRL selective_log_softmax + entropy_from_logits":
        return _trl_pair(x, y)
    function = torch_logprobs_and_entropy if who.startswith("torch") else _ours_with_entropy
    return lambda: function(x, y)


def _logprobs_backward(shape: str, who: str) -> Callable[[], object]:
    x, y = logits_and_labels(*SHAPES[shape])
    return _backward(_ours_with_entropy if who == OURS else torch_logprobs_and_entropy, x, y)


def _gae(who: str) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(2)
    rewards, values = torch.randn(2, 512, 1024, generator=generator)
    mask = torch.ones(512, 1024, dtype=torch.bool)
    match who:
        case "ours":
            return lambda: gae(rewards, values, mask, gamma=GAMMA, lam=LAM)
        case "numba loop":
            return _numba_gae(rewards, values)
        case "torchrl vectorised":
            return _torchrl_gae(rewards, values)
        case "python loop in torch":
            return lambda: python_loop_gae(rewards, values, GAMMA, LAM)
    moved = torch.zeros(512 * 1024 * 17 // 2, dtype=torch.uint8)  # half is read and half written
    target = torch.empty_like(moved)
    return lambda: target.copy_(moved)


def _linear(dtype: torch.dtype, passes: str, who: str) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2048, 384, generator=generator).to(dtype)
    weight = (torch.randn(50257, 384, generator=generator) * 0.05).to(dtype)
    labels = torch.randint(0, 50257, (2048,), generator=generator)
    hidden_leaf, weight_leaf = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    def full_logits(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch_logprobs_and_entropy((hidden @ weight.T).float(), labels)

    def ours(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return linear_token_logprobs(hidden, weight, labels, with_entropy=True)

    if who.startswith("limit"):
        logits, grad_weight = torch.empty(2048, 50257, dtype=dtype), torch.empty_like(weight)

        def products() -> None:
            torch.mm(hidden, weight.T, out=logits)
            if passes == "both":
                torch.mm(hidden, weight.T, out=logits)
                torch.mm(logits, weight)
                torch.mm(logits.T, hidden, out=grad_weight)

        return products

    def in_chunks_by_trl(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logp, entropy, *_ = trl_function(hidden, weight, None, labels, 1.0, _TRL_COLUMNS, None, 1.0, ("entropy",))
        return logp, entropy

    if who == _TRL_CHUNKED:
        trl_function = peer("trl.kernels", "ChunkedLogProbFunction").apply
    function = {OURS: ours, _TRL_CHUNKED: in_chunks_by_trl}.get(who, full_logits)

    def forward_and_backward() -> object:
        logp, entropy = function(hidden_leaf, weight_leaf)
        return torch.autograd.grad(logp.sum() + entropy.sum(), [hidden_leaf, weight_leaf])

    return forward_and_backward if passes == "both" else lambda: function(hidden, weight)


def _sample(options: dict[str, Any], who: str) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(4)
    logits, uniforms = torch.randn(32, 50257, generator=generator) * 3, torch.rand(32, generator=generator)
    if who == OURS:
        return lambda: sample_tokens(logits, uniforms, **options)
    if who == "limit: read once":
        return logits.sum

    def with_torch() -> Tensor:
        ids = torch.multinomial(torch.softmax(logits, -1), 1)
        return torch.log_softmax(logits, -1).gather(-1, ids)

    return with_torch


def _whiten(who: str) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(5)
    x, mask = torch.randn(512, 1024, generator=generator), torch.rand(512, 1024, generator=generator) < 0.8

    def with_torch() -> Tensor:
        count = mask.sum()
        mean = (x * mask).sum() / count
        variance = ((x - mean).square() * mask).sum() / count
        return (x - mean) * torch.rsqrt(variance + 1e-8) * mask

    return with_torch if who == "torch" else lambda: whiten(x, mask)


_TRL_PAIR = "TRL selective_log_softmax + entropy_from_logits"
_TRL_CHUNKED, _TRL_COLUMNS = "TRL ChunkedLogProbFunction", 32768  # TRL's own width of a chunk
_LOGPROBS = (OURS, "TRL selective_log_softmax", "torch log_softmax.gather", "torch cross_entropy", "limit: read once")
_ENTROPY = (OURS, "ours bfloat16", "ours float16", _TRL_PAIR, "torch log_softmax", "limit: read once")
_GAE = (OURS, "numba loop", "torchrl vectorised", "python loop in torch", "limit: copy the bytes")
_SAMPLE = (OURS, "torch softmax, multinomial, log_softmax", "limit: read once")
_LINEAR = (OURS, _TRL_CHUNKED, "torch, all logits", "limit: the bare products")


def _contests() -> dict[str, tuple[tuple[str, ...], Callable[[str], Callable[[], object]]]]:
    table: dict[str, tuple[tuple[str, ...], Callable[[str], Callable[[], object]]]] = {}
    for shape in SHAPES:
        table[f"token_logprobs {shape}"] = (_LOGPROBS, lambda who, shape=shape: _logprobs(shape, who))  # type: ignore[misc]
        table[f"with entropy {shape}"] = (_ENTROPY, lambda who, shape=shape: _logprobs_and_entropy(shape, who))  # type: ignore[misc]
        table[f"backward {shape}"] = (
            (OURS, "torch log_softmax"),
            lambda who, shape=shape: _logprobs_backward(shape, who),  # type: ignore[misc]
        )
    table["gae 512x1024"] = (_GAE, _gae)
    for name, options in {"": {}, " top_k=50": {"top_k": 50}, " top_p=0.9": {"top_p": 0.9}}.items():
        table[f"sample 32x50257{name}"] = (_SAMPLE, lambda who, options=options: _sample(options, who))  # type: ignore[misc]
    table["whiten 512x1024"] = ((OURS, "torch"), _whiten)
    for dtype in (torch.float32, torch.bfloat16):
        for passes, title in {"forward": "forward", "both": "forward and backward"}.items():
            name = f"linear 2048x384x50257 {title} {str(dtype).removeprefix('torch.')}"
            table[name] = (_LINEAR, lambda who, dtype=dtype, passes=passes: _linear(dtype, passes, who))  # type: ignore[misc]
    return table


_TABLE = _contests()
CONTESTS: dict[str, tuple[str, ...]] = {name: contestants for name, (contestants, _) in _TABLE.items()}
"""The name of each contest and of those who take part; `ours` is the first."""


def prepare(contest: str, who: str) -> Callable[[], object]:
    """The function to time.

    Raises:
        PeerMissingError: the peer is not installed.
    """
    return _TABLE[contest][1](who)


def best_times_s(contestants: Contestants, rounds: int) -> dict[str, float]:
    """The shortest time of each, in seconds, taken in turns after one round that does not count."""
    best = dict.fromkeys(contestants, float("inf"))
    for turn in range(rounds + 1):
        for who, function in contestants.items():
            start = time.perf_counter()
            function()
            elapsed = time.perf_counter() - start
            if turn:
                best[who] = min(best[who], elapsed)
    return best
