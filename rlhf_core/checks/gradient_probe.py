"""A look at the first gradient of an update, where it has a closed form.

Before any update ρ = 1 and V = V_old, nothing is clipped, and the loss (Σ_t −ρ_t A_t + c ½ (V_t − R_t)²) / N has the
gradient −A_t / N with respect to log π(a_t) and c (V_t − R_t) / N with respect to V_t, on response tokens and nowhere
else. A loss that counts padding, forgets to detach the advantages, or scales or signs a term wrongly has another. What
weights get is that gradient only where they hold none before, left from another update, and where the loss depends on
them through log π(a_t) and V_t alone: a bonus for entropy, or a penalty on weights, goes past both.

Shape suffixes: B sequences, T response positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge


@dataclass(frozen=True)
class _Watched:
    """Log-probs or values of some rows, and the gradient that they should get, times the number of tokens."""

    rows: torch.Tensor
    output_BT: torch.Tensor
    expected_BT: torch.Tensor


class GradientProbe:
    """Compares the gradient of one minibatch with its closed form, over its micro-batches."""

    def __init__(self, mask_BT: torch.Tensor, value_coef: float) -> None:
        """Take the mask of the whole rollout, True on response tokens, and c."""
        self._mask_BT = mask_BT
        self._value_coef = value_coef
        self._logprobs: list[_Watched] = []
        self._values: list[_Watched] = []
        self._attached = False
        self._left_over = False
        self._past_both = False

    def watch(
        self,
        rows: torch.Tensor,
        logprobs_BT: torch.Tensor | None,
        values_BT: torch.Tensor | None,
        advantages_BT: torch.Tensor,
        returns_BT: torch.Tensor,
        loss: torch.Tensor,
    ) -> None:
        """Remember a micro-batch, or its half where policy and value model have passes of their own, before backward.

        Args:
            rows: [b] its rows of the rollout.
            logprobs_BT: [b, T] log π, with a gradient to come; None where the pass gives values alone.
            values_BT: [b, T] V, with a gradient to come; None where the pass gives log-probs alone.
            advantages_BT: [b, T] A, meant to be a constant.
            returns_BT: [b, T] R, meant to be a constant.
            loss: what the backward pass begins at.
        """
        outputs = [x_BT for x_BT in (logprobs_BT, values_BT) if x_BT is not None]
        mask_BT = self._mask_BT[rows]
        first = (logprobs_BT is not None and not self._logprobs) or (values_BT is not None and not self._values)
        if first:
            self._left_over |= any(one.grad is not None and bool(one.grad.any()) for one in leaves(outputs))
        self._attached |= advantages_BT.requires_grad or returns_BT.requires_grad
        self._past_both |= next(leaves([loss], without=outputs), None) is not None
        for x_BT in outputs:
            if x_BT.requires_grad:  # what is frozen has gradient 0, and that is not the closed form
                x_BT.retain_grad()
        with torch.no_grad():
            if logprobs_BT is not None:
                self._logprobs.append(_Watched(rows, logprobs_BT, torch.where(mask_BT, -advantages_BT, 0.0)))
            if values_BT is not None:
                value_BT = torch.where(mask_BT, self._value_coef * (values_BT - returns_BT), 0.0)
                self._values.append(_Watched(rows, values_BT, value_BT))

    def metrics(self) -> dict[str, float]:
        """Return what the backward passes showed.

        ``first_gradient_error``: the largest deviation from the closed form, relative to its largest entry, for
        log-probs or values, whichever is worse; at least 1 where an advantage or return carries a gradient itself,
        weights have one already, or the loss depends on them past log-probs and values too.
        ``value_gradient_share``: the value loss's share of the squared gradient with respect to both.
        """
        errors, squares = [], []
        tokens = int(self._mask_BT[torch.cat([part.rows for part in self._logprobs])].sum())
        for parts in (self._logprobs, self._values):
            gradients = [_gradient(part.output_BT) * tokens for part in parts]
            largest = max(float(part.expected_BT.abs().max()) for part in parts)
            off = (got_BT - part.expected_BT for got_BT, part in zip(gradients, parts, strict=True))
            errors.append(max(float(x_BT.abs().max()) for x_BT in off) / max(largest, 1e-8))
            squares.append(sum(float(one.double().square().sum()) for one in gradients))
        error = max(errors)
        return {
            "first_gradient_error": max(error, 1.0) if self._attached or self._left_over or self._past_both else error,
            "value_gradient_share": squares[1] / sum(squares) if sum(squares) else 0.0,
        }


def _gradient(x_BT: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x_BT) if x_BT.grad is None else x_BT.grad


def leaves(results: Sequence[torch.Tensor], without: Sequence[torch.Tensor] = ()) -> Iterator[torch.Tensor]:
    """Yield the tensors, such as weights, that a backward pass from ``results`` gives a gradient to.

    What it gives them by way of the tensors ``without`` does not count.
    """
    edges = [get_gradient_edge(one) for one in without if one.requires_grad]
    closed = {(edge.node, edge.output_nr) for edge in edges}
    open_nodes: list[Any] = [one.grad_fn for one in results if one.grad_fn is not None]
    seen = set(open_nodes)
    while open_nodes:
        node = open_nodes.pop()
        if hasattr(node, "variable"):
            yield node.variable
        inner = {edge[0] for edge in node.next_functions if edge[0] is not None and edge not in closed} - seen
        seen |= inner
        open_nodes += inner
