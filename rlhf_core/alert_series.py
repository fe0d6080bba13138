"""What the alert rules compute with: rows of a log, and windows of the rows before each row.

Every function looks backwards only, at a bounded number of rows, and its windows are laid by absolute row numbers; so
a log gives the same verdicts whether it is read at once, block by block or row by row. Pure: NumPy alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

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

    def __contains__(self, metric: str) -> bool:
        return metric in self.columns

    @property
    def rows(self) -> np.ndarray:
        """[N] absolute row numbers."""
        return self.offset + np.arange(len(next(iter(self.columns.values()))))

    def beginning(self, metric: str) -> np.ndarray:
        """Return [N] the median of the run's first ``HEAD`` rows; NaN in those rows themselves."""
        head = self.head[metric]
        start = float(np.median(head)) if len(head) == HEAD else np.nan
        return np.where(self.rows >= HEAD, start, np.nan)

    def baseline(self, metric: str, least: int = 2 * STRIDE) -> tuple[np.ndarray, np.ndarray]:
        """Return [N] median, and [N] spread (MAD as a standard deviation), of earlier rows; NaN where too few."""
        x, rows = self[metric], self.rows
        first = rows - rows % STRIDE  # of the rows that share a baseline
        anchors = np.unique(first)
        padded = np.concatenate([np.full(WINDOW, np.nan), x])
        ends = anchors - self.offset
        known = ends >= 0
        windows = np.full((len(anchors), WINDOW), np.nan)
        windows[known] = sliding_window_view(padded, WINDOW)[ends[known]]
        median = median_by_row(windows, least)
        spread = MAD_TO_STD * median_by_row(np.abs(windows - median[:, None]), least)
        which = np.searchsorted(anchors, first)
        return median[which], spread[which]

    def recent(self, metric: str, rows: int) -> np.ndarray:
        """Return [N] the median of each row and those just before it, ``rows`` together; NaN where there are fewer."""
        padded = np.concatenate([np.full(rows - 1, np.nan), self[metric]])
        return median_by_row(sliding_window_view(padded, rows), rows)


def median_by_row(x: np.ndarray, least: int) -> np.ndarray:
    """Return [N] the median of each row of [N, M] without its NaN; NaN where fewer than ``least`` numbers are left."""
    ordered = np.sort(x, axis=1)  # NaN goes last
    count = np.count_nonzero(~np.isnan(x), axis=1)
    low, high = np.maximum(count - 1, 0) // 2, np.minimum(count // 2, x.shape[1] - 1)
    at = np.arange(len(x))
    return np.where(count >= least, (ordered[at, low] + ordered[at, high]) / 2, np.nan)


def run_lengths(flags: np.ndarray, carried: int) -> np.ndarray:
    """Return [N] how many flags in a row are True up to each; ``carried`` were True just before the first."""
    index = np.arange(1, len(flags) + 1)
    last_false = np.maximum.accumulate(np.where(flags, 0, index))
    return np.where(last_false == 0, index + carried, index - last_false) * flags
