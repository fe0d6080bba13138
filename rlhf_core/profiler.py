"""Where the time and the memory of a training loop go, as files: the stages of every step, the operators of some.

Around any loop of any trainer::

    with Profiler("profiles") as profiler:
        for batch in batches:
            with profiler.step(tokens=batch.numel()):
                with profiler.stage("forward"):
                    loss = model(batch)
                with profiler.stage("backward"):
                    loss.backward()

``rlhf train --profile`` does this to itself, and ``rlhf check-profile`` shows that the files add up.
"""

import csv
import io
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_core.durable_files import errors_name, write_atomically
from rlhf_core.garbage import garbage_left_alone
from rlhf_core.profiles.files import (
    GPU,
    OPERATOR_COLUMNS,
    OPERATORS_FILE,
    STAGES_THREAD,
    SUMMARY_COLUMNS,
    SUMMARY_FILE,
    TRACE_FILE,
    TRAINING,
)
from rlhf_core.profiles.operators import Operator, OperatorRecorder, OperatorTotals, Recording, add_operators
from rlhf_core.profiling import Kind, PeakMemory, Span, StageClock, now_ns, peak_memory_bytes


def powers_of_100(number: int) -> bool:
    """Return whether the operators of the ``number``-th profiled step are recorded: of the 1st, 100th, 10,000th.

    Recording and sorting them takes a few times as long as the step; so its share of a run, and the trace, stay small.
    """
    return number in {100**exponent for exponent in range(6)}


@dataclass
class StageTotals:
    """What a stage came to over the steps."""

    durations_ns: "array[int]" = field(default_factory=lambda: array("q"))
    tokens: int = 0
    last_step: int | None = None
    cpu_peak_bytes: int = 0
    cuda_peak_bytes: int = 0


