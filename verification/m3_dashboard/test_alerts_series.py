"""The windows of earlier rows."""

import numpy as np
import pytest
from alert_columns import DATA

from rlhf_core.alerting.series import WINDOW, Series, median_by_row, run_lengths

pytestmark = pytest.mark.m3


# -- windows -----------------------------------------------------------------------------------------------------------


def series(values, offset=0):
    return Series({"step": np.arange(len(values)), "x": np.asarray(values, float)}, offset, {"x": np.array(values[:5])})


def test_a_baseline_is_the_median_and_spread_of_earlier_rows_alone():
    values = list(DATA[:100])
    median, spread = series(values).baseline("x")
    for row in range(100):
        before = values[max(0, row - row % 4 - WINDOW) : row - row % 4]
        if len(before) < 8:
            assert np.isnan(median[row])
        else:
            assert median[row] == pytest.approx(np.median(before))
            assert spread[row] == pytest.approx(1.4826 * np.median(np.abs(np.array(before) - np.median(before))))


def test_medians_leave_out_nan():
    x = np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, 5.0], [2.0, 1.0, 7.0]])
    assert median_by_row(x, 2).tolist()[::2] == [2.0, 2.0]
    assert np.isnan(median_by_row(x, 2)[1])


def test_run_lengths_count_on_from_before():
    flags = np.array([True, True, False, True, False, False, True])
    assert run_lengths(flags, 0).tolist() == [1, 2, 0, 1, 0, 0, 1]
    assert run_lengths(flags, 5).tolist() == [6, 7, 0, 1, 0, 0, 1]
