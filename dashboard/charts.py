"""Vega-Lite charts.

A specification depends on what is chosen only, and all that grows is data: so a chart that is on the page already takes
new rows in place and does not flicker. Texts of a log are drawn, never interpreted.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dashboard import questions
from dashboard.series import Curve
from rlhf_core.terminal import printable

Spec = dict[str, Any]

COLOURS = ("#3b82f6", "#f97316", "#a855f7", "#14b8a6", "#ec4899", "#84cc16", "#eab308", "#64748b")
"""One for each run that is shown; all can be told apart on white and on black."""
GOOD, WARNING, CRITICAL, INFO = "#16a34a", "#d97706", "#dc2626", "#0284c7"
TEXT = "#6c7785"
"""Grey that is read on white and on black, 4.5:1 on each: what is drawn does not know the page's theme."""
SEVERITY_COLOURS = {"critical": CRITICAL, "warning": WARNING, "info": INFO}
CHART_HEIGHT = 148
THINNEST = 10
"""Pixels that a healthy range has at least, so that one of a single value is seen behind its curve."""
AXIS_TITLES = {"step": "step", "time_s": "time, s", "tokens": "tokens"}
WHOLE_AXES = ("step", "tokens")
TOKEN_LINE = 92
"""Characters of a line of tokens."""
TOKEN_GAP = 0.6
TOKEN_COLOURS = ("#2563eb", "#94a3b800", "#dc2626")

_SCHEMA = pa.schema(
    [("kind", pa.string()), ("run", pa.string()), ("label", pa.string())]
    + [(name, pa.float64()) for name in ("x", "y", "low", "high")]
)
_QUIET = {
    "view": {"stroke": None},
    "axis": {"labelFontSize": 10, "titleFontSize": 10, "domain": False, "tickSize": 3, "labelPadding": 3},
    "axisX": {"grid": False},
    "axisY": {"gridOpacity": 0.35},
    # Or else the page draws a chart anew when its rows pass a number from which they are not described one by one.
    "mark": {"aria": False},
}
# Where a mark lies, without a say in how far the axis goes.
_PLACE: Spec = {"value": {"expr": "scale('x', datum.x)"}}
# As many digits as tell the ticks of an axis apart, four at least.
_DIGITS = "max(4, min(12, 3 + ceil(log(abs(datum.value) / abs(domain('y')[1] - domain('y')[0])) / LN10)))"
_Y_LABEL = (
    f"abs(datum.value) >= {questions.LARGEST_SPELLED} ? format(datum.value, '.1~e') : "
    f"abs(datum.value) >= 1000 ? format(datum.value, '.' + {_DIGITS} + '~s') : "
    "datum.value && abs(datum.value) < 0.001 ? format(datum.value, '.1~e') : "
    f"format(datum.value, '.' + {_DIGITS} + '~g')"
)
_X_LABEL = (
    f"abs(datum.value) >= {questions.LARGEST_SPELLED} ? format(datum.value, '.1~e') : "
    "abs(datum.value) >= 1000 ? format(datum.value, '~s') : format(datum.value, '~g')"
)
ROOM = 0.1
"""Of a curve that never moves: how far its axis goes beyond it, as a share of its value; 1 around 0."""
NOTHING_POSITIVE = "no value above 0, which a logarithmic axis could show"
# Drawn on one canvas: some twenty charts with a thousand points each are too many elements for a page.
_EMBED = {"embedOptions": {"renderer": "canvas"}}


