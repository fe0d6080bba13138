"""What an export reads of a run; the folders that it writes are tested with the pipeline that makes them."""

import tracemalloc
from dataclasses import asdict

import pytest

from rlhf_core.config import TrainConfig
from rlhf_core.export import first_and_last, model_card


@pytest.mark.parametrize(("steps", "ends"), [(0, []), (1, [1]), (2, [1, 2]), (5, [1, 5])])
def test_the_ends_of_a_log_are_its_first_row_and_its_last(steps, ends):
    rows = ({"step": step} for step in range(1, steps + 1))
    assert first_and_last(rows) == [{"step": step} for step in ends]


def test_the_card_of_a_long_run_holds_two_of_its_rows(tmp_path):
    row = '{"kl": %d.5, "text": "%s", "step": 1}\n'
    (tmp_path / "metrics.jsonl").write_text("".join(row % (number, "x" * 10_000) for number in range(1, 401)))
    tracemalloc.start()
    card = model_card(tmp_path, "train", asdict(TrainConfig()), tmp_path / "step_000001" / "policy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "| kl | 1.5 | 400.5 |" in card
    assert peak < 500_000
