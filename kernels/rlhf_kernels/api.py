"""The public functions: they check what a user passes, choose a backend and call it.

Shapes: B sequences, T tokens, N rows, V vocabulary.
"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from rlhf_kernels import ops, reference
from rlhf_kernels.arguments import (
    HUGE_TEMPERATURE,
    IGNORED,
    TOP_K,
    TOP_P,
    as_mask,
    has_data,
    per_token,
    refuse_gradient,
    refuse_tangent,
    require_device,
    require_distributions,
    require_dtype,
    require_labels,
    require_labels_in_range,
    require_like,
    require_number,
    require_rank,
    require_shape,
    require_temperature,
    require_tensors,
    require_uniforms,
)
from rlhf_kernels.dispatch import choose_backend
from rlhf_kernels.native import native_serves, refuse_tangents

_FLOATS = (torch.float32, torch.float64)
_LOGITS = (torch.float32, torch.bfloat16, torch.float16)


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
    require_tensors(rewards=rewards, values=values, mask=mask)
    require_rank("rewards", rewards, 2)
    require_dtype("rewards", rewards, _FLOATS)
    require_like("values", values, rewards)
    mask = as_mask(mask, rewards)
    if bootstrap is not None:
        require_tensors(bootstrap=bootstrap)
        require_like("bootstrap", bootstrap, rewards, rewards.shape[:1])
    gamma, lam = per_token("gamma", gamma, rewards, mask), per_token("lam", lam, rewards, mask)
    gammas, lams = (x if isinstance(x, Tensor) else None for x in (gamma, lam))
    refuse_gradient("gae", rewards, values, bootstrap, gammas, lams)
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
        temperature: at least 1e-30; the logits are divided by it. Where a quotient would overflow, results are the
            limit of small temperatures: the largest logits share the probability.
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
    require_tensors(logits=logits, labels=labels)
    if logits.dim() == 0:
        raise ValueError("logits must have at least one dimension, [..., V], got a scalar")
    require_dtype("logits", logits, (*_LOGITS, torch.float64))
    require_labels(labels, logits.shape[:-1], logits)
    require_temperature(temperature)
    require_number("ignore_index", ignore_index, IGNORED)
    if logits.shape[-1] == 0 and labels.numel() > 0:
        raise ValueError(f"logits have an empty vocabulary: shape {tuple(logits.shape)}")
    if temperature >= HUGE_TEMPERATURE:
        logits, temperature = 0.5 * logits, 0.5 * temperature
    entropy: Tensor | None
    if choose_backend(backend, logits, _LOGITS) == "reference":
        require_labels_in_range(labels, logits.shape[-1], ignore_index)
        logp, entropy = reference.token_logprobs(logits, labels, temperature, with_entropy, ignore_index)
    else:
        refuse_tangents(logits)
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
        temperature: at least 1e-30; the logits are divided by it. Where a quotient would overflow, results are the
            limit of small temperatures: the largest logits share the probability.
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
    require_tensors(hidden=hidden, weight=weight, labels=labels)
    if hidden.dim() == 0:
        raise ValueError("hidden must have at least one dimension, [..., H], got a scalar")
    require_dtype("hidden", hidden, (*_LOGITS, torch.float64))
    require_rank("weight", weight, 2)
    require_like("weight", weight, hidden, torch.Size((weight.shape[0], hidden.shape[-1])))
    if bias is not None:
        require_tensors(bias=bias)
        require_like("bias", bias, hidden, weight.shape[:1])
    require_labels(labels, hidden.shape[:-1], hidden)
    require_temperature(temperature)
    require_number("ignore_index", ignore_index, IGNORED)
    if weight.shape[0] == 0 and labels.numel() > 0:
        raise ValueError(f"weight has an empty vocabulary: shape {tuple(weight.shape)}")
    if temperature >= HUGE_TEMPERATURE:
        hidden, bias, temperature = 0.5 * hidden, None if bias is None else 0.5 * bias, 0.5 * temperature
    entropy: Tensor | None
    if choose_backend(backend, hidden, _LOGITS, lacking=("cuda",)) == "reference":
        require_labels_in_range(labels, weight.shape[0], ignore_index)
        logp, entropy = reference.linear_token_logprobs(
            hidden, weight, labels, bias, temperature, with_entropy, ignore_index
        )
    elif (
        keep_logits
        and ignore_index is None
        and torch.is_grad_enabled()
        and weight.requires_grad
        and native_serves(hidden, weight, bias, dtypes=_LOGITS)
    ):
        from rlhf_kernels.cpu.linear import KeepingLogits  # which there is where native code was chosen

        logp, entropy = KeepingLogits.apply(hidden, weight, labels, bias, temperature, with_entropy)
    else:
        refuse_tangents(hidden, weight, bias)
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
        temperature: at least 1e-30; the logits are divided by it. Where a quotient would overflow, results are the
            limit of small temperatures: the largest logits share the probability.
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
        RuntimeError: an input has a tangent of forward-mode differentiation.
    """
    require_tensors(logits=logits, uniforms=uniforms)
    require_rank("logits", logits, 2)
    require_dtype("logits", logits, (*_LOGITS, torch.float64))
    require_shape("uniforms", uniforms, logits.shape[:1])
    require_dtype("uniforms", uniforms, _FLOATS)
    require_device("uniforms", uniforms, logits)
    require_temperature(temperature)
    require_number("top_k", top_k, TOP_K)
    require_number("top_p", top_p, TOP_P)
    if logits.shape[1] == 0 and logits.shape[0] > 0:
        raise ValueError(f"logits have an empty vocabulary: shape {tuple(logits.shape)}")
    refuse_tangent("sample_tokens", logits, uniforms)
    logits, uniforms = logits.detach(), uniforms.detach()
    if temperature >= HUGE_TEMPERATURE:
        logits, temperature = 0.5 * logits, 0.5 * temperature
    top_k = 0 if top_k >= logits.shape[1] else top_k
    if choose_backend(backend, logits, _LOGITS, lacking=("cuda",)) == "reference":
        require_distributions(logits)
        require_uniforms(uniforms)
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
    require_tensors(x=x, mask=mask)
    require_dtype("x", x, _FLOATS)
    mask = as_mask(mask, x)
    refuse_gradient("whiten", x)
    if choose_backend(backend, x, _FLOATS) == "reference":
        return reference.whiten(x, mask, shift_mean) if has_data(x) else torch.empty_like(x)
    return ops.whiten(x, mask, shift_mean)
