"""What an update's minibatches add up to."""

import math
from dataclasses import dataclass

import numpy as np
import torch

LOSS_SUMS = ("policy_loss", "value_loss", "approx_kl", "clip_frac")
"""What a minibatch adds up over its micro-batches, in this order."""


@dataclass(frozen=True)
class MinibatchSums:
    """What is added up over the micro-batches of a minibatch."""

    sums: torch.Tensor
    """Policy loss (with the KL penalty that is part of it), value loss, k3 of new against old, clipped tokens."""
    deviation: torch.Tensor
    """max |ρ − 1|."""
    count: int
    """What the losses are divided by."""
    tokens: int
    """Response tokens."""


class UpdateStatistics:
    """Sums over an update's minibatches, from which its metrics are made."""

    def __init__(self) -> None:
        self._sums = np.zeros(len(LOSS_SUMS))
        self._counts = np.zeros(len(LOSS_SUMS))
        self._norms: list[float] = []
        self._first_deviation: float | None = None

    def add(self, minibatch: MinibatchSums, norm: float) -> None:
        """Add a minibatch and its gradient norm."""
        self._sums += minibatch.sums.double().cpu().numpy()
        self._counts += [minibatch.count, minibatch.count, minibatch.tokens, minibatch.tokens]
        self._norms.append(norm)
        if self._first_deviation is None:
            self._first_deviation = minibatch.deviation.item()

    def metrics(self, *, value: bool) -> dict[str, float]:
        """Return the update's metrics: means over response tokens, and over optimizer steps for the norm.

        Losses are averaged as they are in the update. Without a value model there is no ``value_loss``.
        """
        assert self._first_deviation is not None
        means = dict(zip(LOSS_SUMS, (self._sums / self._counts).tolist(), strict=True))
        if not value:
            del means["value_loss"]
        return means | {
            "ratio_max_dev_first": self._first_deviation,
            "grad_norm": math.fsum(self._norms) / len(self._norms),
            "grad_norm_max": max(self._norms),
        }