class Profiler:
    """Writes ``summary.csv``, ``chrome_trace.json`` and ``op_stats.csv`` of a loop into a folder.

    Every step's spans go to the disk when it ends, so a long run needs no more memory than a short one but for eight
    bytes a span. The files get their names at the end, also that of a loop that fails; a step cut short is left out.
    """

    def __init__(self, folder: Path | str, *, records_operators: Callable[[int], bool] = powers_of_100) -> None:
        """Take the folder, and which of the profiled steps, counted from 1, have their operators recorded."""
        self._folder = Path(folder)
        self._records_operators = records_operators
        self._stages: dict[str, StageTotals] = {"step": StageTotals()}
        self._operators: dict[str, OperatorTotals] = {}
        self._steps: list[int] = []
        self._operator_steps: list[int] = []
        self._clock: StageClock | None = None
        self._recorder: OperatorRecorder | None = None
        self._peaks: list[list[int]] = []

    def __enter__(self) -> "Profiler":
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in (SUMMARY_FILE, OPERATORS_FILE, TRACE_FILE):
            (self._folder / name).unlink(missing_ok=True)
        self._memory = PeakMemory()
        self._trace = TraceWriter(self._folder / TRACE_FILE, now_ns())
        return self

    def __exit__(self, *exception: object) -> None:
        self._leave_out_step()
        write_atomically(self._folder / SUMMARY_FILE, table(SUMMARY_COLUMNS, self._summary()).encode())
        write_atomically(self._folder / OPERATORS_FILE, table(OPERATOR_COLUMNS, self._operator_stats()).encode())
        self._trace.close(
            {
                "steps": self._steps,
                "operator_steps": self._operator_steps,
                "threads": torch.get_num_threads(),
                "cpu_memory": self._memory.method,
            }
        )
        self._memory.close()

    def new_clock(self, step: int) -> StageClock:
        """Return the clock of a step that begins now; its ``stop`` ends the step."""
        self._peaks = []
        if self._records_operators(len(self._steps) + 1):
            self._recorder = OperatorRecorder()
            self._recorder.start()
        self._clock = StageClock(step, self)
        return self._clock

    @contextmanager
    def step(self, tokens: int = 0) -> Iterator[StageClock]:
        """Profile the block as the next step; its ``tokens`` count for the throughput of its stages."""
        clock = self.new_clock(self._steps[-1] + 1 if self._steps else 1)
        try:
            yield clock
        except BaseException:
            self._leave_out_step()
            raise
        clock.stop(tokens)

    def _leave_out_step(self) -> None:
        """Forget a step that was cut short: the loop may catch what happened and go on with another."""
        self._clock, self._peaks = None, []
        if self._recorder is not None:
            self._recorder.abort()
            self._recorder = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Profile the block as a stage of the step, or of the stage, that it lies in.

        Raises:
            RuntimeError: it lies in no step.
        """
        if self._clock is None:
            raise RuntimeError(f"stage {name!r} lies in no step; put it inside `with profiler.step():`")
        with self._clock.stage(name):
            yield

    def opened(self, kind: Kind, name: str) -> None:
        """Hear that a step, stage or minibatch begins."""
        if kind == "minibatch":
            return
        self._look_at_memory()
        self._peaks.append([0, 0])
        if self._recorder is not None and kind == "stage":
            self._recorder.opened(name)

    def closed(self, kind: Kind, name: str) -> dict[str, int]:
        """Hear that it ends, and return its peak memory."""
        if kind == "minibatch":
            return {}
        if self._recorder is not None and kind == "stage":
            self._recorder.closed()
        self._look_at_memory()
        cpu, cuda = self._peaks.pop()
        return {"cpu_peak_bytes": cpu, "cuda_peak_bytes": cuda}

    def _look_at_memory(self) -> None:
        look = self._memory.look()
        for peaks in self._peaks:
            peaks[:] = map(max, peaks, look)

    def peak_memory_bytes(self) -> int:
        """Return the largest memory so far; the system's own account of it is set back at every stage."""
        return self._memory.largest_bytes

    @property
    def first_step(self) -> int:
        """The first step of this profile."""
        return self._steps[0]

    def stopped(self, clock: StageClock) -> None:
        """Hear that a step is done, and write it."""
        self._clock = None
        spans = sorted([clock.wall, *clock.spans], key=lambda span: (span.start_ns, -span.end_ns))
        for span in spans:
            self._trace.write(span.kind, span, {"step": clock.step, **span.arguments})
            if span.kind != "minibatch":
                self._count(span, clock)
        self._steps.append(clock.step)
        if self._recorder is not None:
            with garbage_left_alone():
                self._keep_operators(self._recorder, spans, clock.step)
            self._recorder = None
            self._operator_steps.append(clock.step)

    def _keep_operators(self, recorder: OperatorRecorder, spans: list[Span], step: int) -> None:
        recording = recorder.stop(moment for span in spans for moment in (span.start_ns, span.end_ns))
        self._trace.write_recording(recording, step)
        add_operators(self._operators, recording.calls)

    def _count(self, span: Span, clock: StageClock) -> None:
        totals = self._stages.setdefault(span.name, StageTotals())
        totals.durations_ns.append(span.end_ns - span.start_ns)
        if totals.last_step != clock.step:
            totals.last_step = clock.step
            totals.tokens += clock.wall.arguments["tokens"]
        totals.cpu_peak_bytes = max(totals.cpu_peak_bytes, span.arguments["cpu_peak_bytes"])
        totals.cuda_peak_bytes = max(totals.cuda_peak_bytes, span.arguments["cuda_peak_bytes"])

    def _summary(self) -> Iterator[list[object]]:
        wall_ns = sum(self._stages["step"].durations_ns)
        for name, stage in self._stages.items():
            if not stage.durations_ns:
                continue
            durations_ms = np.array(stage.durations_ns, dtype=np.float64) / 1e6
            total_ms = sum(stage.durations_ns) / 1e6
            p50, p95 = np.percentile(durations_ms, [50, 95])
            times = [total_ms, total_ms / len(durations_ms), p50, p95]
            yield [
                name,
                len(durations_ms),
                *(f"{time:.6f}" for time in times),
                f"{total_ms * 1e6 / wall_ns:.6f}",
                stage.tokens,
                f"{stage.tokens / total_ms * 1e3:.3f}",
                stage.cpu_peak_bytes,
                stage.cuda_peak_bytes,
            ]

    def _operator_stats(self) -> Iterator[list[object]]:
        ordered = sorted(self._operators.items(), key=lambda item: (-item[1].own[0], item[0]))
        for name, operator in ordered:
            cpu, cuda, cpu_bytes, cuda_bytes = zip(operator.own, operator.total, strict=True)
            times = [f"{ns / 1e6:.6f}" for ns in (*cpu, *cuda)]
            yield [name, operator.calls, *times, *cpu_bytes, *cuda_bytes]


