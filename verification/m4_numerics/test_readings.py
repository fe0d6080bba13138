"""What a property says of two arrays that differ."""

import pytest
import torch

from rlhf_core.testing.readings import ask_each, close, parallel

pytestmark = pytest.mark.m4


def test_the_worst_cells_are_shown_first_and_counted():
    found = torch.zeros(5, 4, dtype=torch.float64)
    found[0, 1], found[2, 3], found[4, 0], found[1, 1] = 0.125, -0.5, 0.25, 0.0625
    worst = r"off by 0\.5: \[2, 3\] is -0\.5, expected 0; \[4, 0\] is 0\.25, expected 0; \[0, 1\] is 0\.125, expected 0"
    with pytest.raises(AssertionError, match=rf"^{worst} \(4 of 20 differ\)$"):
        close(found, torch.zeros(5, 4))


def test_a_nan_is_the_worst_of_all():
    with pytest.raises(AssertionError, match=r"^off by inf: \[1\] is nan, expected 2; \[0\] is 5, expected 1 \(2 of 3"):
        close([5.0, float("nan"), 3.0], [1.0, 2.0, 3.0])


def test_a_number_is_shown_whole():
    with pytest.raises(AssertionError, match=r"^off by 0\.25: found 0\.5, expected 0\.25$"):
        close(0.5, 0.25)


def test_one_expectation_stands_for_every_cell():
    close(torch.zeros(3), 0.0)
    with pytest.raises(AssertionError, match=r"^off by 1: \[2\] is 1, expected 0 \(1 of 3 differ\)$"):
        close([0.0, 0.0, 1.0], 0.0)


@pytest.mark.parametrize(("difference", "said"), [(1e-8, True), (3e-6, True), (1e-5, False)])
def test_a_difference_of_float32s_size_is_called_so(difference, said):
    with pytest.raises(AssertionError, match="off by") as raised:
        close(1.0 + difference, 1.0)
    assert ("float32's rounding; train in float64" in str(raised.value)) == said


def test_parallel_shows_cells_of_the_directions():
    parallel([[3.0, 4.0]], [[6.0, 8.0]])
    with pytest.raises(AssertionError, match=r"^off by 1: \[0, 0\] is 0, expected 1; \[0, 1\] is 1, exp"):
        parallel([[0.0, 2.0]], [[3.0, 0.0]])


def test_what_is_refused_is_said_when_all_the_others_were_asked():
    asked = []

    def ask(choice):
        if choice % 2:
            raise NotImplementedError(f"{choice} is odd")
        asked.append(choice)

    with pytest.raises(NotImplementedError, match="^1 is odd; 3 is odd$"):
        ask_each(ask, [0, 1, 2, 3, 4])
    assert asked == [0, 2, 4]
