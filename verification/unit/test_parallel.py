import threading

import pytest
import torch

from rlhf_core import parallel
from rlhf_core.parallel import together, workers


def test_results_come_in_the_order_of_the_pieces_whichever_ends_first():
    second_is_done = threading.Event()

    def work(piece):
        if piece == 0:
            assert second_is_done.wait(10), "the pieces do not run beside each other"
        else:
            second_is_done.set()
        return piece * 10

    assert together(work, [0, 1], 2) == [0, 10]


def test_one_at_a_time_runs_in_the_calling_thread():
    assert together(lambda _: threading.current_thread(), range(3), 1) == [threading.main_thread()] * 3


def test_the_first_error_in_the_order_of_the_pieces_is_raised_when_all_have_ended():
    ended = []

    def work(piece):
        ended.append(piece)
        if piece > 0:
            raise ValueError(f"piece {piece}")
        return piece

    with pytest.raises(ValueError, match="piece 1"):
        together(work, range(4), 2)
    assert sorted(ended) == [0, 1, 2, 3]


@pytest.mark.parametrize("recorded", [True, False])
def test_gradients_are_recorded_as_in_the_calling_thread(recorded):
    weight = torch.ones(3, requires_grad=True)
    with torch.set_grad_enabled(recorded):
        results = together(lambda piece: weight * piece, [1.0, 2.0], 2)
    assert [result.requires_grad for result in results] == [recorded] * 2


def test_each_piece_gets_its_share_of_the_threads_and_the_caller_keeps_its_own():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert together(lambda _: torch.get_num_threads(), range(2), 2) == [2, 2]
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_a_gpu_and_portable_numerics_take_one_piece_at_a_time(monkeypatch):
    assert workers(torch.device("cpu")) == torch.get_num_threads()
    assert workers(torch.device("cuda")) == 1
    monkeypatch.setattr(parallel, "is_portable", lambda: True)
    assert workers(torch.device("cpu")) == 1
