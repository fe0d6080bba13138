"""Whether what a profile says of operators adds up. Imports no torch."""

import bisect
from collections import defaultdict
from collections.abc import Iterator

from rlhf_core.checks.step_log import brief
from rlhf_core.profiles.evidence import MS_TOLERANCE, Profile, require, require_order, same
from rlhf_core.profiles.files import Event


def check_operators(profile: Profile) -> str:
    """Every figure of op_stats.csv follows from the trace's operators."""
    expected: dict[str, list[int]] = {}
    for event, own, total in _operator_figures(profile):
        entry = expected.setdefault(event.name, [0] * 9)
        entry[0] += 1
        for index, value in enumerate((*own, *total), start=1):
            entry[index] += value
    same("the operators of op_stats.csv and of the trace", sorted(profile.operators), sorted(expected))
    recorded = sorted({event.step for event in profile.spans("operator")})
    same("the steps with operators and those stated in otherData", recorded, sorted(profile.trace.operator_steps))
    require(bool(recorded), "operators: none were recorded")
    for name, row in profile.operators.items():
        calls, *figures = expected[name]
        own, total = figures[:4], figures[4:]
        wanted = {"calls": calls}
        for column, index in (("cpu_ms", 0), ("cuda_ms", 1), ("cpu_bytes", 2), ("cuda_bytes", 3)):
            wanted |= {f"self_{column}": own[index], f"total_{column}": total[index]}
        for column, value in wanted.items():
            exact = value / 1e6 if column.endswith("_ms") else value
            require(
                abs(row[column] - exact) <= (MS_TOLERANCE if column.endswith("_ms") else 0),
                f"operators: {column} of {name} is {row[column]:g} in op_stats.csv and {exact:g} by the trace",
            )
    by_time = sorted(expected, key=lambda name: (-expected[name][1], name))
    require_order("op_stats.csv", list(profile.operators), by_time, "their own time falls")
    return f"operators: {len(expected)} agree with the trace, recorded in {len(recorded)} of {len(profile.steps)} steps"


def _operator_figures(profile: Profile) -> Iterator[tuple[Event, list[int], list[int]]]:
    """Yield each call with its own figures and its total ones: ns on CPU, ns on GPU, bytes on CPU, bytes on GPU.

    A call that does not lie in another whole lies beside it. The total of a call in a call of the same operator is
    zero: it is in that one's.
    """
    threads: dict[int, list[tuple[Event, list[int], list[int]]]] = defaultdict(list)
    done: list[tuple[Event, list[int], list[int]]] = []

    def close(stack: list[tuple[Event, list[int], list[int]]]) -> None:
        event, own, total = stack.pop()
        if stack:
            stack[-1][1][0] -= event.ns
            for index in range(1, 4):
                stack[-1][2][index] += total[index]
        repeated = any(outer.name == event.name for outer, _, _ in stack)
        done.append((event, own, [0] * 4 if repeated else total))

    for event in profile.spans("operator"):
        stack = threads[event.thread]
        while stack and stack[-1][0].end_ns < max(event.end_ns, event.start_ns + 1):
            close(stack)
        given = [event.arguments.get(name, 0) for name in ("cuda_ns", "cpu_bytes", "cuda_bytes")]
        whole = all(type(value) is int for value in given)
        where = f"trace: step {event.step}: cuda_ns, cpu_bytes and cuda_bytes of {event.name} are {brief(given)}"
        require(whole, f"{where}; they must be whole numbers")
        require(given[0] >= 0, f"{where}; the first must not be negative")
        stack.append((event, [event.ns, *given], [event.ns, *given]))
    for stack in threads.values():
        while stack:
            close(stack)
    yield from done


def check_operator_time(profile: Profile) -> str:
    """The operators' own time within a stage is not above its time on each thread that recorded them."""
    stages = profile.spans("stage")
    top = [event for event in stages if "/" not in event.name]
    starts = [event.start_ns for event in top]
    threads = {event.thread for event in profile.spans("operator")}
    own: dict[int, int] = defaultdict(int)
    steps = profile.steps
    for event, figures, _ in _operator_figures(profile):
        wall = steps[event.step]
        within = wall.start_ns <= event.start_ns and event.end_ns <= wall.end_ns
        require(within, f"operators: step {event.step}: {event.name} lies outside of its step")
        index = bisect.bisect_right(starts, event.start_ns) - 1
        if index >= 0 and event.end_ns <= top[index].end_ns:
            own[index] += figures[0]
    largest = 0.0
    for index, ns in own.items():
        stage = top[index]
        share = ns / max(stage.ns * len(threads), 1)
        require(
            share <= 1.0,
            f"operators: step {stage.step}: their own time in {stage.name} is {share:.2f} of its time "
            f"times {len(threads)} threads",
        )
        largest = max(largest, share)
    return f"operator time: at most {largest:.2f} of a stage's time times {len(threads)} thread(s)"
