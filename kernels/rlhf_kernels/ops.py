"""Registration of the native kernels with torch: schema, shapes without data, gradient.

So they are ordinary operators `torch.ops.rlhf_kernels.*`: autograd, `torch.library.opcheck` and `torch.compile` know
them. Which native code runs is torch's own dispatch by device. The reference needs none of this: it is torch code.
"""

from typing import Any, cast

import torch
from torch import Tensor

from rlhf_kernels.native import refuse_tangents

_LIBRARY = torch.library.Library("rlhf_kernels", "DEF")
_SCHEMAS = (
    "gae(Tensor rewards, Tensor values, Tensor mask, Tensor? bootstrap, float gamma, float lam) -> (Tensor, Tensor)",
    "gae_per_token(Tensor rewards, Tensor values, Tensor mask, Tensor? bootstrap, Tensor? gammas, Tensor? lams,"
    " float gamma, float lam) -> (Tensor, Tensor)",
    "token_logprobs(Tensor logits, Tensor labels, float temperature, bool with_entropy, int? ignore_index)"
    " -> (Tensor, Tensor, Tensor)",
    "token_logprobs_backward(Tensor logits, Tensor labels, Tensor statistics, Tensor entropy, Tensor? grad_logp,"
    " Tensor? grad_entropy, float temperature, int? ignore_index) -> Tensor",
    "linear_token_logprobs(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float temperature,"
    " bool with_entropy, int? ignore_index) -> (Tensor, Tensor, Tensor)",
    "linear_token_logprobs_backward(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor statistics,"
    " Tensor entropy, Tensor? grad_logp, Tensor? grad_entropy, float temperature, int? ignore_index,"
    " bool[] needs_gradient) -> (Tensor, Tensor, Tensor)",
    "sample_tokens(Tensor logits, Tensor uniforms, float temperature, int top_k, float top_p)"
    " -> (Tensor, Tensor, Tensor)",
    "whiten(Tensor x, Tensor mask, bool shift_mean) -> Tensor",
)
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """See `rlhf_kernels.gae`."""
    return cast("tuple[Tensor, Tensor]", torch.ops.rlhf_kernels.gae(rewards, values, mask, bootstrap, gamma, lam))


