import re
from types import SimpleNamespace

import pytest

from rlhf_core import profiling
from rlhf_core.profiling import StageClock, peak_memory_bytes


class Onlooker:
    """An observer that wants to see everything and keeps a list of it."""

    def __init__(self):
        self.heard = []

    def opened(self, kind, name):
        self.heard.append(("opened", kind, name))

    def closed(self, kind, name):
        self.heard.append(("closed", kind, name))
        return {}

    def stopped(self, clock):
        self.heard.append(("stopped", clock.step))


@pytest.fixture
def make_clock(monkeypatch):
    """Makes stage clocks over a fake wall clock, which moves when the test says so."""
    now = [100_000_000_000]
    monkeypatch.setattr(profiling.time, "perf_counter_ns", lambda: now[0])

    def make(observer=None):
        stages = StageClock(7, observer)
        stages.advance = lambda seconds: now.__setitem__(0, now[0] + int(seconds * 1e9))
        return stages

    return make


def test_stages_add_up_by_name_and_inner_ones_are_named_after_the_outer(make_clock):
    clock = make_clock(Onlooker())
    for _ in range(2):
        with clock.stage("update"):
            clock.advance(1.0)
            with clock.stage("forward"):
                clock.advance(2.0)
            with clock.stage("forward"):
                clock.advance(0.5)
    with clock.stage("forward"):
        clock.advance(0.25)
    assert clock.stage_seconds() == {"update/forward": 5.0, "update": 7.0, "forward": 0.25}


def test_without_an_observer_only_the_outermost_stages_are_measured(make_clock):
    clock = make_clock()
    with clock.stage("a"), clock.minibatch(epoch=0), clock.stage("b"):
        clock.advance(3.0)
    assert clock.stage_seconds() == {"a": 3.0}


def test_the_step_takes_its_own_time_and_not_the_sum_of_its_stages(make_clock):
    clock = make_clock()
    clock.advance(0.5)
    with clock.stage("a"):
        clock.advance(3.0)
    clock.advance(0.25)
    clock.stop(tokens=6)
    clock.advance(9.0)
    assert clock.wall.seconds == 3.75
    assert (clock.wall.name, clock.wall.arguments) == ("step", {"tokens": 6})


def test_an_observer_hears_of_what_begins_and_ends_in_that_order(make_clock):
    onlooker = Onlooker()
    clock = make_clock(onlooker)
    with clock.stage("a"), clock.minibatch(epoch=1), clock.stage("b"):
        pass
    clock.stop()
    assert onlooker.heard == [
        ("opened", "step", "step"),
        ("opened", "stage", "a"),
        ("opened", "minibatch", "minibatch"),
        ("opened", "stage", "a/b"),
        ("closed", "stage", "a/b"),
        ("closed", "minibatch", "minibatch"),
        ("closed", "stage", "a"),
        ("closed", "step", "step"),
        ("stopped", 7),
    ]
    assert [span.arguments for span in clock.spans if span.kind == "minibatch"] == [{"epoch": 1}]


def test_a_stage_that_fails_is_counted_and_closed(make_clock):
    clock = make_clock()

    def fail():
        with clock.stage("a"):
            clock.advance(1.0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with clock.stage("b"):
        clock.advance(2.0)
    assert clock.stage_seconds() == {"a": 1.0, "b": 2.0}


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
