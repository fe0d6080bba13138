"""A look at the first gradient of an update, where it has a closed form.

Before any update ρ = 1 and V = V_old, nothing is clipped, and the loss (Σ_t −ρ_t A_t + c ½ (V_t − R_t)²) / N has the
gradient −A_t / N with respect to log π(a_t) and c (V_t − R_t) / N with respect to V_t, on response tokens and nowhere
else. A loss that counts padding, forgets to detach the advantages, or scales or signs a term wrongly has another. What
weights get is that gradient only where they hold none before, left from another update, and where the loss depends on
them through log π(a_t) and V_t alone: a bonus for entropy, or a penalty on weights, goes past both.

Shape suffixes: B sequences, T response positions.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge


class GradientProbe:
    """Compares the gradient of one minibatch with its closed form, over its micro-batches."""

    def __init__(self, mask_BT: torch.Tensor, value_coef: float) -> None:
        """Take the mask of the whole rollout, True on response tokens, and c."""
        self._mask_BT = mask_BT
        self._value_coef = value_coef
        self._rows: list[torch.Tensor] = []
        self._parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._attached = False
        self._left_over = False
        self._past_both = False

    def watch(
        self,
        rows: torch.Tensor,
        logprobs_BT: torch.Tensor,
        values_BT: torch.Tensor,
        advantages_BT: torch.Tensor,
        returns_BT: torch.Tensor,
        loss: torch.Tensor,
    ) -> None:
        """Remember a micro-batch, before its backward pass.

        Args:
            rows: [b] its rows of the rollout.
            logprobs_BT: [b, T] log π, with a gradient to come.
            values_BT: [b, T] V, with a gradient to come.
            advantages_BT: [b, T] A, meant to be a constant.
            returns_BT: [b, T] R, meant to be a constant.
            loss: what the backward pass begins at.
        """
        if not self._rows:
            weights = leaves([logprobs_BT, values_BT])
            self._left_over = any(one.grad is not None and bool(one.grad.any()) for one in weights)
        self._attached |= advantages_BT.requires_grad or returns_BT.requires_grad
        self._past_both |= next(leaves([loss], without=[logprobs_BT, values_BT]), None) is not None
        for x_BT in (logprobs_BT, values_BT):
            if x_BT.requires_grad:  # what is frozen has gradient 0, and that is not the closed form
                x_BT.retain_grad()
        mask_BT = self._mask_BT[rows]
        with torch.no_grad():
            policy_BT = torch.where(mask_BT, -advantages_BT, 0.0)
            value_BT = torch.where(mask_BT, self._value_coef * (values_BT - returns_BT), 0.0)
        self._rows.append(rows)
        self._parts.append((logprobs_BT, policy_BT, values_BT, value_BT))

    def metrics(self) -> dict[str, float]:
        """Return what the backward passes showed.

        ``first_gradient_error``: the largest deviation from the closed form, relative to its largest entry, for
        log-probs or values, whichever is worse; at least 1 where an advantage or return carries a gradient itself,
        weights have one already, or the loss depends on them past log-probs and values too.
        ``value_gradient_share``: the value loss's share of the squared gradient with respect to both.
        """
        errors, squares = [], []
        tokens = int(self._mask_BT[torch.cat(self._rows)].sum())
        for x, wanted in ((0, 1), (2, 3)):
            gradients = [_gradient(part[x]) * tokens for part in self._parts]
            expected = [part[wanted] for part in self._parts]
            largest = max(float(one.abs().max()) for one in expected)
            deviation = max(float((a - b).abs().max()) for a, b in zip(gradients, expected, strict=True))
            errors.append(deviation / max(largest, 1e-8))
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
