"""Curves: buckets, decimation, smoothing and axes."""

import math

import numpy as np
import pytest
from dashboard_runs import make_run

from dashboard import series
from dashboard.store import Store

pytestmark = pytest.mark.m3


class TestCurves:
    def test_buckets_keep_extremes_means_and_counts(self):
        rng = np.random.default_rng(0)
        values = rng.normal(size=10_000)
        values[[17, 4321]] = 50.0, -60.0
        values[5000] = math.nan
        buckets = series.Buckets(64)
        for part in np.array_split(np.arange(10_000), 37):
            buckets.extend({"step": np.ma.array(part + 1.0), "x": np.ma.array(values[part])})
        curve = buckets.curve("x", "step")
        assert len(curve.x) <= 64
        assert (np.nanmax(curve.high), np.nanmin(curve.low), curve.bad.sum(), curve.x[-1]) == (50.0, -60.0, 1, 10_000)
        width = buckets.width
        for bucket in (0, 3, len(curve.x) - 1):
            raw = values[bucket * width : (bucket + 1) * width]
            assert curve.low[bucket] == np.nanmin(raw)
            assert curve.high[bucket] == np.nanmax(raw)
            assert curve.mean[bucket] == pytest.approx(np.nanmean(raw))

    def test_a_short_log_of_many_metrics_takes_little_memory(self):
        buckets = series.Buckets()
        names = ["step", *(f"metric {number}" for number in range(500))]
        for start in (0, 50, 100):
            buckets.extend({name: np.ma.arange(start, start + 50.0) for name in names})
        held = sum(values.nbytes for parts in buckets._parts.values() for values in parts.values())
        assert held <= 501 * 5 * 8 * 2 * 150
        assert buckets.curve("metric 7", "step").mean.tolist() == list(range(150))

    def test_a_metric_that_appears_late_has_room_for_all(self):
        buckets = series.Buckets(256)
        buckets.extend({"step": np.ma.arange(100.0)})
        buckets.extend({"step": np.ma.arange(100.0, 200.0), "late": np.ma.arange(100.0)})
        buckets.extend({"step": np.ma.arange(200.0, 900.0), "late": np.ma.arange(100.0, 800.0)})
        assert buckets.width == 4
        assert buckets.sums("late") == (sum(range(800)), 800)
        assert buckets.curve("late", "step").high[-1] == 799

    def test_short_logs_are_kept_row_by_row(self):
        buckets = series.Buckets(64)
        buckets.extend({"step": np.ma.arange(1.0, 65.0), "x": np.ma.arange(64.0)})
        curve = buckets.curve("x", "step")
        assert curve.mean.tolist() == curve.low.tolist() == curve.high.tolist() == list(range(64))

    @pytest.mark.parametrize("points", [1, 7, 100])
    def test_decimation_loses_no_extreme(self, points):
        mean = np.sin(np.arange(1000.0))
        mean[333] = np.nan
        bad = np.zeros(1000)
        bad[333] = 1
        found = series.decimate(series.Curve(np.arange(1000.0), mean, mean - 1, mean + 1, bad), points)
        assert len(found.x) == points
        assert (found.low.min(), found.high.max()) == (np.nanmin(mean) - 1, np.nanmax(mean) + 1)
        assert (found.bad.sum(), found.x[-1]) == (1, 999)

    def test_smoothing_is_the_unbiased_average_and_its_band_is_raw(self):
        raw = np.array([1.0, 3.0, np.nan, 5.0])
        found = series.smooth(series.Curve(np.arange(4.0), raw, raw, raw, np.zeros(4)), 0.5)
        assert found.mean[[0, 1, 3]].tolist() == pytest.approx(
            [1.0, (0.5 * 1 + 3) / 1.5, (0.25 * 1 + 0.5 * 3 + 5) / 1.75]
        )
        assert np.isnan(found.mean[2])
        assert found.low.tolist() == [1.0, 1.0, 3.0, 5.0]
        assert found.high.tolist() == [1.0, 3.0, 3.0, 5.0]

    def test_time_and_tokens_add_up_over_the_steps(self, runs):
        make_run(runs, "a", 4)
        run = Store(runs).run("a")
        assert run.curve("kl", "time_s", None, 99).x.tolist() == [0.5, 1.0, 1.5, 2.0]
        assert run.curve("kl", "tokens", None, 99).x.tolist() == [400, 800, 1200, 1600]
        assert run.place(3, "tokens") == 1200

    def test_a_window_shows_the_last_steps(self, runs):
        make_run(runs, "a", 30)
        run = Store(runs).run("a")
        assert run.curve("kl", "step", 10, 99).x.tolist() == list(range(21, 31))
        assert len(run.curve("kl", "step", 1000, 99).x) == 30
        assert run.curve("kl", "time_s", 2, 99).x.tolist() == [14.5, 15.0]