def metric_chart(
    title: str,
    healthy: tuple[float | None, float | None],
    runs: Sequence[str],
    *,
    axis: str,
    log: bool,
) -> Spec:
    """Return the chart of one metric over several runs: healthy range, raw band, curve, marks; for ``metric_rows``."""
    y_scale: Spec = {"type": "log"} if log else {"zero": False, "nice": True}
    x: Spec = {"field": "x", "type": "quantitative", "title": AXIS_TITLES[axis]}
    x["scale"] = {"nice": False, "zero": False}
    x["axis"] = {"labelExpr": _X_LABEL, "tickCount": 4, "labelFlush": True, "titlePadding": 2}
    x["axis"] |= {"tickMinStep": 1} if axis in WHOLE_AXES else {}
    y: Spec = {"field": "y", "type": "quantitative", "title": None, "scale": y_scale}
    y["axis"] = {"labelExpr": _Y_LABEL, "tickCount": 3, "minExtent": 34}
    colour: Spec = {"field": "run", "type": "nominal", "legend": None}
    colour["scale"] = {"domain": list(runs), "range": list(COLOURS[: len(runs)])}
    severity = {
        "condition": [{"test": f"datum.label === '{name}'", "value": value} for name, value in SEVERITY_COLOURS.items()]
    }
    layers: list[Spec] = [
        _layer(
            "value", {"type": "area", "opacity": 0.18}, x=x, y=y | {"field": "low"}, y2={"field": "high"}, color=colour
        ),
        _layer("value", {"type": "line", "strokeWidth": 1.5}, x=x, y=y, color=colour),
        _layer("alert", {"type": "rule", "strokeWidth": 1.5, "opacity": 0.8}, x=_PLACE, color=severity),
        _layer("chosen", {"type": "rule", "strokeDash": [3, 3], "color": "#64748b"}, x=_PLACE),
        _layer(
            "bad",
            {"type": "point", "shape": "cross", "angle": 45, "filled": True, "size": 70, "color": CRITICAL}
            | {"clip": False},  # or else half of one at the last step is lost
            x=_PLACE,
            y={"value": 5},
            tooltip=[{"field": "label", "title": "not finite"}, {"field": "x", "title": "at", "format": ",.6~g"}],
        ),
        _layer(
            "value",
            {"type": "point", "filled": True, "size": 30},
            x=x,
            y=y,
            color=colour,
            opacity={"condition": {"param": "hover", "empty": False, "value": 1}, "value": 0},
            tooltip=[
                {"field": "run", "title": "run"},
                {"field": "x", "title": "at", "format": ",.6~g"},
                {"field": "y", "title": "value", "format": ".5~g"},
                {"field": "low", "title": "lowest", "format": ".5~g"},
                {"field": "high", "title": "highest", "format": ".5~g"},
            ],
        )
        | {
            "params": [
                {
                    "name": "hover",
                    "select": {
                        "type": "point",
                        "on": "pointermove",
                        "nearest": True,
                        "clear": "pointerout",
                        "encodings": ["x"],
                    },
                }
            ]
        },
        _layer("room", {"type": "point", "opacity": 0}, y=y),
        _layer(
            "empty",
            _caption("center", 400),
            x={"value": {"expr": "width / 2"}},
            y={"value": CHART_HEIGHT / 2},
            text={"field": "label"},
        ),
        _layer(
            "latest", _caption("right", 700), x={"value": {"expr": "width"}}, y={"value": -5}, text={"field": "label"}
        ),
        {
            "data": {"values": [{}]},
            "mark": _caption("left", 600),
            "encoding": {"x": {"value": 0}, "y": {"value": -5}, "text": {"value": title}},
        },
    ]
    if healthy != (None, None):
        layers.insert(0, _healthy_range(*healthy))
    return {
        "height": CHART_HEIGHT,
        "padding": {"left": 2, "right": 6, "top": 2, "bottom": 2},
        "layer": layers,
        "config": _QUIET,
        "usermeta": _EMBED,
    }


def _layer(kind: str, mark: Spec, **encoding: Any) -> Spec:
    return {
        "transform": [{"filter": f"datum.kind === '{kind}'"}],
        "mark": {"clip": True} | mark,
        "encoding": encoding,
    }


def _caption(align: str, weight: int) -> Spec:
    caption = {"type": "text", "align": align, "baseline": "bottom", "clip": False}
    return caption | {"fontSize": 12.5, "fontWeight": weight, "color": TEXT}


