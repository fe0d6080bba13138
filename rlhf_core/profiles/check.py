"""Whether a profile adds up: every figure of it that follows from another is computed again. Imports no torch."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from rlhf_core.checks.step_log import brief
from rlhf_core.profiles.evidence import (
    MS_TOLERANCE,
    CheckFailed,
    Profile,
    number,
    read_profile,
    require,
    require_order,
    same,
)
from rlhf_core.profiles.files import GPU, STAGES_THREAD, TRAINING, Event
from rlhf_core.profiles.operator_check import check_operator_time, check_operators

COVERED = (0.85, 1.15)
"""Bounds of a step's top-level stages together, over its wall time."""
SHARE_TOLERANCE = 2e-6
RATE_TOLERANCE = 1e-4
"""Relative, of tokens a second, which is written with three decimals."""


def check_profile(folder: Path) -> Iterator[str]:
    """Check the profile of a run, or a folder that a ``Profiler`` wrote; yield a line for each check that holds.

    Raises:
        ProfileError: a file is missing, empty, cut short or malformed.
        CheckFailed: figures contradict each other.
        FileNotFoundError, ValueError: a log of the run is missing or malformed.
    """
    profile = read_profile(folder)
    counts = len(profile.trace.events), len(profile.summary), len(profile.operators)
    yield "files: {} events, {} stages, {} operators".format(*counts)
    for check in CHECKS:
        yield check(profile)


def check_steps(profile: Profile) -> str:
    """Every profiled step is there once, and no other."""
    found = sorted(event.step for event in profile.spans("step"))
    stated = profile.trace.steps
    same("trace: the steps of its spans and those stated in otherData", found, sorted(stated))
    require(found == list(range(found[0], found[0] + len(found))) if found else False, f"trace: its steps are {found}")
    in_order = [event.step for event in profile.spans("step")]
    require(in_order == found, f"trace: its steps come in the order {in_order}")
    strays = sorted({event.step for event in profile.trace.events} - set(found))
    require(not strays, f"trace: spans belong to steps {strays}, which were not profiled")
    if profile.timings is not None and profile.metrics is not None:
        same("the steps of metrics.jsonl and of timings.jsonl", sorted(profile.metrics), sorted(profile.timings))
        logged = [step for step, row in profile.timings.items() if row.get("profiled_from") == found[0]]
        same("the profiled steps by timings.jsonl and by the trace", sorted(logged), found)
    return f"steps: {len(found)}, from {found[0]} to {found[-1]}, each once"


def check_categories(profile: Profile) -> str:
    """Every event is of a known kind and lies where its kind lies."""
    for event in profile.trace.events:
        known = event.category in ("step", "stage", "minibatch", "operator", "kernel")
        require(known, f"trace: {event.name} is of the unknown category {event.category!r}")
        in_place = event.process == (GPU if event.category == "kernel" else TRAINING)
        if event.category in ("step", "stage", "minibatch"):
            in_place = in_place and event.thread == STAGES_THREAD
        require(in_place, f"trace: {event.category} {event.name} is in process {event.process} thread {event.thread}")
    return f"categories: {len(profile.trace.events)} events, each where its kind belongs"


def check_nesting(profile: Profile) -> str:
    """On each thread a span lies inside another or beside it; a stage lies in the stage and the step that it names."""
    pairs = 0
    by_thread: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in profile.spans("step", "stage", "minibatch", "operator"):
        by_thread[event.process, event.thread].append(event)
    for events in by_thread.values():
        around: list[Event] = []
        for event in events:
            while around and around[-1].end_ns <= event.start_ns:
                around.pop()
            if around:
                outer = around[-1]
                inside = event.end_ns <= outer.end_ns
                require(inside, f"trace: step {event.step}: {event.name} and {outer.name} overlap")
                pairs += 1
            _require_place(event, around)
            around.append(event)
    return f"nesting: {pairs} spans lie inside others, and none overlap"


def _require_place(event: Event, around: list[Event]) -> None:
    if event.category == "step":
        require(not around, f"trace: step {event.step} lies inside {around[-1].name if around else ''}")
        return
    if event.category == "operator":
        return
    where = f"trace: {event.category} {event.name} at {event.start_ns / 1000:.3f} us"
    steps = [outer for outer in around if outer.category == "step"]
    require(len(steps) == 1, f"{where} lies in no step")
    require(steps[0].step == event.step, f"{where} says step {event.step} and lies in step {steps[0].step}")
    if event.category == "stage":
        stages = [outer.name for outer in around if outer.category == "stage"]
        parent = event.name.rpartition("/")[0]
        require((stages[-1] if stages else "") == parent, f"{where} lies in {stages[-1] if stages else 'no stage'}")


