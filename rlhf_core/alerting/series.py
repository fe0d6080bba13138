"""What the alert rules compute with: rows of a log, and windows of the rows before each row.

Every function looks backwards only, at a bounded number of rows, and its windows are laid by absolute row numbers; so
a log gives the same verdicts whether it is read at once, block by block or row by row. Pure: NumPy alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

WINDOW = 32
"""Rows that a baseline is taken over."""
STRIDE = 4
"""Rows that share a baseline: it is taken over the ``WINDOW`` rows before the first of them."""
HEAD = 5
"""First rows of a run, whose median is what it began with."""
CONTEXT = WINDOW + STRIDE
"""Rows that a verdict may look back to."""
MAD_TO_STD = 1.4826
"""Standard deviation of a normal variable over its median absolute deviation."""

NONFINITE = "nonfinite"
STEP_ADVANCE = "step_advance"
DERIVED = (NONFINITE, STEP_ADVANCE, "kl_per_token", "rollout_logprob_diff")
"""Columns made of a log's own: non-finite values of a row, its step less the one before, and what trainers log under
several names."""


@dataclass(frozen=True)
class Series:
    """Consecutive rows in which everything that a rule needs was logged, and was finite."""

    columns: Mapping[str, np.ndarray]
    """[N] float64 by metric."""
    offset: int
    """How many such rows came before these."""
    head: Mapping[str, np.ndarray]
    """[at most HEAD] the very first rows."""

    def __getitem__(self, metric: str) -> np.ndarray:
        return self.columns[metric]

    def __len__(self) -> int:
        return len(self.columns["step"])

    @property
    def rows(self) -> np.ndarray:
        """[N] absolute row numbers."""
        return self.offset + np.arange(len(self))

    def beginning(self, metric: str) -> np.ndarray:
        """Return [N] the median of the run's first ``HEAD`` rows; NaN in those rows themselves."""
        return self._of_head(metric, np.median)

    def largest_at_first(self, metric: str) -> np.ndarray:
        """Return [N] the largest of the run's first ``HEAD`` rows; NaN in those rows themselves."""
        return self._of_head(metric, np.max)

    def _of_head(self, metric: str, figure: Callable[[np.ndarray], Any]) -> np.ndarray:
        head = self.head[metric]
        return np.where(self.rows >= HEAD, float(figure(head)) if len(head) == HEAD else np.nan, np.nan)

    def baseline(self, metric: str, least: int = 2 * STRIDE) -> tuple[np.ndarray, np.ndarray]:
        """Return [N] median, and [N] spread (MAD as a standard deviation), of earlier rows; NaN where too few."""
        x, rows = self[metric], self.rows
        shared = rows // STRIDE  # one number for the rows that share a baseline
        anchors = np.arange(shared[0], shared[-1] + 1) * STRIDE
        padded = np.concatenate([np.full(WINDOW, np.nan), x])
        ends = anchors - self.offset
        known = ends >= 0
        windows = np.full((len(anchors), WINDOW), np.nan)
        windows[known] = sliding_window_view(padded, WINDOW)[ends[known]]
        median = median_by_row(windows, least)
        spread = MAD_TO_STD * median_by_row(np.abs(windows - median[:, None]), least)
        which = shared - shared[0]
        return median[which], spread[which]

    def recent(self, metric: str, rows: int) -> np.ndarray:
        """Return [N] the median of each row and those just before it, ``rows`` together; NaN where there are fewer."""
        padded = np.concatenate([np.full(rows - 1, np.nan), self[metric]])
        return median_by_row(sliding_window_view(padded, rows), rows)

    def recent_mean(self, values: np.ndarray, rows: int) -> np.ndarray:
        """Return [N] the mean of each of [N] values and those just before it; NaN where there are fewer."""
        padded = np.concatenate([np.full(rows - 1, np.nan), values])
        return np.sum([padded[shift : shift + len(values)] for shift in range(rows)], axis=0) / rows


def median_by_row(x: np.ndarray, least: int) -> np.ndarray:
    """Return [N] the median of each row of [N, M] without its NaN; NaN where fewer than ``least`` numbers are left."""
    ordered = np.sort(x, axis=1)  # NaN goes last
    count = np.count_nonzero(~np.isnan(x), axis=1)
    low, high = np.maximum(count - 1, 0) // 2, np.minimum(count // 2, x.shape[1] - 1)
    at = np.arange(len(x))
    # Halved before they are added: the sum of two large numbers may be none.
    return np.where(count >= least, ordered[at, low] / 2 + ordered[at, high] / 2, np.nan)


def run_lengths(flags: np.ndarray, carried: int) -> np.ndarray:
    """Return [N] how many flags in a row are True up to each; ``carried`` were True just before the first."""
    index = np.arange(1, len(flags) + 1)
    last_false = np.maximum.accumulate(np.where(flags, 0, index))
    return np.where(last_false == 0, index + carried, index - last_false) * flags


def derive(
    block: Mapping[str, np.ndarray], logged: Mapping[str, np.ndarray], step_before: float
) -> dict[str, np.ndarray]:
    """Return the columns ``DERIVED`` of a block of rows; NaN where a row has nothing to make them of.

    Args:
        block: ``step`` and metrics, [N] float64.
        logged: [N] bool by metric, where a row has it.
        step_before: the step of the row before the first.
    """
    nothing = np.full(len(block["step"]), np.nan)
    lost = np.zeros_like(nothing)
    for name, has in logged.items():
        lost += has & ~np.isfinite(block[name])
    with np.errstate(divide="ignore", invalid="ignore"):
        per_token = block.get("kl", nothing) / block.get("response_length_mean", nothing)
    return {
        NONFINITE: lost,
        STEP_ADVANCE: np.diff(block["step"], prepend=step_before),
        "kl_per_token": _first_finite(block.get("kl_per_token", nothing), per_token, block.get("kl_k3", nothing)),
        "rollout_logprob_diff": _first_finite(
            block.get("rollout_logprob_diff_p99", nothing), block.get("rollout_logprob_diff_mean", nothing)
        ),
    }


def _first_finite(*columns: np.ndarray) -> np.ndarray:
    """Return [N] of each row the first column that is finite there."""
    found = columns[-1]
    for column in reversed(columns[:-1]):
        found = np.where(np.isfinite(column), column, found)
    return found
