"""torch's operators while a step runs: recorded by torch's profiler, put on the time of the step's stages.

Kineto, the recorder under ``torch.profiler``, has a clock of its own. While it records, every stage also leaves a marker
in it; a marker lies inside its stage, so each pair bounds the difference of the two clocks from both sides.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.profiler import profile, record_function
from torch.autograd.profiler_util import MEMORY_EVENT_NAME

MARKER = "stage:"
_CPU = torch.autograd.DeviceType.CPU
_CUDA = torch.autograd.DeviceType.CUDA


@dataclass
class Operator:
    """One call of an operator, or on a GPU one kernel."""

    name: str
    start_ns: int
    end_ns: int
    thread: int
    """Number of the thread that called it, or of the stream that ran it."""
    cpu_bytes: int = 0
    """Memory that it allocated, less what it gave back, itself and not through an operator inside it."""
    cuda_bytes: int = 0
    cuda_ns: int = 0
    """Time of the kernels that it launched itself."""

    @property
    def figures(self) -> tuple[int, int, int, int]:
        """What adds up over the calls inside each other: ns on the CPU, ns on the GPU, bytes on the CPU, on the GPU."""
        return self.end_ns - self.start_ns, self.cuda_ns, self.cpu_bytes, self.cuda_bytes


@dataclass
class Recording:
    """What ran in a step: calls on the CPU in the order of their start, and kernels on the GPU."""

    calls: list[Operator] = field(default_factory=list)
    kernels: list[Operator] = field(default_factory=list)
    main_thread: int = 0
    """The thread of the stages."""


class OperatorRecorder:
    """Records the operators between :meth:`start` and :meth:`stop`."""

    def __init__(self) -> None:
        device = "cuda" if torch.cuda.is_available() else None
        self._profile = profile(use_kineto=True, profile_memory=True, use_device=device)
        self._markers: list[Any] = []

    def start(self) -> None:
        """Begin."""
        self._profile.__enter__()

    def opened(self, name: str) -> None:
        """Mark the beginning of a stage."""
        self._markers.append(record_function(f"{MARKER}{name}"))
        self._markers[-1].__enter__()

    def closed(self) -> None:
        """Mark its end."""
        self._markers.pop().__exit__(None, None, None)

    def stop(self, stages: Iterable[tuple[int, int]]) -> Recording:
        """End, and return what ran on the clock of ``stages``: (start, end) in ns, in the order of their markers."""
        self._profile.__exit__(None, None, None)
        assert self._profile.kineto_results is not None
        events = self._profile.kineto_results.events()
        markers = sorted((event.start_ns(), event.end_ns(), event.start_thread_id()) for event in _markers(events))
        recording = Recording(main_thread=markers[0][2] if markers else 0)
        shift = clock_shift([(start, end) for start, end, _ in markers], list(stages))
        _sort_events(events, shift, recording)
        return recording

    def abort(self) -> None:
        """End, and forget what was recorded."""
        while self._markers:
            self.closed()
        self._profile.__exit__(None, None, None)


def _markers(events: Iterable[Any]) -> list[Any]:
    return [event for event in events if event.device_type() == _CPU and event.name().startswith(MARKER)]


def clock_shift(markers: list[tuple[int, int]], stages: list[tuple[int, int]]) -> int:
    """Return the ns to add to the markers' clock: in the middle of what lays every marker inside its stage."""
    if not markers:
        return 0
    pairs = list(zip(markers, stages, strict=True))
    lowest = max(stage[0] - marker[0] for marker, stage in pairs)
    highest = min(stage[1] - marker[1] for marker, stage in pairs)
    return (lowest + highest) // 2


def _sort_events(events: Iterable[Any], shift: int, recording: Recording) -> None:
    """Fill the recording: attribute memory to the innermost call around it, and kernels to the call behind them."""
    by_thread: dict[int, list[tuple[int, int, Any]]] = defaultdict(list)
    by_correlation: dict[int, Operator] = {}
    launched: list[tuple[int, int]] = []
    for event in events:
        name, start, end = event.name(), event.start_ns() + shift, event.end_ns() + shift
        if event.device_type() == _CPU or name == MEMORY_EVENT_NAME:
            if name == MEMORY_EVENT_NAME:
                by_thread[event.start_thread_id()].append((start, 0, event))
            elif not name.startswith(MARKER) and not event.is_async():
                call = Operator(name, start, end, event.start_thread_id())
                if event.linked_correlation_id() == 0:
                    by_correlation[event.correlation_id()] = call
                    by_thread[call.thread].append((start, start - end, call))
        elif event.device_type() == _CUDA and not event.is_user_annotation():
            recording.kernels.append(Operator(name, start, end, event.device_resource_id()))
            launched.append((event.linked_correlation_id(), end - start))
    for correlation, duration in launched:
        if correlation in by_correlation:
            by_correlation[correlation].cuda_ns += duration
    for items in by_thread.values():
        items.sort(key=lambda item: item[:2])
        around: list[Operator] = []
        for start, _, item in items:
            while around and around[-1].end_ns <= start:
                around.pop()
            if isinstance(item, Operator):
                if around and item.end_ns > around[-1].end_ns:
                    item.end_ns = around[-1].end_ns  # the recorder's clock is read in steps
                around.append(item)
                recording.calls.append(item)
            elif around:
                if item.device_type() == _CUDA:
                    around[-1].cuda_bytes += item.nbytes()
                else:
                    around[-1].cpu_bytes += item.nbytes()


@dataclass
class OperatorTotals:
    """What the calls of an operator come to: ns on the CPU, ns on the GPU, bytes on the CPU, bytes on the GPU."""

    calls: int = 0
    own: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    """Without what happened in operators inside."""
    total: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    """With it; a call inside a call of the same operator counts once."""


def add_operators(totals: dict[str, OperatorTotals], calls: Iterable[Operator]) -> None:
    """Add the calls of a recording, each thread's in the order of their start."""
    around: dict[int, list[tuple[Operator, list[int], list[int]]]] = defaultdict(list)
    for call in calls:
        stack = around[call.thread]
        while stack and stack[-1][0].end_ns <= call.start_ns:
            _close_call(totals, stack)
        stack.append((call, list(call.figures), list(call.figures)))
    for stack in around.values():
        while stack:
            _close_call(totals, stack)


def _close_call(totals: dict[str, OperatorTotals], stack: list[tuple[Operator, list[int], list[int]]]) -> None:
    call, own, total = stack.pop()
    entry = totals.setdefault(call.name, OperatorTotals())
    entry.calls += 1
    entry.own = [a + b for a, b in zip(entry.own, own, strict=True)]
    if all(outer.name != call.name for outer, _, _ in stack):
        entry.total = [a + b for a, b in zip(entry.total, total, strict=True)]
    if stack:
        _, outer_own, outer_total = stack[-1]
        outer_own[0] -= total[0]
        outer_total[1:] = [a + b for a, b in zip(outer_total[1:], total[1:], strict=True)]