def check_minibatches(profile: Profile) -> str:
    """Every step has the same minibatches, each once: all of those that its epochs and their numbers span."""
    numbers: dict[int, list[tuple[int, ...]]] = {step: [] for step in profile.steps}
    for event in profile.spans("minibatch"):
        found = [value for name, value in sorted(event.arguments.items()) if name != "step"]
        where = f"trace: step {event.step}: the numbers of a minibatch are {brief(found)}"
        require(all(type(value) is int and value >= 0 for value in found), f"{where}; they must be whole numbers")
        numbers[event.step].append(tuple(found))
    usual = set(next(iter(numbers.values())))
    spanned = math.prod(1 + max(column) for column in zip(*usual, strict=True)) if usual else 0
    for step, found in numbers.items():
        where = f"trace: step {step} has {len(found)} minibatches, {len(set(found))} of them different"
        require(len(found) == spanned and set(found) == usual, f"{where}; there must be {spanned}")
    updates = profile.timings is not None and any(event.name == "update" for event in profile.spans("stage"))
    require(spanned > 0 or not updates, "trace: the updates have no minibatches")
    return f"minibatches: {spanned} in each step, each once"


def check_coverage(profile: Profile) -> str:
    """The top-level stages of every step come to its wall time, within 15%."""
    totals: dict[int, int] = dict.fromkeys(profile.steps, 0)
    for event in profile.spans("stage"):
        if "/" not in event.name:
            totals[event.step] += event.ns
    ratios = {}
    for step, wall in profile.steps.items():
        require(wall.ns > 0, f"coverage: step {step} took no time")
        ratios[step] = totals[step] / wall.ns
        require(
            COVERED[0] <= ratios[step] <= COVERED[1],
            f"coverage: the stages of step {step} come to {ratios[step]:.3f} of its wall time, outside of "
            f"{COVERED[0]} to {COVERED[1]}",
        )
    return f"coverage: the stages of each step come to {min(ratios.values()):.3f} to {max(ratios.values()):.3f} of it"


def check_timings(profile: Profile) -> str:
    """The spans of every step agree with its row in timings.jsonl."""
    if profile.timings is None:
        return "timings: no timings.jsonl beside this profile"
    largest = 0.0
    seconds: dict[int, dict[str, float]] = {step: defaultdict(float) for step in profile.steps}
    for event in profile.spans("stage"):
        seconds[event.step][event.name] += event.ns / 1e9
    for step, wall in profile.steps.items():
        row = profile.timings[step]
        stages = row.get("stages_s")
        if not isinstance(stages, dict):
            raise CheckFailed(f"timings.jsonl: step {step} has no table stages_s")
        same(f"step {step}: the stages of timings.jsonl and of the trace", sorted(stages), sorted(seconds[step]))
        pairs = [("step_time_s", row.get("step_time_s"), wall.ns / 1e9)]
        pairs += [(name, stages[name], value) for name, value in seconds[step].items()]
        for name, logged, traced in pairs:
            difference = abs(number(logged, f"timings.jsonl: step {step}: {name}") - traced)
            require(
                difference <= 1e-8 + 1e-9 * traced,
                f"timings: step {step}: {name} took {logged} s by timings.jsonl and {traced:.9f} s by the trace",
            )
            largest = max(largest, difference)
    return f"timings: the trace agrees with timings.jsonl within {largest * 1e9:.0f} ns"


def check_tokens(profile: Profile) -> str:
    """The tokens of every step are those of the log, and so is their rate."""
    total = 0
    for step, wall in profile.steps.items():
        tokens = wall.arguments.get("tokens")
        require(type(tokens) is int and tokens >= 0, f"trace: step {step}: tokens is {tokens!r}")
        total += wall.arguments["tokens"]
        if profile.metrics is None or profile.timings is None:
            continue
        require(step in profile.metrics, f"metrics.jsonl has no step {step}")
        logged = profile.metrics[step].get("response_tokens")
        require(tokens == logged, f"tokens: step {step} has {tokens} by the trace and {brief(logged)} by metrics.jsonl")
        rate = number(profile.timings[step].get("tokens_per_second"), f"timings.jsonl: step {step}: tokens_per_second")
        expected = wall.arguments["tokens"] / (wall.ns / 1e9)
        require(
            math.isclose(rate, expected, rel_tol=1e-6),
            f"tokens: step {step}: timings.jsonl says {rate:.3f} a second; tokens over time are {expected:.3f}",
        )
    logs = "" if profile.metrics is None else ", as metrics.jsonl has them"
    return f"tokens: {total}{logs}"


