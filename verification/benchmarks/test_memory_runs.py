"""What `rlhf train --explain-memory` says before a run is what the run takes."""

import memory_runs
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("case", memory_runs.CASES)
def test_the_peak_is_predicted_within_15_percent(case, tmp_path):
    before, after = memory_runs.predicted(case, tmp_path), memory_runs.measured(case, tmp_path)
    assert before.training == pytest.approx(after.training, rel=0.15)
    assert before.whole == pytest.approx(after.whole, rel=0.15)
