"""Log-probabilities from hidden states on the CPU: matrix products over one part of the logits at a time.

What is known of a row (four float64 numbers) is carried from part to part. Equal logits give the bits of
`token_logprobs`.

Shapes: N rows, H hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.cpu import _logprob
from rlhf_kernels.cpu.launch import ELEMENT_TYPE, address, instruction_set, output, require_labels_in_range, threads
from rlhf_kernels.cpu.logits import KeptLogits, parts, product_into
from rlhf_kernels.native import differentiable_once
from rlhf_kernels.ops import register_kernel


def _selected(flags_N: Tensor) -> Tensor | None:
    """Where the flags are set; None where all are, which spares a copy of the hidden states."""
    return None if bool(flags_N.all()) else flags_N.nonzero().squeeze(1)


def _rows(tensor: Tensor, rank: int, selected: Tensor | None) -> Tensor:
    """[..., *rest] as [N, *rest], `rank` being the rank of the dots; of the selected rows only."""
    n = tensor.shape[:rank].numel()
    flat = tensor.detach().reshape(n, *tensor.shape[rank:]).contiguous()
    return flat if selected is None else flat[selected]


def _spread(rows: Tensor, selected: Tensor | None, n: int) -> Tensor:
    """The selected rows at their places among n, zeros elsewhere."""
    return rows if selected is None else rows.new_zeros(n, *rows.shape[1:]).index_copy_(0, selected, rows)


def _linear_token_logprobs_cpu(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float,
    with_entropy: bool,
    ignore_index: int | None,
    kept: KeptLogits | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    require_labels_in_range(labels, weight.shape[0], ignore_index)
    read = None if ignore_index is None else _selected(labels.reshape(-1) != ignore_index)
    hidden_NH, label_N = (_rows(t, labels.dim(), read) for t in (hidden, labels))
    n = label_N.numel()
    states_N4 = torch.tensor([-torch.inf, 0.0, 0.0, 0.0], dtype=torch.float64, device="cpu").repeat(n, 1)
    with torch.autocast("cpu", enabled=False):
        for part in parts(hidden_NH, weight.detach(), None if bias is None else bias.detach(), kept):
            _logprob.read_part(
                address(part.logits),
                ELEMENT_TYPE[part.logits.dtype],
                part.logits.element_size(),
                part.logits.shape[0],
                part.logits.shape[1],
                part.columns.start,
                address(label_N[part.rows]),
                temperature,
                with_entropy,
                address(states_N4[part.rows]),
                instruction_set(),
                threads(),
            )
    logp_N, entropy_N, statistics_N2 = (states_N4.new_empty(shape, dtype=torch.float32) for shape in (n, n, (n, 2)))
    _logprob.finish(
        address(states_N4),
        n,
        temperature,
        address(logp_N),
        address(entropy_N) if with_entropy else 0,
        address(statistics_N2),
        instruction_set(),
    )
    # Copies, because results that are views could not be changed in place before the backward pass.
    logp = _spread(logp_N, read, labels.numel()).view(labels.shape).clone()
    entropy = logp_N.new_empty(0)
    if with_entropy:
        entropy = _spread(entropy_N, read, labels.numel()).view(labels.shape).clone()
    return logp, entropy, _spread(statistics_N2, read, labels.numel()).view(*labels.shape, 2)


def _linear_token_logprobs_backward_cpu(
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
    kept: KeptLogits | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, an empty tensor for each that is not needed."""
    # Rows without upstream gradient are left out: that saves their products, and NaN under a mask cannot spread.
    active_N = torch.zeros(labels.numel(), dtype=torch.bool, device="cpu")
    for upstream in (grad_logp, grad_entropy):
        if upstream is not None:
            active_N |= upstream.reshape(-1) != 0
    if ignore_index is not None:
        active_N &= labels.reshape(-1) != ignore_index
    active = _selected(active_N)
    hidden_NH, label_N, statistics_N2 = (_rows(t, labels.dim(), active) for t in (hidden, labels, statistics))
    entropy_N, grad_logp_N, grad_entropy_N = (
        None if t is None else _rows(t, labels.dim(), active)
        for t in (None if grad_entropy is None else entropy, grad_logp, grad_entropy)
    )
    n, weight_VH = label_N.numel(), weight.detach()
    need_hidden, need_weight, need_bias = needs_gradient
    grad_hidden_NH = statistics.new_zeros(hidden_NH.shape if need_hidden else (0,))
    weight_shape = weight.shape if need_weight else torch.Size((0,))
    if n == 0:
        grad_weight_VH = weight.new_zeros(weight_shape)
    else:
        grad_weight_VH = output(weight_shape, weight.dtype) if kept is None else kept.memory_VH
    kept_rows = (
        None
        if kept is None
        else torch.arange(kept.rows, device="cpu")
        if active is None
        else active[active < kept.rows]
    )
    grad_bias_V = statistics.new_zeros(weight.shape[:1] if need_bias else (0,))
    with torch.autocast("cpu", enabled=False):
        for part in parts(hidden_NH, weight_VH, None if bias is None else bias.detach(), kept, kept_rows):
            rows, columns, logits, gradient = part
            _logprob.backward(
                address(logits),
                ELEMENT_TYPE[gradient.dtype],
                gradient.element_size(),
                gradient.shape[0],
                1,
                gradient.shape[1],
                0,
                gradient.shape[1],
                columns.start,
                address(label_N[rows]),
                False,
                0,
                temperature,
                address(statistics_N2[rows]),
                0 if entropy_N is None else address(entropy_N[rows]),
                0 if grad_logp_N is None else address(grad_logp_N[rows]),
                0 if grad_entropy_N is None else address(grad_entropy_N[rows]),
                address(gradient),
                False,
                instruction_set(),
                threads(),
            )
            if need_hidden:
                product_into(grad_hidden_NH[rows], gradient, weight_VH[columns], add=True)
            if need_weight:
                if rows.start == 0:
                    total_CH = _sums_for(grad_weight_VH[columns])
                product_into(total_CH, gradient.T, hidden_NH[rows], add=rows.start > 0)
                if rows.stop == n and total_CH.dtype != weight.dtype:
                    grad_weight_VH[columns] = total_CH
            if need_bias:
                grad_bias_V[columns] += gradient.sum(0, dtype=torch.float32)
    if need_hidden:
        grad_hidden_NH = _spread(grad_hidden_NH.to(hidden.dtype), active, labels.numel()).view(hidden.shape)
    return grad_hidden_NH, grad_weight_VH, grad_bias_V.to(weight.dtype)


