"""Log-probabilities from hidden states on the CPU: matrix products over one part of the logits at a time.

A part is [ROWS, COLUMNS], at most 8 MiB of float32. What is known of a row (four float64 numbers) is carried from part
to part, the vocabulary being the outer loop. The parts do not depend on the number of threads, and COLUMNS is a
multiple of the block of moments.h: equal logits give the bits of `token_logprobs`.

Shapes: N rows, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.cpu import _logprob
from rlhf_kernels.cpu.launch import ELEMENT_TYPE, address, instruction_set, output, require_labels_in_range, threads
from rlhf_kernels.ops import register_kernel
from rlhf_kernels.products import multiplies, multiply

ROWS = 1024
COLUMNS = 2048


class _Part(NamedTuple):
    """Rows of the hidden states, columns of the vocabulary, and the logits where they meet."""

    rows: slice
    columns: slice
    logits: Tensor


def _parts(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Iterator[_Part]:
    """Every part of the logits in turn; all live in one buffer."""
    n, vocabulary = hidden_NH.shape[0], weight_VH.shape[0]
    buffer = output(torch.Size((min(n, ROWS) * min(vocabulary, COLUMNS),)), hidden_NH.dtype)
    for first in range(0, vocabulary, COLUMNS):
        columns = slice(first, min(first + COLUMNS, vocabulary))
        for start in range(0, n, ROWS):
            rows = slice(start, min(start + ROWS, n))
            shape = rows.stop - start, columns.stop - first
            logits = buffer[: shape[0] * shape[1]].view(shape)
            _set_product(logits, hidden_NH[rows], weight_VH[columns].T, None if bias_V is None else bias_V[columns])
            yield _Part(rows, columns, logits)


def _set_product(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """Make ``out`` a b + bias."""
    if multiplies(out, a, b, bias):
        multiply(a, b, bias, out_MN=out)
    elif bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, first: bool = False) -> None:
    """Add a b to float32 sums, or set them if it is the first."""
    if multiplies(out, a, b):
        multiply(a, b, out_MN=out, add=not first)
    elif a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=0 if first else 1, out=out)
    else:
        torch.add(torch.zeros(()) if first else out, a @ b, out=out)


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
) -> tuple[Tensor, Tensor, Tensor]:
    require_labels_in_range(labels, weight.shape[0], ignore_index)
    kept = None if ignore_index is None else _selected(labels.reshape(-1) != ignore_index)
    hidden_NH, label_N = (_rows(t, labels.dim(), kept) for t in (hidden, labels))
    n = label_N.numel()
    states_N4 = torch.tensor([-torch.inf, 0.0, 0.0, 0.0], dtype=torch.float64).repeat(n, 1)
    with torch.autocast("cpu", enabled=False):
        for part in _parts(hidden_NH, weight.detach(), None if bias is None else bias.detach()):
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
    logp_N, entropy_N, statistics_N2 = torch.empty(n), torch.empty(n), torch.empty(n, 2)
    _logprob.finish(
        address(states_N4),
        n,
        temperature,
        address(logp_N),
        address(entropy_N) if with_entropy else 0,
        address(statistics_N2),
        instruction_set(),
    )
    logp = _spread(logp_N, kept, labels.numel()).view(labels.shape)
    entropy = _spread(entropy_N, kept, labels.numel()).view(labels.shape) if with_entropy else torch.empty(0)
    return logp, entropy, _spread(statistics_N2, kept, labels.numel()).view(*labels.shape, 2)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, an empty tensor for each that is not needed."""
    # Rows without upstream gradient are left out: that saves their products, and NaN under a mask cannot spread.
    active_N = torch.zeros(labels.numel(), dtype=torch.bool)
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
    grad_hidden_NH = torch.zeros(hidden_NH.shape if need_hidden else (0,))
    weight_shape = weight.shape if need_weight else torch.Size((0,))
    grad_weight_VH = output(weight_shape, weight.dtype) if n else weight.new_zeros(weight_shape)
    grad_bias_V = torch.zeros(weight.shape[:1] if need_bias else (0,))
    with torch.autocast("cpu", enabled=False):
        for part in _parts(hidden_NH, weight_VH, None if bias is None else bias.detach()):
            rows, columns, gradient = part  # the kernel turns the logits into their gradient in place
            _logprob.backward(
                address(gradient),
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
                _add_product(grad_hidden_NH[rows], gradient, weight_VH[columns])
            if need_weight:
                if rows.start == 0:
                    total_CH = _sums_for(grad_weight_VH[columns])
                _add_product(total_CH, gradient.T, hidden_NH[rows], first=rows.start == 0)
                if rows.stop == n and total_CH.dtype != weight.dtype:
                    grad_weight_VH[columns] = total_CH
            if need_bias:
                grad_bias_V[columns] += gradient.sum(0, dtype=torch.float32)
    if need_hidden:
        grad_hidden_NH = _spread(grad_hidden_NH.to(hidden.dtype), active, labels.numel()).view(hidden.shape)
    return grad_hidden_NH, grad_weight_VH, grad_bias_V.to(weight.dtype)


def _sums_for(target: Tensor) -> Tensor:
    """Where float32 sums for this target are made: in itself where it has that dtype."""
    return target if target.dtype == torch.float32 else torch.empty(target.shape)


register_kernel("linear_token_logprobs", _linear_token_logprobs_cpu, "CPU")
register_kernel("linear_token_logprobs_backward", _linear_token_logprobs_backward_cpu, "CPU")
