"""The specifications and the data of the charts; what they look like is for a browser."""

import tomllib

import numpy as np
import pytest
from dashboard_server import ROOT

from dashboard import charts, questions
from dashboard.series import Curve

pytestmark = pytest.mark.m3


def curve(*values: float) -> Curve:
    y = np.array(values)
    return Curve(np.arange(len(y), dtype=float), y, y, y, np.isnan(y).astype(float))


def rows(kind: str, *curves: Curve, log: bool = False) -> list[dict]:
    table = charts.metric_rows({str(number): one for number, one in enumerate(curves)}, log=log)
    return [row for row in table.to_pylist() if row["kind"] == kind]


def layer(spec: charts.Spec, kind: str) -> charts.Spec:
    return next(one for one in spec["layer"] if f"'{kind}'" in str(one.get("transform")))


def test_healthy_ranges_and_marks_are_in_the_charts():
    spec = charts.metric_chart("kl", (0.0, 30.0), ["a"], axis="step", log=False)
    field = spec["layer"][0]["encoding"]
    assert "scale('y', 30.0)" in field["y"]["value"]["expr"]
    assert "scale('y', 0.0)" in field["y2"]["value"]["expr"]
    assert spec["layer"][1]["mark"]["type"] == "area"
    assert charts.metric_chart("kl", (None, None), ["a"], axis="step", log=False)["layer"][0]["mark"]["type"] == "area"


@pytest.mark.parametrize("value", [0.0, 0.05, -3.0, 1e308, 1e-12])
def test_a_curve_that_never_moves_has_an_axis_with_a_width(value):
    """On one without, all limits would lie in the middle, where the curve is."""
    low, high = (row["y"] for row in rows("room", curve(value, value)))
    assert low < value < high
    assert high - low <= max(0.25 * abs(value), 2.0)


def test_the_axis_of_a_curve_that_moves_goes_as_far_as_the_curve():
    assert [row["y"] for row in rows("room", curve(1.0, 3.0), curve(np.nan, 2.0))] == [1.0, 3.0]
    assert rows("room", curve(np.nan)) == []


def test_a_constant_on_a_logarithmic_axis_stays_above_zero():
    low, high = (row["y"] for row in rows("room", curve(2.0, 2.0), log=True))
    assert 0 < low < 2.0 < high


def test_a_logarithmic_chart_without_a_positive_value_says_so():
    assert [row["label"] for row in rows("empty", curve(0.0, -1.0), log=True)] == [charts.NOTHING_POSITIVE]
    assert rows("empty", curve(0.0, 1.0), log=True) == []
    assert rows("empty", curve(0.0, -1.0)) == []


def test_the_range_of_one_value_is_seen():
    field = charts.metric_chart("x", (0.0, 0.0), ["a"], axis="step", log=False)["layer"][0]["encoding"]
    assert f"/ 2 - {charts.THINNEST / 2}" in field["y"]["value"]["expr"]
    assert f"/ 2 + {charts.THINNEST / 2}" in field["y2"]["value"]["expr"]


@pytest.mark.parametrize(("axis", "title"), [("step", "step"), ("time_s", "time, s"), ("tokens", "tokens")])
def test_the_x_axis_says_what_it_is_and_counts_in_whole_steps(axis, title):
    x = layer(charts.metric_chart("kl", (None, None), ["a"], axis=axis, log=False), "value")["encoding"]["x"]
    assert x["title"] == title
    assert x["axis"].get("tickMinStep") == (None if axis == "time_s" else 1)


def test_the_cross_of_a_last_step_is_drawn_whole():
    spec = charts.metric_chart("kl", (None, None), ["a"], axis="step", log=False)
    assert layer(spec, "bad")["mark"]["clip"] is False
    assert layer(spec, "value")["mark"]["clip"] is True


def test_there_is_room_for_the_share_beside_the_longest_bar():
    assert charts.stage_bars()["padding"]["right"] >= 40


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.05, "0.05"), (12345.0, "12.35k"), (2.5e12, "2.5T"), (9.99e14, "999T"),
        (1e15, "1e+15"), (-1e308, "-1e+308"), (1e24, "1e+24"), (float("nan"), "not finite"), (None, "not finite"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_a_person_reads_them(value, words):
    assert questions.number(value) == words


def luminance(colour: str) -> float:
    """The relative luminance of WCAG 2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_what_charts_write_can_be_read_on_both_themes():
    theme = tomllib.loads((ROOT / "dashboard" / ".streamlit" / "config.toml").read_text())["theme"]
    for background in ("#ffffff", theme["dark"]["backgroundColor"]):
        dark, light = sorted((luminance(charts.TEXT), luminance(background)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, background