def _healthy_range(low: float | None, high: float | None) -> Spec:
    """Return a green field where values are healthy; it does not stretch the axis to where no value is."""
    top = "0" if high is None else f"(isFinite(scale('y', {high})) ? scale('y', {high}) : 0)"
    bottom = "height" if low is None else f"(isFinite(scale('y', {low})) ? scale('y', {low}) : height)"
    middle = f"({top} + {bottom}) / 2"
    return {
        "data": {"values": [{}]},
        "mark": {"type": "rect", "color": GOOD, "opacity": 0.1, "clip": True, "stroke": GOOD, "strokeOpacity": 1},
        "encoding": {
            "x": {"value": 0},
            "x2": {"value": {"expr": "width"}},
            "y": {"value": {"expr": f"max(-2, min({top}, {middle} - {THINNEST / 2}))"}},
            "y2": {"value": {"expr": f"min(height + 2, max({bottom}, {middle} + {THINNEST / 2}))"}},
        },
    }


def metric_rows(
    curves: Mapping[str, Curve],
    *,
    log: bool,
    latest: str = "",
    alerts: Sequence[tuple[float, str]] = (),
    chosen: float | None = None,
) -> pa.Table:
    """Return the data of ``metric_chart``.

    Args:
        curves: by run, under names that can be shown.
        log: whether the axis is logarithmic; what is not positive is left out then.
        latest: the text at the upper right.
        alerts: places on the axis with severities.
        chosen: the place of the step that is looked at.
    """
    curves = {run: _positive(curve) for run, curve in curves.items()} if log else curves
    parts = [part for run, curve in curves.items() for part in _curve_rows(run, curve)]
    ends = _ends(curves.values())
    parts += [_table("room", "", "", x=np.full(2, np.nan), y=_room(*ends, log))] if ends else []
    parts += [_mark("empty", 0.0, NOTHING_POSITIVE)] if log and not ends else []
    parts += [_mark("latest", 0.0, latest)] if latest else []
    parts += [_mark("alert", place, severity) for place, severity in alerts]
    parts += [_mark("chosen", chosen, "")] if chosen is not None else []
    return pa.concat_tables(parts) if parts else _SCHEMA.empty_table()


def _positive(curve: Curve) -> Curve:
    """Return what a logarithmic axis can show of a curve."""
    mean, low, high = (np.where(values > 0, values, np.nan) for values in (curve.mean, curve.low, curve.high))
    return Curve(curve.x, mean, np.where(np.isnan(low), np.fmin(mean, high), low), high, curve.bad)


def _ends(curves: Iterable[Curve]) -> tuple[float, float] | None:
    """Return the smallest and the largest value that is drawn, or None."""
    drawn = [values[np.isfinite(values)] for curve in curves for values in (curve.mean, curve.low, curve.high)]
    values = np.concatenate(drawn) if drawn else np.empty(0)
    return (float(values.min()), float(values.max())) if len(values) else None


def _room(low: float, high: float, log: bool) -> np.ndarray:
    """Return what an axis has to reach: of values that are all one, some room around it, or else nothing has a place.

    On an axis without width every limit lies where the value lies.
    """
    if low < high:
        return np.array([low, high])
    if log:
        return np.array([low / (1 + ROOM), low * (1 + ROOM)])
    room = ROOM * abs(low) or 1.0
    return np.array([low - room, low + room])


def _curve_rows(run: str, curve: Curve) -> list[pa.Table]:
    bad = np.flatnonzero(curve.bad)
    return [
        _table("value", run, "", x=curve.x, y=curve.mean, low=curve.low, high=curve.high),
        _table("bad", run, run, x=curve.x[bad]),
    ]


def _mark(kind: str, place: float, label: str) -> pa.Table:
    return _table(kind, "", label, x=np.array([place]))


def _table(kind: str, run: str, label: str, **numbers: np.ndarray) -> pa.Table:
    count = len(numbers["x"])
    columns: list[pa.Array] = [pa.repeat(text, count) for text in (kind, run, label)]
    for name in _SCHEMA.names[3:]:
        # NaN as null: a gap in the curve.
        values = numbers.get(name)
        columns.append(pa.nulls(count, pa.float64()) if values is None else pa.array(values, from_pandas=True))
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


