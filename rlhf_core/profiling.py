"""Wall time of a step and of its stages, and the memory of the process."""

import os
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
Kind = Literal["step", "stage", "minibatch"]


@dataclass(frozen=True)
class Span:
    """From when to when something ran, on the clock of :func:`now_ns`."""

    kind: Kind
    name: str
    """A stage inside another is named ``outer/inner``."""
    start_ns: int
    end_ns: int
    arguments: dict[str, int]
    """What else is known of it: its number, its tokens, its peak memory."""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.end_ns - self.start_ns) / 1e9


class Observer(Protocol):
    """Looks on while a step runs, and pays for it: a profiler."""

    def opened(self, kind: Kind, name: str) -> None:
        """Hear that something begins; its time already runs."""

    def closed(self, kind: Kind, name: str) -> dict[str, int]:
        """Hear that it ends, while its time still runs; return what is to be kept with its span."""
        ...

    def stopped(self, clock: "StageClock") -> None:
        """Hear that a step is done; its time has ended."""


class StageClock:
    """The wall time of one step, and of the stages in it.

    The time of a step runs from the making of its clock to :meth:`stop`, whatever stages there are: what the stages
    leave out can be seen. Stages inside others are measured only for an observer, because on a GPU that costs: at both
    ends of a stage the GPU is waited for.

    What a clock measures goes to ``timings.jsonl`` and the profiles alone: none of it reaches a file that has to be
    reproducible.
    """

    def __init__(self, step: int = 1, observer: Observer | None = None) -> None:
        self.step = step
        self.spans: list[Span] = []
        self._observer = observer
        self._open: list[str] = []
        self._wall: Span | None = None
        if observer is not None:
            observer.opened("step", "step")
        wait_for_gpu()
        self._start_ns = now_ns()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block under its name."""
        if self._open and self._observer is None:
            yield
            return
        with self._measured("stage", "/".join([*self._open, name])):
            self._open.append(name)
            try:
                yield
            finally:
                self._open.pop()

    @contextmanager
    def minibatch(self, **numbers: int) -> Iterator[None]:
        """Mark the block as a minibatch with these numbers; it is no stage, and without an observer nothing."""
        if self._observer is None:
            yield
            return
        with self._measured("minibatch", "minibatch", **numbers):
            yield

    @contextmanager
    def _measured(self, kind: Kind, name: str, **arguments: int) -> Iterator[None]:
        wait_for_gpu()
        start_ns = now_ns()
        if self._observer is not None:
            self._observer.opened(kind, name)
        try:
            yield
        finally:
            wait_for_gpu()
            if self._observer is not None:
                arguments |= self._observer.closed(kind, name)
            self.spans.append(Span(kind, name, start_ns, now_ns(), arguments))

    def stop(self, tokens: int = 0) -> None:
        """End the step, in which ``tokens`` were made."""
        assert self._wall is None
        wait_for_gpu()
        arguments = {"tokens": tokens}
        if self._observer is not None:
            arguments |= self._observer.closed("step", "step")
        self._wall = Span("step", "step", self._start_ns, now_ns(), arguments)
        if self._observer is not None:
            self._observer.stopped(self)

    @property
    def wall(self) -> Span:
        """The whole step, once it is stopped."""
        assert self._wall is not None
        return self._wall

    def stage_seconds(self) -> dict[str, float]:
        """Return the seconds of each stage, its calls added up."""
        totals: dict[str, int] = {}
        for span in self.spans:
            if span.kind == "stage":
                totals[span.name] = totals.get(span.name, 0) + span.end_ns - span.start_ns
        return {name: total / 1e9 for name, total in totals.items()}


def now_ns() -> int:
    """Return nanoseconds on a clock that never goes back."""
    return time.perf_counter_ns()


def wait_for_gpu() -> None:
    """Wait until the GPU has done what it was given; without one, do nothing."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Return the largest memory allocated on the GPU so far, or without one the largest resident set of the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    # Not getrusage's ru_maxrss where it can be helped: a new program starts with that of the process that started it.
    peak = _status_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if peak is None else peak


def _status_bytes(name: str) -> int | None:
    try:
        text = STATUS.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{name}:\s*(\d+) kB", text, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


class PeakMemory:
    """The largest memory since the last look, of the process and of the GPU.

    Linux keeps the largest resident set of a process (VmHWM) and lets it be set back by writing 5 to
    ``/proc/self/clear_refs`` (proc_pid_clear_refs(5)). Where that is not allowed the resident set at the moment of the
    look has to do, a lower bound; :attr:`method` says which it is.
    """

    def __init__(self) -> None:
        self.largest_bytes = peak_memory_bytes()
        """The largest of all looks: of the GPU where there is one, else of the process."""
        self.method = "resident memory at the stage's ends, a lower bound"
        self._sets_back = False
        self._clear_refs: int | None = None
        with suppress(OSError):
            self._clear_refs = os.open(CLEAR_REFS, os.O_WRONLY)
            os.write(self._clear_refs, b"5")
            self.method = "VmHWM, set back at the stage's ends"
            self._sets_back = True
        if _status_bytes("VmRSS") is None:
            self._sets_back = False
            self.method = "largest resident memory of the process so far"

    def look(self) -> tuple[int, int]:
        """Return the largest bytes since the last look: resident in the process, and allocated on the GPU."""
        cpu = _status_bytes("VmHWM" if self._sets_back else "VmRSS")
        if cpu is None:
            cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self._sets_back and self._clear_refs is not None:
            os.write(self._clear_refs, b"5")
        cuda = 0
        if torch.cuda.is_initialized():
            cuda = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self.largest_bytes = max(self.largest_bytes, cuda if torch.cuda.is_initialized() else cpu)
        return cpu, cuda

    def close(self) -> None:
        """Give the file back."""
        if self._clear_refs is not None:
            os.close(self._clear_refs)
            self._clear_refs = None
