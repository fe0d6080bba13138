"""The Cython kernels behind the operators of `ops.py`: memory layout, output tensors, threads, instruction set.

Importing this module registers the CPU kernels; it raises ImportError where the extensions are not built.
"""

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.cpu import _gae, _logprob, _rows, _sampling, _whiten
from rlhf_kernels.ops import register_kernel
from rlhf_kernels.reference import WHITEN_EPSILON

INSTRUCTION_SETS = ("sse2", "avx2", "avx512")
ENVIRONMENT_VARIABLE = "RLHF_KERNELS_ISA"

ELEMENT_TYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Results larger than this leave the cache anyway: they are written past it.
_STREAM_FROM_BYTES = 4 << 20


def usable_instruction_sets() -> tuple[str, ...]:
    """What this processor can run, the slowest first."""
    return INSTRUCTION_SETS[: _rows.best() + 1]


def use_instruction_set(name: str | None) -> None:
    """Choose the code to run; None = the best. The results are the same bits: this is for tests.

    Raises:
        ValueError: no such instruction set, or this processor lacks it.
    """
    global _instruction_set
    usable = usable_instruction_sets()
    if name is not None and name not in usable:
        raise ValueError(f"instruction set is {name!r}; this processor has {', '.join(usable)}")
    _instruction_set = usable.index(usable[-1] if name is None else name)


def _limit_threads_after_fork() -> None:
    # A forked child inherits the record of OpenMP's worker threads but not the threads: waiting for them never ends.
    global _max_threads
    _max_threads = 1


_instruction_set = 0
_max_threads = 1 << 16
use_instruction_set(os.environ.get(ENVIRONMENT_VARIABLE) or None)
os.register_at_fork(after_in_child=_limit_threads_after_fork)


def threads() -> int:
    """How many threads a kernel may use."""
    return min(torch.get_num_threads(), _max_threads)


def instruction_set() -> int:
    """The index in INSTRUCTION_SETS of the code that runs."""
    return _instruction_set


