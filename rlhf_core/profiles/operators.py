"""torch's operators while a step runs: recorded by torch's profiler, put on the time of the step's stages.

Kineto, the recorder under ``torch.profiler``, has a clock of its own. While it records, every stage also leaves a
marker in it, and our clock is read before and after each end of the marker: each pair bounds the difference of the two
clocks from both sides, and all of them together give it to a microsecond or so.
"""

import bisect
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler import profile, record_function
from torch.autograd.profiler_util import MEMORY_EVENT_NAME

from rlhf_core.profiling import now_ns

MARKER = "stage:"
_CUDA = DeviceType.CUDA
SNAP_NS = 20_000
"""How far across a stage's border an operator may seem to reach, by the error of the two clocks."""


@dataclass(slots=True)
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
        self._open: list[tuple[Any, int]] = []
        self._brackets: list[tuple[tuple[int, int], tuple[int, int]]] = []

    def start(self) -> None:
        """Begin."""
        self._profile.__enter__()

    def opened(self, name: str) -> None:
        """Mark the beginning of a stage."""
        marker = record_function(f"{MARKER}{len(self._brackets)}")
        before = now_ns()
        marker.__enter__()
        self._open.append((marker, len(self._brackets)))
        self._brackets.append(((before, now_ns()), (0, 0)))

    def closed(self) -> None:
        """Mark its end."""
        marker, number = self._open.pop()
        before = now_ns()
        marker.__exit__(None, None, None)
        self._brackets[number] = (self._brackets[number][0], (before, now_ns()))

    def stop(self, borders: Iterable[int]) -> Recording:
        """End, and return what ran, on our clock; ``borders`` are the moments at which stages begin and end."""
        self._profile.__exit__(None, None, None)
        assert self._profile.kineto_results is not None
        return sort_events(self._profile.kineto_results.events(), self._brackets, sorted(borders))

    def abort(self) -> None:
        """End, and forget what was recorded."""
        while self._open:
            self.closed()
        self._profile.__exit__(None, None, None)


def clock_shift(markers: list[tuple[int, int]], brackets: list[tuple[tuple[int, int], tuple[int, int]]]) -> int:
    """Return the ns to add to the markers' clock: the middle of what lays both ends of each inside their brackets."""
    pairs = [
        pair for marker, bracket in zip(markers, brackets, strict=True) for pair in zip(marker, bracket, strict=True)
    ]
    lowest = max((before - moment for moment, (before, _) in pairs), default=0)
    highest = min((after - moment for moment, (_, after) in pairs), default=0)
    return (lowest + highest) // 2


def sort_events(
    events: Iterable[Any], brackets: list[tuple[tuple[int, int], tuple[int, int]]], borders: list[int]
) -> Recording:
    """Return the calls, each with the memory and the kernels that are its own, and the kernels, on our clock.

    Memory belongs to the innermost call around it, a kernel to the call that is linked to it.
    """
    markers: dict[int, tuple[int, int, int]] = {}
    by_thread: dict[int, list[Operator]] = defaultdict(list)
    calls: dict[int, Operator] = {}
    kernels: list[tuple[int, Operator]] = []
    for event in events:
        name, start, end, thread = event.name(), event.start_ns(), event.end_ns(), event.start_thread_id()
        on_gpu = event.device_type() == _CUDA
        if name == MEMORY_EVENT_NAME:
            size = event.nbytes()
            memory = Operator(name, start, start, thread, 0 if on_gpu else size, size if on_gpu else 0)
            by_thread[thread].append(memory)
        elif name.startswith(MARKER):
            if not on_gpu:
                markers[int(name.removeprefix(MARKER))] = (start, end, thread)
        elif on_gpu:
            if not event.is_user_annotation():
                kernel = Operator(name, start, end, event.device_resource_id())
                kernels.append((event.linked_correlation_id(), kernel))
        elif event.linked_correlation_id() == 0 and not event.is_async():
            calls[event.correlation_id()] = call = Operator(name, start, end, thread)
            by_thread[thread].append(call)
    recording = Recording(kernels=[kernel for _, kernel in kernels], main_thread=markers[0][2] if markers else 0)
    for correlation, kernel in kernels:
        if correlation in calls:
            calls[correlation].cuda_ns += kernel.end_ns - kernel.start_ns
    shift = clock_shift([markers[number][:2] for number in range(len(markers))], brackets)
    for kernel in recording.kernels:
        kernel.start_ns, kernel.end_ns = kernel.start_ns + shift, kernel.end_ns + shift
    for items in by_thread.values():
        for item in items:
            item.start_ns, item.end_ns = snapped(item.start_ns + shift, item.end_ns + shift, borders)
        recording.calls += _nested(items)
    return recording


def snapped(start_ns: int, end_ns: int, borders: list[int]) -> tuple[int, int]:
    """Return the ends of a call, one of them moved to a border that it seems to reach across by a little."""
    after = bisect.bisect_right(borders, start_ns)
    if after == len(borders) or borders[after] >= end_ns:
        return start_ns, end_ns
    if end_ns - borders[after] <= min(SNAP_NS, borders[after] - start_ns):
        return start_ns, borders[after]
    last = borders[bisect.bisect_left(borders, end_ns) - 1]
    return (last, end_ns) if last - start_ns <= SNAP_NS else (start_ns, end_ns)


def _nested(items: list[Operator]) -> list[Operator]:
    """Return a thread's calls in the order of their start, its memory added to the innermost call around it."""
    items.sort(key=lambda item: (item.start_ns, -item.end_ns))
    calls: list[Operator] = []
    around: list[Operator] = []
    for item in items:
        while around and around[-1].end_ns <= item.start_ns:
            around.pop()
        if item.name == MEMORY_EVENT_NAME:
            if around:
                around[-1].cpu_bytes += item.cpu_bytes
                around[-1].cuda_bytes += item.cuda_bytes
            continue
        if around and item.end_ns > around[-1].end_ns:
            item.end_ns = around[-1].end_ns  # the recorder's clock is read in steps
        around.append(item)
        calls.append(item)
    return calls


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