class KeepingLogits(torch.autograd.Function):
    """The operator with the logits kept from the forward pass, as far as :class:`KeptLogits` has room for them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropies, those empty where they are not asked for."""
        ctx.kept, ctx.temperature = KeptLogits(labels.numel(), weight), temperature
        logp, entropy, statistics = _linear_token_logprobs_cpu(
            hidden, weight, labels, bias, temperature, with_entropy, None, ctx.kept
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, labels, bias, statistics, entropy.clone())
        return logp, entropy

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients; the logits are gone then, and a second backward pass computes them again."""
        needed = [ctx.needs_input_grad[at] for at in (0, 1, 3)]
        gradients: tuple[Tensor | None, ...] = (None, None, None)
        if grad_logp is not None or grad_entropy is not None:
            kept, ctx.kept = ctx.kept, None
            hidden, weight, labels, bias, statistics, entropy = ctx.saved_tensors
            upstream = grad_logp, grad_entropy
            gradients = _linear_token_logprobs_backward_cpu(
                hidden, weight, labels, bias, statistics, entropy, *upstream, ctx.temperature, None, needed, kept
            )
        of_hidden, of_weight, of_bias = (one if need else None for one, need in zip(gradients, needed, strict=True))
        return of_hidden, of_weight, None, of_bias, None, None


def _sums_for(target: Tensor) -> Tensor:
    """Where float32 sums for this target are made: in itself where it has that dtype."""
    return target if target.dtype == torch.float32 else target.new_empty(target.shape, dtype=torch.float32)


register_kernel("linear_token_logprobs", _linear_token_logprobs_cpu, "CPU")
register_kernel("linear_token_logprobs_backward", _linear_token_logprobs_backward_cpu, "CPU")
