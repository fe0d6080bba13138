"""The PPO step's time and memory grow no faster than its arithmetic."""

import bench_cost
import numpy as np
import pytest

NOISE = 0.25
"""What a slope may be off by: each point is a median of steps, on a machine that may do other things too."""


def test_the_fit_finds_an_exponent_behind_a_constant_part():
    sizes = [8, 16, 32, 64, 128]
    for exponent in (0.5, 1.0, 1.5, 2.0):
        growth = bench_cost.fitted(sizes, [3.0 + 0.2 * size**exponent for size in sizes])
        assert growth.exponent == pytest.approx(exponent, abs=1e-3)
        assert growth.constant == pytest.approx(3.0, rel=1e-2)
        assert growth.at(np.array([10.0]))[0] == pytest.approx(3.0 + 0.2 * 10**exponent, rel=1e-3)


def test_slopes_end_at_the_largest_size():
    assert bench_cost.slope([1, 10, 100], [10.0, 1.0, 1000.0], first=1) == pytest.approx(3.0)
    assert bench_cost.slope([1, 10, 100], [10.0, 1.0, 1000.0], first=0) == pytest.approx(1.0)


def test_the_counted_operations_grow_as_they_must():
    def exponent(axis):
        points = bench_cost.AXES[axis]
        return bench_cost.fitted(list(points), [point.operations() for point in points.values()]).exponent

    assert exponent("batch") == pytest.approx(1.0, abs=1e-3)
    assert exponent("layers") == pytest.approx(1.0, abs=1e-3)
    assert exponent("vocabulary") == pytest.approx(1.0, abs=1e-3)
    assert 1.0 < exponent("response length") < 1.5  # attention is quadratic, and little of it


@pytest.mark.slow
@pytest.mark.parametrize("axis", bench_cost.AXES)
def test_nothing_grows_faster_than_the_arithmetic(axis):
    rows = bench_cost.measure_all(3, [axis])[axis]
    for name in ("seconds", "bytes"):
        for first in (0, 2, 3):  # over all sizes, and where they are large and the constant part is not seen
            needed = bench_cost.slope(rows["size"], rows["operations"], first)
            assert bench_cost.slope(rows["size"], rows[name], first) <= needed + NOISE, (name, first)
