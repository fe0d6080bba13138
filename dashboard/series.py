"""Curves of bounded size: a log of any length becomes buckets of rows, each with minimum, maximum and mean."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dashboard.jsonl import Columns

BUCKETS = 8192
FEWEST = 64
"""Buckets that there is room for at first."""
RECENT = 8192
AXES = ("step", "time_s", "tokens")
"""What a curve can be drawn over; none of them falls within a log."""

_MERGES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "low": np.minimum,
    "high": np.maximum,
    "total": np.add,
    "count": np.add,
    "bad": np.add,
}
_EMPTY = {"low": np.inf, "high": -np.inf, "total": 0.0, "count": 0.0, "bad": 0.0}


@dataclass(frozen=True)
class Curve:
    """A metric over an axis, [K] each: NaN where a bucket has no finite value."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    bad: np.ndarray
    """How many values of a bucket were not finite."""


class Buckets:
    """Minimum, maximum, sum and counts of consecutive rows; when the buckets are full, each two become one."""

    def __init__(self, capacity: int = BUCKETS) -> None:
        self.capacity = capacity
        self.width = 1
        self.rows = 0
        self._room = min(capacity, FEWEST)
        self._parts: dict[str, dict[str, np.ndarray]] = {}

    def extend(self, columns: Columns) -> None:
        """Add rows."""
        count = len(next(iter(columns.values()), ()))
        if not count:
            return
        while (self.rows + count - 1) // self.width >= self.capacity:
            self._coarsen()
        self._make_room((self.rows + count - 1) // self.width + 1)
        bucket = (self.rows + np.arange(count)) // self.width
        starts = np.flatnonzero(np.diff(bucket, prepend=-1))
        into = bucket[starts]
        for name, column in columns.items():
            if name not in self._parts:
                self._parts[name] = {part: np.full(self._room, empty) for part, empty in _EMPTY.items()}
            values, present = np.ma.getdata(column), ~np.ma.getmaskarray(column)
            finite = np.isfinite(values) & present
            new = {
                "low": np.where(finite, values, np.inf),
                "high": np.where(finite, values, -np.inf),
                "total": np.where(finite, values, 0.0),
                "count": finite.astype(np.float64),
                "bad": (present & ~finite).astype(np.float64),
            }
            for part, merge in _MERGES.items():
                held = self._parts[name][part]
                held[into] = merge(held[into], merge.reduceat(new[part], starts))  # type: ignore[attr-defined]
        self.rows += count

    def _make_room(self, buckets: int) -> None:
        """Hold twice as many buckets until they are enough: a short log of many metrics takes little memory."""
        if buckets <= self._room:
            return
        while self._room < buckets:
            self._room = min(2 * self._room, self.capacity)
        for parts in self._parts.values():
            for part, held in parts.items():
                parts[part] = np.concatenate([held, np.full(self._room - len(held), _EMPTY[part])])

    def _coarsen(self) -> None:
        half = self._room // 2
        for parts in self._parts.values():
            for part, merge in _MERGES.items():
                held = parts[part]
                held[:half] = merge(held[::2], held[1::2])
                held[half:] = _EMPTY[part]
        self.width *= 2

    @property
    def names(self) -> list[str]:
        """Return what there are curves of."""
        return list(self._parts)

    def sums(self, name: str) -> tuple[float, int]:
        """Return the sum of a metric's finite values, and how many there are."""
        parts = self._parts.get(name)
        return (float(parts["total"].sum()), int(parts["count"].sum())) if parts else (0.0, 0)

    def curve(self, name: str, axis: str) -> Curve:
        """Return the whole curve of a metric, a point a bucket."""
        used = -(-self.rows // self.width)
        if name not in self._parts or axis not in self._parts:
            return Curve(*np.full((5, 0), np.nan))
        parts = {part: values[:used] for part, values in self._parts[name].items()}
        return _curve(self._parts[axis]["high"][:used], parts)


def recent_curve(columns: Columns, name: str, axis: str) -> Curve:
    """Return the curve of rows that are held one by one."""
    if name not in columns or axis not in columns:
        return Curve(*np.full((5, 0), np.nan))
    one = Buckets(max(1, len(columns[name])))
    one.extend({name: columns[name], axis: columns[axis]})
    return one.curve(name, axis)


def _curve(x: np.ndarray, parts: dict[str, np.ndarray]) -> Curve:
    some = parts["count"] > 0
    low, high = (np.where(some, parts[part], np.nan) for part in ("low", "high"))
    mean = np.divide(parts["total"], parts["count"], out=np.full(len(x), np.nan), where=some)
    return Curve(x, mean, low, high, parts["bad"])


def clip(curve: Curve, first: float) -> Curve:
    """Return the part of a curve from a place of its axis on."""
    kept = curve.x >= first
    return Curve(curve.x[kept], curve.mean[kept], curve.low[kept], curve.high[kept], curve.bad[kept])


def decimate(curve: Curve, points: int) -> Curve:
    """Return at most ``points`` points of a curve; no extreme and no value that was not finite is lost."""
    count = len(curve.x)
    if count <= points:
        return curve
    starts = np.unique(np.arange(points) * count // points)
    some = np.isfinite(curve.mean)
    # A mean of means: the buckets of one curve hold equally many rows, but for the last.
    parts = {
        "low": np.minimum.reduceat(np.where(some, curve.low, np.inf), starts),
        "high": np.maximum.reduceat(np.where(some, curve.high, -np.inf), starts),
        "total": np.add.reduceat(np.where(some, curve.mean, 0.0), starts),
        "count": np.add.reduceat(some.astype(np.float64), starts),
        "bad": np.add.reduceat(curve.bad, starts),
    }
    return _curve(np.maximum.reduceat(curve.x, starts), parts)


def smooth(curve: Curve, weight: float) -> Curve:
    """Return a curve whose mean is an exponential moving average, m_k = (w m_{k−1} + (1 − w) x_k) / (1 − w^k).

    The average starts unbiased, as in Adam (Kingma and Ba, 2015, section 3). A gap is passed over. Minimum and maximum
    are those of the raw values that weigh most in the average, the last 1 / (1 − w): the band that is drawn behind.

    Args:
        curve: what to smooth.
        weight: w in [0, 1).
    """
    if not weight or not len(curve.x):
        return curve
    average, norm = 0.0, 0.0
    smoothed = np.full(len(curve.mean), np.nan)
    for place, value in enumerate(curve.mean.tolist()):
        if value == value:
            average, norm = weight * average + (1 - weight) * value, weight * norm + (1 - weight)
            smoothed[place] = average / norm
    span = round(1 / (1 - weight))
    low = _windows(curve.low, span, np.inf).min(axis=1)
    high = _windows(curve.high, span, -np.inf).max(axis=1)
    return Curve(
        curve.x, smoothed, np.where(np.isinf(low), np.nan, low), np.where(np.isinf(high), np.nan, high), curve.bad
    )


def _windows(values: np.ndarray, span: int, missing: float) -> np.ndarray:
    """Return [K, span]: each value with those before it, ``missing`` where there is none."""
    filled = np.where(np.isfinite(values), values, missing)
    return np.lib.stride_tricks.sliding_window_view(np.concatenate([np.full(span - 1, missing), filled]), span)
