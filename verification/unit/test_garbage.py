import gc
import subprocess
import sys

import pytest

from rlhf_core.garbage import garbage_left_alone, loading_for_good

FIRST_LOAD = """
import gc, sys
from rlhf_core.garbage import loading_for_good
assert "torch" not in sys.modules
with loading_for_good():
    assert not gc.isenabled()
    import torch
assert gc.isenabled()
assert gc.get_freeze_count() > 50_000
# What comes later is looked through as ever.
before = gc.get_freeze_count()
loop = []
loop.append(loop)
del loop
assert gc.collect() >= 1
assert gc.get_freeze_count() == before
"""


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_the_collector_is_off_meanwhile_and_on_again_after_an_error():
    states = []

    def fail() -> None:
        states.append(gc.isenabled())
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"), garbage_left_alone():
        fail()
    assert states == [False]
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with garbage_left_alone():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_process_that_had_torch_keeps_collecting_what_it_has():
    before = gc.get_freeze_count()
    with loading_for_good():
        assert gc.isenabled()
        Cycle()
    assert gc.get_freeze_count() == before
    assert gc.collect() >= 1


def test_the_first_load_of_torch_is_not_looked_through_again():
    subprocess.run([sys.executable, "-c", FIRST_LOAD], check=True)
