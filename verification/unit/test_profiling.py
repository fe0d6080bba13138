import re
from types import SimpleNamespace

import pytest

from rlhf_core import profiling
from rlhf_core.profiling import StageClock, peak_memory_bytes


@pytest.fixture
def clock(monkeypatch):
    """A stage clock over a fake wall clock, which moves when the test says so."""
    now = [100.0]
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: now[0])
    stages = StageClock()
    stages.advance = lambda seconds: now.__setitem__(0, now[0] + seconds)
    return stages


def test_stages_add_up_by_name_and_inner_ones_are_named_after_the_outer(clock):
    for _ in range(2):
        with clock.stage("update"):
            clock.advance(1.0)
            with clock.stage("forward"):
                clock.advance(2.0)
            with clock.stage("forward"):
                clock.advance(0.5)
    with clock.stage("forward"):
        clock.advance(0.25)
    assert clock.seconds == {"update/forward": 5.0, "update": 7.0, "forward": 0.25}


def test_the_total_counts_outer_stages_once(clock):
    with clock.stage("a"), clock.stage("b"):
        clock.advance(3.0)
    with clock.stage("c"):
        clock.advance(1.0)
    assert clock.total() == 4.0
    assert StageClock().total() == 0


def test_a_stage_that_fails_is_counted_and_closed(clock):
    def fail():
        with clock.stage("a"):
            clock.advance(1.0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with clock.stage("b"):
        clock.advance(2.0)
    assert clock.seconds == {"a": 1.0, "b": 2.0}


@pytest.fixture
def _started_by_a_huge_process(monkeypatch):
    """What Linux does: ru_maxrss is handed on to the program that a process starts."""
    monkeypatch.setattr(profiling.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=7_000_000))


@pytest.mark.usefixtures("_started_by_a_huge_process")
def test_peak_memory_is_this_processs_own_and_keeps_what_was_given_back():
    if not profiling.STATUS.is_file():
        pytest.skip("no /proc here")
    before = peak_memory_bytes()
    resident = int(re.search(r"VmRSS:\s+(\d+) kB", profiling.STATUS.read_text())[1]) * 1024
    assert 0.9 * resident < before < 7_000_000 * 1024
    block = bytearray(before - resident + 64 * 2**20)
    block[::1024] = bytes(len(block[::1024]))  # touch every page
    del block
    assert peak_memory_bytes() > before + 32 * 2**20


@pytest.mark.usefixtures("_started_by_a_huge_process")
@pytest.mark.parametrize("text", [None, "Name: python\n"])
def test_without_a_statement_of_linux_the_rusage_has_to_do(monkeypatch, tmp_path, text):
    status = tmp_path / "status"
    if text is not None:
        status.write_text(text)
    monkeypatch.setattr(profiling, "STATUS", status)
    assert peak_memory_bytes() == 7_000_000 * 1024