class TraceWriter:
    """Writes a trace event by event in Chrome's Trace Event Format, which chrome://tracing and Perfetto open."""

    def __init__(self, path: Path, start_ns: int) -> None:
        """Begin the file that :meth:`close` puts in the place of ``path``; its times count from ``start_ns``."""
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._start_ns = start_ns
        self._threads: dict[int, int] = {}
        self._streams: set[int] = set()
        self._names: dict[str, str] = {}
        with errors_name(self._partial):
            self._file = self._partial.open("w", encoding="utf-8")
            self._file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        self._write_name(TRAINING, STAGES_THREAD, "thread_name", "stages and their operators")
        self._write_name(TRAINING, STAGES_THREAD, "process_name", "training", end="")

    def write(self, category: str, what: Span | Operator, arguments: dict[str, int]) -> None:
        """Write a span of the thread of the stages."""
        self._write_event(category, what, TRAINING, STAGES_THREAD, arguments)

    def write_recording(self, recording: Recording, step: int) -> None:
        """Write operators beside the stages in which they ran, and kernels to a process of their own."""
        self._threads.setdefault(recording.main_thread, STAGES_THREAD)
        for call in recording.calls:
            if call.thread not in self._threads:
                self._threads[call.thread] = STAGES_THREAD + len(self._threads)
                self._write_name(TRAINING, self._threads[call.thread], "thread_name", "operators", start=",\n", end="")
            figures = {"cpu_bytes": call.cpu_bytes, "cuda_bytes": call.cuda_bytes, "cuda_ns": call.cuda_ns}
            arguments = {"step": step} | {name: figure for name, figure in figures.items() if figure}
            self._write_event("operator", call, TRAINING, self._threads[call.thread], arguments)
        for kernel in recording.kernels:
            if kernel.thread not in self._streams:
                self._streams.add(kernel.thread)
                self._write_name(GPU, kernel.thread, "thread_name", f"stream {kernel.thread}", start=",\n", end="")
            self._write_event("kernel", kernel, GPU, kernel.thread, {"step": step})

    def close(self, facts: dict[str, object]) -> None:
        """Write what is to be said of the whole, and give the file its name."""
        with errors_name(self._partial), self._file:
            self._file.write(f'\n], "otherData": {json.dumps(facts)}}}\n')
        self._partial.replace(self._path)

    def _write_event(
        self, category: str, what: Span | Operator, process: int, thread: int, arguments: dict[str, int]
    ) -> None:
        if what.name not in self._names:
            self._names[what.name] = json.dumps(what.name)
        details = ", ".join(f'"{name}": {value}' for name, value in arguments.items())
        self._file.write(
            f',\n{{"ph": "X", "cat": "{category}", "name": {self._names[what.name]}, "pid": {process}, '
            f'"tid": {thread}, "ts": {microseconds(what.start_ns - self._start_ns)}, '
            f'"dur": {microseconds(what.end_ns - what.start_ns)}, "args": {{{details}}}}}'
        )

    def _write_name(
        self, process: int, thread: int, what: str, name: str, *, start: str = "", end: str = ",\n"
    ) -> None:
        event = {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}
        self._file.write(f"{start}{json.dumps(event)}{end}")


def microseconds(ns: int) -> str:
    """Return whole nanoseconds as microseconds, exactly."""
    return f"{ns // 1000}.{ns % 1000:03d}"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return rows under their columns as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def timing_row(clock: StageClock, profiler: Profiler | None = None) -> dict[str, Any]:
    """Return the row of timings.jsonl: nothing in it can be reproduced, which is why it has a file of its own.

    ``profiled_from`` is the first step of the profile that the step belongs to.
    """
    row = {
        "step": clock.step,
        "step_time_s": clock.wall.seconds,
        "stages_s": clock.stage_seconds(),
        "tokens_per_second": clock.wall.arguments["tokens"] / clock.wall.seconds,
        "peak_mem_bytes": peak_memory_bytes() if profiler is None else profiler.peak_memory_bytes(),
    }
    return row if profiler is None else row | {"profiled_from": profiler.first_step}