def address(tensor: Tensor) -> int:
    """Where the elements of a contiguous tensor are."""
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def output(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """An empty tensor that is about to be written as a whole."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    _rows.expect_writes(tensor.data_ptr(), tensor.nbytes)
    return tensor


class _Rows(NamedTuple):
    """Row r of [..., V] starts (r // inner) * outer_stride + (r % inner) * inner_stride elements after the first."""

    tensor: Tensor
    inner: int
    outer_stride: int
    inner_stride: int


def _rows_of(logits: Tensor) -> _Rows:
    """Read rows in place where two strides describe them (a slice such as logits[:, :-1] too), else copy."""
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    merged: list[tuple[int, int]] = []  # (size, stride), outermost first
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return _Rows(logits.contiguous(), 1, logits.shape[-1], 0)
    if len(merged) == 2:
        return _Rows(logits, merged[1][0], merged[0][1], merged[1][1])
    return _Rows(logits, 1, merged[0][1] if merged else 0, 0)


def _position(row: int, shape: torch.Size) -> tuple[int, ...]:
    position = []
    for size in reversed(shape):
        position.append(row % size)
        row //= size
    return tuple(reversed(position))


def _raise_label_out_of_range(labels: Tensor, row: int, vocabulary: int) -> None:
    position = _position(row, labels.shape)
    raise IndexError(f"label {int(labels[position])} at position {position} is outside [0, {vocabulary})")


def require_labels_in_range(labels: Tensor, vocabulary: int, ignore_index: int | None) -> None:
    """Raise IndexError with the value and position of the first label outside [0, vocabulary)."""
    flat, ignoring = labels.contiguous(), ignore_index is not None
    row = _logprob.first_label_out_of_range(address(flat), flat.numel(), vocabulary, ignoring, ignore_index or 0)
    if row >= 0:
        _raise_label_out_of_range(labels, row, vocabulary)


def _gae_cpu(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    return _gae_per_token_cpu(rewards, values, mask, bootstrap, None, None, gamma, lam)


def _gae_per_token_cpu(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    gammas: Tensor | None,
    lams: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    rewards, values, mask = rewards.contiguous(), values.contiguous(), mask.contiguous()
    optional = [None if t is None else t.contiguous() for t in (bootstrap, gammas, lams)]
    bootstrap_address, gammas_address, lams_address = (0 if t is None else address(t) for t in optional)
    advantages, returns = output(rewards.shape, rewards.dtype), output(rewards.shape, rewards.dtype)
    _gae.gae(
        address(rewards),
        address(values),
        address(mask),
        bootstrap_address,
        gammas_address,
        lams_address,
        rewards.dtype == torch.float64,
        rewards.shape[0],
        rewards.shape[1],
        gamma,
        lam,
        advantages.nbytes + returns.nbytes >= _STREAM_FROM_BYTES,
        address(advantages),
        address(returns),
        instruction_set(),
        threads(),
    )
    return advantages, returns


def _token_logprobs_cpu(
    logits: Tensor, labels: Tensor, temperature: float, with_entropy: bool, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, flat_labels = _rows_of(logits), labels.contiguous()
    shape = labels.shape
    logp = torch.empty(shape, dtype=torch.float32, device="cpu")
    entropy = torch.empty(shape if with_entropy else (0,), dtype=torch.float32, device="cpu")
    statistics = torch.empty((*shape, 2), dtype=torch.float32, device="cpu")
    bad_row = _logprob.forward(
        rows.tensor.data_ptr(),
        ELEMENT_TYPE[logits.dtype],
        logits.element_size(),
        labels.numel(),
        rows.inner,
        rows.outer_stride,
        rows.inner_stride,
        logits.shape[-1],
        flat_labels.data_ptr(),
        ignore_index is not None,
        ignore_index or 0,
        temperature,
        logp.data_ptr(),
        entropy.data_ptr() if with_entropy else 0,
        statistics.data_ptr(),
        _instruction_set,
        threads(),
    )
    if bad_row >= 0:
        _raise_label_out_of_range(labels, bad_row, logits.shape[-1])
    return logp, entropy, statistics


def _token_logprobs_backward_cpu(
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    entropy: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    ignore_index: int | None,
) -> Tensor:
    rows, labels = _rows_of(logits), labels.contiguous()
    statistics, entropy = statistics.contiguous(), entropy.contiguous()
    grad_logp = None if grad_logp is None else grad_logp.contiguous()
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    grad_logits = output(logits.shape, logits.dtype)
    _logprob.backward(
        rows.tensor.data_ptr(),
        ELEMENT_TYPE[logits.dtype],
        logits.element_size(),
        labels.numel(),
        rows.inner,
        rows.outer_stride,
        rows.inner_stride,
        logits.shape[-1],
        0,
        labels.data_ptr(),
        ignore_index is not None,
        ignore_index or 0,
        temperature,
        statistics.data_ptr(),
        entropy.data_ptr(),
        0 if grad_logp is None else grad_logp.data_ptr(),
        0 if grad_entropy is None else grad_entropy.data_ptr(),
        grad_logits.data_ptr(),
        grad_logits.nbytes >= _STREAM_FROM_BYTES,
        _instruction_set,
        threads(),
    )
    return grad_logits


def _sample_tokens_cpu(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    uniforms = uniforms.to(torch.float64).contiguous()
    lowest, highest = (0.0, 0.0) if uniforms.numel() == 0 else (float(u) for u in uniforms.aminmax())
    if not 0.0 <= lowest <= highest < 1.0:  # aminmax propagates NaN
        row = int((~((uniforms >= 0.0) & (uniforms < 1.0))).nonzero()[0])
        raise ValueError(f"uniform {float(uniforms[row])} of row {row} is outside [0, 1)")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    ids = torch.empty(uniforms.shape, dtype=torch.int64, device="cpu")
    logprobs = torch.empty(uniforms.shape, dtype=torch.float32, device="cpu")
    filtered_logprobs = torch.empty(uniforms.shape, dtype=torch.float32, device="cpu")
    bad_row = _sampling.sample(
        logits.data_ptr(),
        ELEMENT_TYPE[logits.dtype],
        logits.element_size(),
        logits.shape[0],
        logits.stride(0),
        logits.shape[1],
        uniforms.data_ptr(),
        temperature,
        top_k,
        top_p,
        ids.data_ptr(),
        logprobs.data_ptr(),
        filtered_logprobs.data_ptr(),
        _instruction_set,
        threads(),
    )
    if bad_row >= 0:
        raise ValueError(f"logits of row {bad_row} are no distribution: NaN, +inf, or nothing but -inf")
    return ids, logprobs, filtered_logprobs


def _whiten_cpu(x: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
    out = output(x.shape, x.dtype)
    x, mask = x.contiguous(), mask.contiguous()
    _whiten.whiten(
        x.data_ptr(),
        mask.data_ptr(),
        x.dtype == torch.float64,
        math.prod(x.shape),
        shift_mean,
        WHITEN_EPSILON,
        out.data_ptr(),
        _instruction_set,
        threads(),
    )
    return out


register_kernel("gae", _gae_cpu, "CPU")
register_kernel("gae_per_token", _gae_per_token_cpu, "CPU")
register_kernel("token_logprobs", _token_logprobs_cpu, "CPU")
register_kernel("token_logprobs_backward", _token_logprobs_backward_cpu, "CPU")
register_kernel("sample_tokens", _sample_tokens_cpu, "CPU")
register_kernel("whiten", _whiten_cpu, "CPU")