def gae_per_token(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    gammas: Tensor | None,
    lams: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """See `rlhf_kernels.gae`; gamma and lam count where their tensors are None."""
    operator = torch.ops.rlhf_kernels.gae_per_token
    return cast("tuple[Tensor, Tensor]", operator(rewards, values, mask, bootstrap, gammas, lams, gamma, lam))


def token_logprobs(
    logits: Tensor, labels: Tensor, temperature: float, with_entropy: bool, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """See `rlhf_kernels.token_logprobs`; the entropy is an empty tensor where it was not asked for."""
    logp, entropy, _ = torch.ops.rlhf_kernels.token_logprobs(logits, labels, temperature, with_entropy, ignore_index)
    return logp, entropy


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float,
    with_entropy: bool,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    """See `rlhf_kernels.linear_token_logprobs`; the entropy is an empty tensor where it was not asked for."""
    logp, entropy, _ = torch.ops.rlhf_kernels.linear_token_logprobs(
        hidden, weight, labels, bias, temperature, with_entropy, ignore_index
    )
    return logp, entropy


def sample_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `rlhf_kernels.sample_tokens`."""
    drawn = torch.ops.rlhf_kernels.sample_tokens(logits, uniforms, temperature, top_k, top_p)
    return cast("tuple[Tensor, Tensor, Tensor]", drawn)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
    """See `rlhf_kernels.whiten`."""
    return cast("Tensor", torch.ops.rlhf_kernels.whiten(x, mask, shift_mean))


@torch.library.register_fake("rlhf_kernels::gae", lib=_LIBRARY)
def _gae_shapes(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


@torch.library.register_fake("rlhf_kernels::gae_per_token", lib=_LIBRARY)
def _gae_per_token_shapes(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    gammas: Tensor | None,
    lams: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


@torch.library.register_fake("rlhf_kernels::token_logprobs", lib=_LIBRARY)
def _token_logprobs_shapes(
    logits: Tensor, labels: Tensor, temperature: float, with_entropy: bool, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    shape = labels.shape
    logp = logits.new_empty(shape, dtype=torch.float32)
    entropy = logits.new_empty(shape if with_entropy else (0,), dtype=torch.float32)
    return logp, entropy, logits.new_empty((*shape, 2), dtype=torch.float32)


@torch.library.register_fake("rlhf_kernels::token_logprobs_backward", lib=_LIBRARY)
def _token_logprobs_backward_shapes(
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    entropy: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    ignore_index: int | None,
) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("rlhf_kernels::linear_token_logprobs", lib=_LIBRARY)
def _linear_token_logprobs_shapes(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float,
    with_entropy: bool,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _token_logprobs_shapes(hidden, labels, temperature, with_entropy, ignore_index)


@torch.library.register_fake("rlhf_kernels::linear_token_logprobs_backward", lib=_LIBRARY)
def _linear_token_logprobs_backward_shapes(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    statistics: Tensor,
    entropy: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    ignore_index: int | None,
    needs_gradient: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = needs_gradient
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[:1] if need_bias else (0,)),
    )


@torch.library.register_fake("rlhf_kernels::sample_tokens", lib=_LIBRARY)
def _sample_tokens_shapes(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape = uniforms.shape
    ids = logits.new_empty(shape, dtype=torch.int64)
    return ids, logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("rlhf_kernels::whiten", lib=_LIBRARY)
def _whiten_shapes(x: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
    return x.new_empty(x.shape)


# A result is saved as a copy, because the caller's may be changed in place before the backward pass.
def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, ctx.temperature, with_entropy, ctx.ignore_index = inputs
    _, entropy, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, statistics, entropy.clone() if with_entropy else entropy)


def _token_logprobs_gradient(
    ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, None, None, None, None]:
    logits, labels, statistics, entropy = ctx.saved_tensors
    refuse_tangents(grad_logp, grad_entropy)
    if grad_logp is None and grad_entropy is None:
        return None, None, None, None, None
    grad_logits = torch.ops.rlhf_kernels.token_logprobs_backward(
        logits, labels, statistics, entropy, grad_logp, grad_entropy, ctx.temperature, ctx.ignore_index
    )
    return grad_logits, None, None, None, None


torch.library.register_autograd(
    "rlhf_kernels::token_logprobs", _token_logprobs_gradient, setup_context=_save_for_backward, lib=_LIBRARY
)


def _save_linear_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, bias, ctx.temperature, with_entropy, ctx.ignore_index = inputs
    _, entropy, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, labels, bias, statistics, entropy.clone() if with_entropy else entropy)


def _linear_token_logprobs_gradient(
    ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    hidden, weight, labels, bias, statistics, entropy = ctx.saved_tensors
    refuse_tangents(grad_logp, grad_entropy)
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if grad_logp is not None or grad_entropy is not None:
        gradients = torch.ops.rlhf_kernels.linear_token_logprobs_backward(
            hidden,
            weight,
            labels,
            bias,
            statistics,
            entropy,
            grad_logp,
            grad_entropy,
            ctx.temperature,
            ctx.ignore_index,
            needed,
        )
    grad_hidden, grad_weight, grad_bias = (
        gradient if need else None for gradient, need in zip(gradients, needed, strict=True)
    )
    return grad_hidden, grad_weight, None, grad_bias, None, None, None


torch.library.register_autograd(
    "rlhf_kernels::linear_token_logprobs",
    _linear_token_logprobs_gradient,
    setup_context=_save_linear_for_backward,
    lib=_LIBRARY,
)


def _refuse_second_derivative(function: str) -> None:
    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"rlhf_kernels.{function} has no second derivative; backend='reference' has one")

    torch.library.register_autograd(f"rlhf_kernels::{function}_backward", refuse, lib=_LIBRARY)


_refuse_second_derivative("token_logprobs")
_refuse_second_derivative("linear_token_logprobs")


def register_kernel(name: str, function: Any, dispatch_key: str) -> None:
    """Let `function` run the operator `name` for tensors of a device (`CPU`, `CUDA`)."""
    _LIBRARY.impl(name, function, dispatch_key)
