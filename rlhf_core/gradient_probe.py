"""A look at the first gradient of an update, where it has a closed form.

Before any update ρ = 1 and V = V_old, nothing is clipped, and the loss (Σ_t −ρ_t A_t + c ½ (V_t − R_t)²) / N has the
gradient −A_t / N with respect to log π(a_t) and c (V_t − R_t) / N with respect to V_t, on response tokens and nowhere
else. A loss that counts padding, forgets to detach the advantages, or scales or signs a term wrongly has another.

Shape suffixes: B sequences, T response positions.
"""

import torch


class GradientProbe:
    """Compares the gradient of one minibatch with its closed form, over its micro-batches."""

    def __init__(self) -> None:
        self._parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._attached = False

    def watch(
        self,
        logprobs_BT: torch.Tensor,
        values_BT: torch.Tensor,
        advantages_BT: torch.Tensor,
        returns_BT: torch.Tensor,
        mask_BT: torch.Tensor,
        *,
        tokens: int,
        value_coef: float,
    ) -> None:
        """Remember a micro-batch, before its backward pass.

        Args:
            logprobs_BT: [B, T] log π, with a gradient to come.
            values_BT: [B, T] V, with a gradient to come.
            advantages_BT: [B, T] A, meant to be a constant.
            returns_BT: [B, T] R, meant to be a constant.
            mask_BT: [B, T] True on response tokens.
            tokens: N, response tokens of the whole minibatch.
            value_coef: c.
        """
        self._attached |= advantages_BT.requires_grad or returns_BT.requires_grad
        for x_BT in (logprobs_BT, values_BT):
            x_BT.retain_grad()
        with torch.no_grad():
            policy_BT = torch.where(mask_BT, -advantages_BT / tokens, 0.0)
            value_BT = torch.where(mask_BT, value_coef * (values_BT - returns_BT) / tokens, 0.0)
        self._parts += [(logprobs_BT, policy_BT, values_BT, value_BT)]

    def metrics(self) -> dict[str, float]:
        """Return what the backward passes showed.

        ``first_gradient_error``: the largest deviation from the closed form, relative to its largest entry, for
        log-probs or values, whichever is worse; at least 1 where an advantage or return carries a gradient itself.
        ``value_gradient_share``: the value loss's share of the squared gradient with respect to both.
        """
        errors, squares = [], []
        for x, wanted in ((0, 1), (2, 3)):
            largest = max(float(part[wanted].abs().max()) for part in self._parts)
            deviation = max(float((_gradient(part[x]) - part[wanted]).abs().max()) for part in self._parts)
            errors.append(deviation / max(largest, 1e-12))
            squares.append(sum(float(_gradient(part[x]).double().square().sum()) for part in self._parts))
        error = max(errors)
        return {
            "first_gradient_error": max(error, 1.0) if self._attached else error,
            "value_gradient_share": squares[1] / sum(squares) if sum(squares) else 0.0,
        }


def _gradient(x_BT: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x_BT) if x_BT.grad is None else x_BT.grad
