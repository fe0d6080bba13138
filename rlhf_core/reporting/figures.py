"""The pictures of a report: curves with their healthy ranges, time and memory by stage, as PNG."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf_core.metrics import Metric

INK, MUTED, LINE, HEALTHY = "#1f2430", "#6b7280", "#2563a8", "#d9efe0"
COLUMNS = 4
WIDTH_IN, DPI = 13.2, 160


def curves(metrics: Sequence[Metric], columns: Mapping[str, np.ndarray]) -> bytes:
    """Return small charts of metrics over steps; where a run that learns usually lies is green."""
    rows = math.ceil(len(metrics) / COLUMNS)
    figure = Figure(figsize=(WIDTH_IN, 2.25 * rows), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(hspace=0.06, wspace=0.04)  # type: ignore[union-attr,call-arg]
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for place in axes[len(metrics) :]:
        place.set_axis_off()
    for metric, place in zip(metrics, axes, strict=False):
        _curve(place, metric, np.asarray(columns["step"]), np.ma.filled(columns[metric.name].astype(float), np.nan))
    return _png(figure)


def _curve(axes: Axes, metric: Metric, steps: np.ndarray, values: np.ndarray) -> None:
    good = np.isfinite(values)
    axes.plot(steps[good], values[good], color=LINE, linewidth=1.4, marker="." if good.sum() < 25 else None, zorder=3)
    low, high = axes.get_ylim()
    floor, ceiling = metric.healthy
    if floor is not None or ceiling is not None:
        bottom, top = (low if floor is None else floor), (high if ceiling is None else ceiling)
        axes.axhspan(max(bottom, low), max(min(top, high), max(bottom, low)), color=HEALTHY, linewidth=0, zorder=0)
        for edge in (floor, ceiling):
            if edge is not None and low < edge < high:
                axes.axhline(edge, color="#7fb894", linewidth=0.8, zorder=1)
        axes.set_ylim(low, high)
    for step in steps[~good]:
        axes.axvline(step, color="#c0392b", linewidth=0.8, linestyle=":")
    unit = "" if metric.unit == "1" else f"  [{metric.unit}]"
    axes.set_title(f"{metric.name}{unit}", fontsize=9, color=INK, loc="left")
    if good.any():
        axes.set_title(f"{values[good][-1]:.4g}", fontsize=9, color=LINE, loc="right")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:.6g}")
    _plain(axes)


def bars(labels: Sequence[str], values: Sequence[float], texts: Sequence[str], title: str) -> bytes:
    """Return horizontal bars from top to bottom, each with a text at its end; what lies inside another is indented."""
    figure = Figure(figsize=(WIDTH_IN, 0.32 * len(labels) + 0.7), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    inner = ["/" in label for label in labels]
    places = range(len(labels))
    axes.barh(places, values, color=["#9cc0e2" if one else LINE for one in inner], height=0.7)
    shown = [f"     {label.rpartition('/')[2]}" if one else label for label, one in zip(labels, inner, strict=True)]
    axes.set_yticks(places, shown)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values, default=0) * 1.16 or 1.0)
    for place, value, text in zip(places, values, texts, strict=True):
        axes.annotate(
            text, (value, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9, color=INK
        )
    axes.set_title(title, fontsize=9, color=MUTED, loc="left")
    _plain(axes)
    axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=9.5)
    return _png(figure)


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#c9ced6")
    axes.tick_params(labelsize=8, colors=MUTED, length=2)


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    # No software or date in the file: the same figures give the same bytes.
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()