def check_summary(profile: Profile) -> str:
    """Every figure of summary.csv follows from the spans."""
    wall_ns = sum(event.ns for event in profile.steps.values())
    durations: dict[str, list[int]] = defaultdict(list)
    steps: dict[str, set[int]] = defaultdict(set)
    peaks: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for event in profile.spans("step", "stage"):
        durations[event.name].append(event.ns)
        steps[event.name].add(event.step)
        peaks[event.name].append(_peaks(event))
    same("the stages of summary.csv and of the trace", sorted(profile.summary), sorted(durations))
    largest = 0.0
    for name, row in profile.summary.items():
        ms = [ns / 1e6 for ns in durations[name]]
        tokens = sum(profile.steps[step].arguments["tokens"] for step in steps[name])
        expected = {
            "calls": len(ms),
            "total_ms": math.fsum(ms),
            "mean_ms": statistics.fmean(ms),
            "p50_ms": percentile(ms, 0.5),
            "p95_ms": percentile(ms, 0.95),
            "share": math.fsum(ms) * 1e6 / wall_ns,
            "tokens": tokens,
            "tokens_per_s": tokens / (math.fsum(ms) / 1e3),
            "cpu_peak_bytes": max(cpu for cpu, _ in peaks[name]),
            "cuda_peak_bytes": max(cuda for _, cuda in peaks[name]),
        }
        for column, value in expected.items():
            difference = abs(row[column] - value)
            tolerance = {"share": SHARE_TOLERANCE, "tokens_per_s": 1e-3 + RATE_TOLERANCE * value}.get(
                column, MS_TOLERANCE if column.endswith("_ms") else 0
            )
            require(
                difference <= tolerance,
                f"summary: {column} of {name} is {row[column]:g} in summary.csv and {value:g} by the trace",
            )
            if column == "total_ms":
                largest = max(largest, difference / value if value else 0.0)
    require_order("summary.csv", list(profile.summary), list(durations), "the stages begin")
    return f"summary: {len(profile.summary)} stages agree with the trace; the largest total is off by {largest:.1e}"


def _peaks(event: Event) -> tuple[int, int]:
    cpu, cuda = (event.arguments.get(name) for name in ("cpu_peak_bytes", "cuda_peak_bytes"))
    if type(cpu) is not int or type(cuda) is not int or min(cpu, cuda) < 0:
        raise CheckFailed(f"trace: step {event.step}: the peaks of {event.name} are {cpu!r} and {cuda!r}; no bytes")
    return cpu, cuda


def percentile(values: list[float], share: float) -> float:
    """Return the value below which ``share`` of the values lie, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def check_memory(profile: Profile) -> str:
    """A stage's peak is not above that of what it lies in, nor above the largest that timings.jsonl knows."""
    names: dict[tuple[int, str], Event] = {}
    largest = 0
    for event in profile.spans("step", "stage"):
        names[event.step, event.name] = event
        parent = event.name.rpartition("/")[0] or "step"
        largest = max(largest, *_peaks(event))
        if event.category == "stage":
            outer = names.get((event.step, parent))
            require(outer is not None, f"trace: step {event.step}: {event.name} comes before {parent}")
            assert outer is not None
            for mine, around in zip(_peaks(event), _peaks(outer), strict=True):
                require(
                    mine <= around,
                    f"memory: step {event.step}: {event.name} peaks at {mine} bytes, above the {around} of {parent}",
                )
    if profile.timings is not None:
        for step, wall in profile.steps.items():
            known = profile.timings[step].get("peak_mem_bytes")
            mine = _peaks(wall)[1] or _peaks(wall)[0]
            require(
                type(known) is int and mine <= known,
                f"memory: step {step} peaks at {mine} bytes by the trace, above the {known} of timings.jsonl",
            )
    return f"memory: at most {largest / 2**20:.1f} MiB, no stage above what it lies in"


CHECKS: tuple[Callable[[Profile], str], ...] = (
    check_categories,
    check_steps,
    check_nesting,
    check_minibatches,
    check_coverage,
    check_timings,
    check_tokens,
    check_summary,
    check_memory,
    check_operators,
    check_operator_time,
)