def stage_bars(height_of_bar: int = 22) -> Spec:
    """Return bars of ``stage``, ``milliseconds`` and ``share``, the stages inside others indented by their names."""
    y = {
        "field": "stage",
        "type": "nominal",
        "sort": None,
        "title": None,
        "axis": {"labelLimit": 260, "labelFontSize": 12},
    }
    x = {"field": "milliseconds", "type": "quantitative", "title": "milliseconds a step"}
    return {
        "height": {"step": height_of_bar},
        # Room for the share beside the longest bar.
        "padding": {"left": 2, "right": 48, "top": 2, "bottom": 2},
        "encoding": {"y": y},
        "layer": [
            {
                "mark": {"type": "bar", "cornerRadiusEnd": 2, "color": COLOURS[0]},
                "encoding": {
                    "x": x,
                    "opacity": {"condition": {"test": "datum.inner", "value": 0.45}, "value": 1},
                    "tooltip": [
                        {"field": "stage", "title": "stage"},
                        {"field": "milliseconds", "title": "ms a step", "format": ",.3~f"},
                        {"field": "share", "title": "share of the step", "format": ".1%"},
                    ],
                },
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 4, "fontSize": 11, "color": TEXT},
                "encoding": {"x": x, "text": {"field": "share", "format": ".1%"}},
            },
        ],
        "config": _QUIET,
        "usermeta": _EMBED,
    }


def token_map(limit: float) -> Spec:
    """Return a completion's tokens as text, underlined in the colour of their log-ratio; for ``token_rows``.

    Red is what the policy is likelier to draw than the reference, blue what it is less likely to.

    Args:
        limit: the log-ratio, in nats, of the full colour.
    """
    line = {"field": "line", "type": "ordinal", "axis": None, "scale": {"paddingInner": 0.15}}
    start = {
        "field": "start",
        "type": "quantitative",
        "axis": None,
        "scale": {"domain": [0, TOKEN_LINE], "nice": False},
    }
    tooltip = [{"field": "token", "title": "token"}, {"field": "position", "title": "position"}]
    for name, title in (
        ("ratio", "log-ratio, nats"),
        ("logprob", "policy log-prob"),
        ("reference", "reference log-prob"),
    ):
        tooltip.append({"field": name, "title": title, "format": "+.4f" if name == "ratio" else ".4f"})
    colour: Spec = {"field": "ratio", "type": "quantitative", "legend": None}
    colour["scale"] = {"domain": [-limit, 0, limit], "range": list(TOKEN_COLOURS), "clamp": True}
    return {
        "width": TOKEN_LINE * 7.25,
        "height": {"step": 26},
        "encoding": {"y": line},
        "layer": [
            {
                "mark": {"type": "bar", "height": 5, "yOffset": 10, "cornerRadius": 1},
                "encoding": {"x": start, "x2": {"field": "end"}, "color": colour, "tooltip": tooltip},
            },
            {
                "mark": {"type": "text", "align": "left", "font": "monospace", "fontSize": 12, "color": TEXT},
                "encoding": {"x": start, "text": {"field": "token"}, "tooltip": tooltip},
            },
        ],
        "config": _QUIET,
        "usermeta": _EMBED,
    }


def token_rows(tokens: Sequence[str], logprobs: Sequence[float], references: Sequence[float]) -> pa.Table:
    """Return the data of ``token_map``: tokens laid out in lines of ``TOKEN_LINE`` characters."""
    rows: list[dict[str, Any]] = []
    line, at = 0, 0.0
    for position, (token, logprob, reference) in enumerate(zip(tokens, logprobs, references, strict=True)):
        text = printable(token).replace(" ", "\u00a0") or "∅"
        text = text if len(text) <= TOKEN_LINE // 2 else text[: TOKEN_LINE // 2 - 1] + "…"
        if at + len(text) > TOKEN_LINE:
            line, at = line + 1, 0.0
        rows.append({"token": text, "position": position, "line": line, "start": at, "end": at + len(text)})
        rows[-1] |= {"ratio": logprob - reference, "logprob": logprob, "reference": reference}
        at += len(text) + TOKEN_GAP
    return pa.Table.from_pylist(rows)
