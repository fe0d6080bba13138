"""The public functions: they check what a user passes, choose a backend and call it.

Shapes: B sequences, T tokens, N rows, V vocabulary.
"""

import math
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from rlhf_kernels import ops, reference
from rlhf_kernels.dispatch import choose_backend

_FLOATS = (torch.float32, torch.float64)
_LOGITS = (torch.float32, torch.bfloat16, torch.float16)
_MIN_TEMPERATURE = 1e-30


class SampledTokens(NamedTuple):
    """What `sample_tokens` drew, each of shape [N]."""

    ids: Tensor
    """int64, the drawn token."""
    logprobs: Tensor
    """log softmax(logits / temperature) at the drawn token, *before* top-k and top-p: what a trainer recomputes."""
    filtered_logprobs: Tensor
    """The log-probability that the token was really drawn with: after top-k and top-p."""


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float | Tensor,
    lam: float | Tensor,
    bootstrap: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, equations 12 and 16).

    δ_t = r_t + γ_t V_{t+1} − V_t, A_t = δ_t + γ_t λ_t A_{t+1}, over the tokens of the mask only: a token outside it is
    skipped, the next value and advantage are carried across it, and what it holds never changes a bit.

    Args:
        rewards: [B, T], float32 or float64.
        values: [B, T], same dtype.
        mask: [B, T], True = counts; bool, or numbers that are all 0 or 1.
        gamma: discount in [0, 1], a number, or a tensor of the rewards' dtype that expands to [B, T].
        lam: λ in [0, 1], likewise.
        bootstrap: [B], the value after the last token of a truncated sequence; None = the sequences ended (0).
        backend: auto, reference, cython or cuda.

    Returns:
        advantages and returns, [B, T], 0 outside the mask; returns == advantages + values inside it.

    Raises:
        ValueError: a shape, device or range that does not fit.
        TypeError: a dtype that does not fit.
        RuntimeError: an input requires a gradient; there is none, advantages are constants of the loss.
    """
    _require_rank("rewards", rewards, 2)
    _require_dtype("rewards", rewards, _FLOATS)
    _require_like("values", values, rewards)
    mask = _as_mask(mask, rewards)
    if bootstrap is not None:
        _require_like("bootstrap", bootstrap, rewards, rewards.shape[:1])
    gamma, lam = _per_token("gamma", gamma, rewards, mask), _per_token("lam", lam, rewards, mask)
    gammas, lams = (x if isinstance(x, Tensor) else None for x in (gamma, lam))
    _refuse_gradient("gae", rewards, values, bootstrap, gammas, lams)
    if choose_backend(backend, rewards, _FLOATS) == "reference":
        if rewards.numel() == 0:
            return torch.zeros_like(rewards), torch.zeros_like(rewards)
        return reference.gae(rewards, values, mask, bootstrap, gamma, lam)
    if isinstance(gamma, Tensor) or isinstance(lam, Tensor):
        one_gamma, one_lam = (0.0 if isinstance(x, Tensor) else x for x in (gamma, lam))
        return ops.gae_per_token(rewards, values, mask, bootstrap, gammas, lams, one_gamma, one_lam)
    return ops.gae(rewards, values, mask, bootstrap, gamma, lam)


@overload
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = ...,
    with_entropy: Literal[False] = ...,
    ignore_index: int | None = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = ...,
    with_entropy: Literal[True],
    ignore_index: int | None = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    ignore_index: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Read log softmax(logits / temperature) at the labels, and that distribution's entropy, without a [N, V] copy.

    The native kernel reads the logits once (online log-sum-exp, Milakov and Gimelshein 2018, arXiv 1805.02867). Both
    results are differentiable in the logits. A logit of −inf is a token of probability 0; NaN, +inf or a row of only
    −inf give NaN. A row whose label is `ignore_index` gives 0 in both results and no gradient.

    Args:
        logits: [..., V], float32, bfloat16 or float16 (float64 runs on the reference). Any strides: rows are read in
            place where the last dimension is contiguous.
        labels: [...], int64.
        temperature: positive; the logits are divided by it.
        with_entropy: also return the entropy, in nats.
        ignore_index: a label that marks rows to skip.
        backend: auto, reference, cython or cuda.

    Returns:
        logp [...], or (logp, entropy), float32 (float64 for float64 logits).

    Raises:
        IndexError: a label outside [0, V), with its value and position. The CUDA kernel, which nobody waits for, prints
            value and row and stops with a device-side assertion instead.
        ValueError: a shape, device or temperature that does not fit.
        TypeError: a dtype that does not fit.
    """
    if logits.dim() == 0:
        raise ValueError("logits must have at least one dimension, [..., V], got a scalar")
    _require_dtype("logits", logits, (*_LOGITS, torch.float64))
    _require_shape("labels", labels, logits.shape[:-1])
    _require_dtype("labels", labels, (torch.int64,))
    _require_device("labels", labels, logits)
    _require_temperature(temperature)
    if logits.shape[-1] == 0 and labels.numel() > 0:
        raise ValueError(f"logits have an empty vocabulary: shape {tuple(logits.shape)}")
    entropy: Tensor | None
    if choose_backend(backend, logits, _LOGITS) == "reference":
        _require_labels_in_range(labels, logits.shape[-1], ignore_index)
        logp, entropy = reference.token_logprobs(logits, labels, temperature, with_entropy, ignore_index)
    else:
        logp, entropy = ops.token_logprobs(logits, labels, temperature, with_entropy, ignore_index)
    if not with_entropy:
        return logp
    assert entropy is not None
    return logp, entropy


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    with_entropy: Literal[False] = ...,
    ignore_index: int | None = ...,
    keep_logits: bool = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    with_entropy: Literal[True],
    ignore_index: int | None = ...,
    keep_logits: bool = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    ignore_index: int | None = None,
    keep_logits: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` of the logits hidden @ weight.T + bias, which are never held: only a part of them at a time.

    The backward pass computes the parts again, so that a training step takes four matrix products instead of three and
    16 MiB instead of the logits and their gradient. Differentiable in hidden, weight and bias. Rows of `ignore_index`,
    and in the backward pass rows whose upstream gradient is 0, are left out of the products. The dtypes are used as
    they are, under autocast too: logits of bfloat16 states are rounded to bfloat16, as the model's own head does it.

    Args:
        hidden: [..., H], float32, bfloat16 or float16 (float64 runs on the reference).
        weight: [V, H], the language-model head, same dtype.
        labels: [...], int64.
        bias: [V], same dtype.
        temperature: positive; the logits are divided by it.
        with_entropy: also return the entropy, in nats.
        ignore_index: a label that marks rows to skip.
        keep_logits: spare the fourth product, or a part of it, on the CPU and without ``ignore_index``: keep the logits
            of the first H rows from the forward pass on where the gradient of the weight will be. The same bits.
        backend: auto, reference, cython or cuda.

    Returns:
        logp [...], or (logp, entropy), float32 (float64 for float64 states).

    Raises:
        IndexError: a label outside [0, V), with its value and position.
        ValueError: a shape, device or temperature that does not fit.
        TypeError: a dtype that does not fit.
    """
    if hidden.dim() == 0:
        raise ValueError("hidden must have at least one dimension, [..., H], got a scalar")
    _require_dtype("hidden", hidden, (*_LOGITS, torch.float64))
    _require_rank("weight", weight, 2)
    _require_like("weight", weight, hidden, torch.Size((weight.shape[0], hidden.shape[-1])))
    if bias is not None:
        _require_like("bias", bias, hidden, weight.shape[:1])
    _require_shape("labels", labels, hidden.shape[:-1])
    _require_dtype("labels", labels, (torch.int64,))
    _require_device("labels", labels, hidden)
    _require_temperature(temperature)
    if weight.shape[0] == 0 and labels.numel() > 0:
        raise ValueError(f"weight has an empty vocabulary: shape {tuple(weight.shape)}")
    entropy: Tensor | None
    if choose_backend(backend, hidden, _LOGITS, lacking=("cuda",)) == "reference":
        _require_labels_in_range(labels, weight.shape[0], ignore_index)
        logp, entropy = reference.linear_token_logprobs(
            hidden, weight, labels, bias, temperature, with_entropy, ignore_index
        )
    elif keep_logits and ignore_index is None and torch.is_grad_enabled() and weight.requires_grad:
        from rlhf_kernels.cpu.linear import KeepingLogits  # which there is where native code was chosen

        logp, entropy = KeepingLogits.apply(hidden, weight, labels, bias, temperature, with_entropy)
    else:
        logp, entropy = ops.linear_token_logprobs(hidden, weight, labels, bias, temperature, with_entropy, ignore_index)
    if not with_entropy:
        return logp
    assert entropy is not None
    return logp, entropy


def sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    backend: str = "auto",
) -> SampledTokens:
    """Draw one token a row by inverting the cumulative distribution at the given uniform.

    The drawn id is the first, in order of ids, whose cumulative probability over the kept tokens exceeds the uniform,
    so equal uniforms give equal ids. Top-k is applied first, then top-p to what it left. Tokens are ranked by logit,
    equal logits by id, lower first: that rule also decides at the border of top-k and top-p.

    Args:
        logits: [N, V], float32, bfloat16 or float16 (float64 runs on the reference).
        uniforms: [N], float32 or float64, in [0, 1).
        temperature: positive; the logits are divided by it.
        top_k: keep the k most probable tokens, 0 = all.
        top_p: keep the smallest set of most probable tokens whose mass reaches top_p, 1.0 = all.
        backend: auto, reference or cython.

    Returns:
        SampledTokens(ids, logprobs, filtered_logprobs). `logprobs` are bit for bit what
        `token_logprobs(logits, ids, temperature=temperature)` gives on the same backend.

    Raises:
        ValueError: a shape or a range that does not fit, a uniform outside [0, 1), or a row that is no distribution
            (NaN, +inf, or nothing but −inf), with its position.
        TypeError: a dtype that does not fit.
    """
    _require_rank("logits", logits, 2)
    _require_dtype("logits", logits, (*_LOGITS, torch.float64))
    _require_shape("uniforms", uniforms, logits.shape[:1])
    _require_dtype("uniforms", uniforms, _FLOATS)
    _require_device("uniforms", uniforms, logits)
    _require_temperature(temperature)
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; it must be 0 (off) or positive")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p is {top_p}; it must be in (0, 1]")
    if logits.shape[1] == 0 and logits.shape[0] > 0:
        raise ValueError(f"logits have an empty vocabulary: shape {tuple(logits.shape)}")
    logits, uniforms = logits.detach(), uniforms.detach()
    top_k = 0 if top_k >= logits.shape[1] else top_k
    if choose_backend(backend, logits, _LOGITS, lacking=("cuda",)) == "reference":
        _require_distributions(logits)
        _require_uniforms(uniforms)
        if logits.shape[0] == 0:
            empty = torch.empty_like(uniforms, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
            return SampledTokens(torch.empty_like(uniforms, dtype=torch.int64), empty, empty.clone())
        return SampledTokens(*reference.sample_tokens(logits, uniforms, temperature, top_k, top_p))
    return SampledTokens(*ops.sample_tokens(logits, uniforms, temperature, top_k, top_p))


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, backend: str = "auto") -> Tensor:
    """Scale the masked elements to mean 0 and variance 1: (x − mean) / √(variance + 1e-8).

    Mean and population variance are taken over the mask, in float64. What lies outside the mask never changes a bit.

    Args:
        x: any shape, float32 or float64.
        mask: same shape, True = counts; bool, or numbers that are all 0 or 1.
        shift_mean: False keeps the mean.
        backend: auto, reference, cython or cuda.

    Returns:
        Same shape and dtype as x, 0 outside the mask; all 0 where the mask is empty.

    Raises:
        ValueError: a shape or device that does not fit.
        TypeError: a dtype that does not fit.
        RuntimeError: x requires a gradient; there is none, whitened advantages are constants of the loss.
    """
    _require_dtype("x", x, _FLOATS)
    mask = _as_mask(mask, x)
    _refuse_gradient("whiten", x)
    if choose_backend(backend, x, _FLOATS) == "reference":
        return reference.whiten(x, mask, shift_mean)
    return ops.whiten(x, mask, shift_mean)


def _require_rank(name: str, tensor: Tensor, rank: int) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions, got shape {tuple(tensor.shape)}")


def _require_shape(name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def _require_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d) for d in dtypes)}, got {tensor.dtype}")


def _require_device(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, the other arguments on {other.device}")


def _require_like(name: str, tensor: Tensor, other: Tensor, shape: torch.Size | None = None) -> None:
    _require_shape(name, tensor, other.shape if shape is None else shape)
    _require_dtype(name, tensor, (other.dtype,))
    _require_device(name, tensor, other)


def _as_mask(mask: Tensor, other: Tensor) -> Tensor:
    _require_shape("mask", mask, other.shape)
    _require_device("mask", mask, other)
    if mask.dtype == torch.bool:
        return mask
    if _has_values(mask):
        _require_none("mask", mask, (mask != 0) & (mask != 1), "must be 0 or 1")
    return mask != 0


def _per_token(name: str, number: float | Tensor, other: Tensor, mask: Tensor) -> float | Tensor:
    """The number, or the tensor expanded to the other's shape; either in [0, 1] where it counts."""
    if not isinstance(number, Tensor):
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name} is {number}; it must be in [0, 1]")
        return number
    _require_dtype(name, number, (other.dtype,))
    _require_device(name, number, other)
    try:
        each = number.expand(other.shape)
    except RuntimeError as error:
        raise ValueError(f"{name} must expand to shape {tuple(other.shape)}, got {tuple(number.shape)}") from error
    if _has_values(each):
        _require_none(name, each, ~((each >= 0.0) & (each <= 1.0)) & mask, "must be in [0, 1]")
    return each


def _has_values(tensor: Tensor) -> bool:
    """Whether values can be looked at: not while tracing or capturing a CUDA graph, and not without data."""
    if torch.compiler.is_compiling() or tensor.device.type == "meta":
        return False
    return not (tensor.is_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def _require_none(name: str, tensor: Tensor, bad: Tensor, rule: str) -> None:
    if bad.any():
        position = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(f"{name} is {tensor[position].item()} at position {position}; it {rule}")


def _require_temperature(temperature: float) -> None:
    if not _MIN_TEMPERATURE <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be finite and at least {_MIN_TEMPERATURE}")


def _refuse_gradient(function: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{function} has no gradient: pass detached tensors, or call it under torch.no_grad()")


def _require_labels_in_range(labels: Tensor, vocabulary: int, ignore_index: int | None) -> None:
    if torch.compiler.is_compiling():  # the values are not known while tracing; gather checks them when it runs
        return
    bad = (labels < 0) | (labels >= vocabulary)
    if ignore_index is not None:
        bad &= labels != ignore_index
    if bad.any():
        position = tuple(int(i) for i in bad.nonzero()[0])
        raise IndexError(f"label {int(labels[position])} at position {position} is outside [0, {vocabulary})")


def _require_distributions(logits: Tensor) -> None:
    bad = ~logits.amax(-1).isfinite() if logits.numel() else torch.zeros(0, dtype=torch.bool)
    if bad.any():  # amax propagates NaN
        raise ValueError(f"logits of row {int(bad.nonzero()[0])} are no distribution: NaN, +inf, or nothing but -inf")


def _require_uniforms(uniforms: Tensor) -> None:
    bad = ~((uniforms >= 0.0) & (uniforms < 1.0))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"uniform {float(uniforms[row])} of row {row} is outside [0, 1)")
