"""``rlhf check-profile`` on real artifacts that were spoiled: each kind of damage has its own message."""

import csv
import json
import shutil

import pytest

from rlhf_core.profiles import check
from rlhf_core.profiles.check import CheckFailed, check_profile
from rlhf_core.profiles.files import ProfileError
from rlhf_core.testing.command import run_command

pytestmark = [pytest.mark.m2, pytest.mark.usefixtures("reviews_drawn_once")]
NAMES = ("summary.csv", "chrome_trace.json", "op_stats.csv")


def complaint(run):
    with pytest.raises((CheckFailed, ProfileError, FileNotFoundError, ValueError)) as caught:
        list(check_profile(run))
    return str(caught.value)


def change_table(run, name, change):
    path = run / "profiles" / name
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    rows = change(rows) or rows
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def change_trace(run, change):
    path = run / "profiles" / "chrome_trace.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def change_log(run, name, change):
    path = run / name
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def span(tree, name, step=2):
    return next(e for e in tree["traceEvents"] if e["name"] == name and e["args"].get("step") == step)


@pytest.mark.parametrize("name", NAMES)
class TestFiles:
    def test_missing(self, profile_copy, name):
        (profile_copy / "profiles" / name).unlink()
        assert f"no {profile_copy / 'profiles' / name}" in complaint(profile_copy)
        outcome = run_command("check-profile", profile_copy)
        assert outcome.code == 1
        assert "NO " in outcome.out

    def test_empty(self, profile_copy, name):
        (profile_copy / "profiles" / name).write_text("")
        assert f"{name} is empty" in complaint(profile_copy)

    @pytest.mark.parametrize("part", [0.3, 0.9])
    def test_cut_short(self, profile_copy, name, part):
        path = profile_copy / "profiles" / name
        data = path.read_bytes()
        path.write_bytes(data[: int(part * len(data))].rstrip(b"\n"))
        assert "cut short" in complaint(profile_copy)

    def test_bytes_of_another_kind(self, profile_copy, name):
        (profile_copy / "profiles" / name).write_bytes(b"\xff\xfe\x00" * 50)
        assert f"{name} is not UTF-8" in complaint(profile_copy)


def cell(stage, column, change):
    def spoil(rows):
        index = rows[0].index(column)
        row = next(row for row in rows if row[0] == stage)
        row[index] = change(row[index])

    return spoil


def scaled(factor):
    return lambda text: f"{float(text) * factor:.6f}"


SUMMARY = {
    "scaled total": (cell("update", "total_ms", scaled(1.001)), "summary: total_ms of update is"),
    "edited mean": (cell("rollout", "mean_ms", scaled(0.99)), "summary: mean_ms of rollout is"),
    "edited median": (cell("update/forward", "p50_ms", scaled(1.01)), "summary: p50_ms of update/forward is"),
    "edited percentile": (cell("reward", "p95_ms", scaled(1.01)), "summary: p95_ms of reward is"),
    "edited share": (cell("update", "share", scaled(0.999)), "summary: share of update is"),
    "more calls": (cell("rollout", "calls", lambda text: str(int(text) + 1)), "summary: calls of rollout is 6"),
    "more tokens": (cell("rollout", "tokens", lambda text: str(int(text) + 1)), "summary: tokens of rollout is"),
    "edited rate": (cell("step", "tokens_per_s", scaled(1.01)), "summary: tokens_per_s of step is"),
    "edited peak": (cell("update", "cpu_peak_bytes", lambda text: str(int(text) // 2)), "cpu_peak_bytes of update is"),
    "negative": (cell("update", "total_ms", lambda text: f"-{text}"), "total_ms is -"),
    "not a number": (cell("update", "total_ms", lambda text: "nan"), "total_ms is nan; it must be finite"),
    "a word": (cell("update", "calls", lambda text: "many"), "calls is 'many'; it must be a whole number"),
    "half a call": (cell("update", "calls", lambda text: "5.5"), "calls is '5.5'; it must be a whole number"),
    "a row less": (lambda rows: [row for row in rows if row[0] != "advantages"], "only the second ['advantages']"),
    "a row twice": (lambda rows: [*rows, rows[3]], "has a row already"),
    "a row more": (lambda rows: [*rows, ["thinking", *rows[3][1:]]], "only the first has ['thinking']"),
    "a cell less": (lambda rows: [*rows[:3], rows[3][:-1], *rows[4:]], "10 values; there must be 11"),
    "another column": (lambda rows: [["phase", *rows[0][1:]], *rows[1:]], "the columns are phase,calls"),
    "stages swapped": (
        lambda rows: [[{"rollout": "update", "update": "rollout"}.get(row[0], row[0]), *row[1:]] for row in rows],
        "summary: total_ms of ",
    ),
}


@pytest.mark.parametrize("kind", SUMMARY)
def test_a_spoiled_summary_is_found_out(profile_copy, kind):
    spoil, message = SUMMARY[kind]
    change_table(profile_copy, "summary.csv", spoil)
    assert message in complaint(profile_copy)


OPERATORS = {
    "inflated self time": (cell("aten::mul", "self_cpu_ms", scaled(3)), "operators: self_cpu_ms of aten::mul is"),
    "total below self": (cell("aten::mul", "total_cpu_ms", scaled(0.1)), "operators: total_cpu_ms of aten::mul is"),
    "time on a GPU": (cell("aten::mul", "self_cuda_ms", lambda text: "1.0"), "operators: self_cuda_ms of aten::mul is"),
    "more calls": (cell("aten::mul", "calls", lambda text: str(int(text) + 1)), "operators: calls of aten::mul is"),
    "memory": (cell("aten::mul", "self_cpu_bytes", lambda text: str(int(text) + 8)), "self_cpu_bytes of aten::mul is"),
    "a row less": (lambda rows: [row for row in rows if row[0] != "aten::mul"], "only the second ['aten::mul']"),
    "a row more": (lambda rows: [*rows, ["aten::think", *rows[3][1:]]], "only the first has ['aten::think']"),
    "only the header": (lambda rows: rows[:1], "only the first has none, only the second ["),
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_spoiled_operators_are_found_out(profile_copy, kind):
    spoil, message = OPERATORS[kind]
    change_table(profile_copy, "op_stats.csv", spoil)
    assert message in complaint(profile_copy)


def set_to(name, key, value, step=2):
    return lambda tree: span(tree, name, step).__setitem__(key, value)


def moved(name, us):
    def spoil(tree):
        event = span(tree, name)
        event["ts"] += us

    return spoil


def stretched(name, factor):
    def spoil(tree):
        event = span(tree, name)
        event["dur"] *= factor

    return spoil


def without(choose):
    return lambda tree: tree.__setitem__("traceEvents", [e for e in tree["traceEvents"] if not choose(e)])


def doubled(name):
    return lambda tree: tree["traceEvents"].append(dict(span(tree, name)))


def all_scaled(tree):
    for event in tree["traceEvents"]:
        if event["ph"] == "X":
            event["ts"], event["dur"] = event["ts"] * 1.5, event["dur"] * 1.5


def swapped(tree):
    one, other = span(tree, "rollout"), span(tree, "reward")
    one["name"], other["name"] = "reward", "rollout"


def inflated(tree):
    """Fifty operators side by side in a stage, each half as long as the stage."""
    events = [e for e in tree["traceEvents"] if e.get("cat") == "operator"]
    stage = span(tree, "rollout", step=1)
    inside = [e for e in events if stage["ts"] <= e["ts"] <= stage["ts"] + stage["dur"]]
    for number, event in enumerate(inside[:50]):
        event["ts"], event["dur"] = stage["ts"] + number / 100 * stage["dur"], stage["dur"] / 2


TRACE = {
    "negative length": (set_to("rollout", "dur", -5.0), "dur is -5.0; it must not be negative"),
    "negative start": (set_to("rollout", "ts", -5.0), "ts is -5.0; it must not be negative"),
    "not a number": (set_to("rollout", "dur", float("nan")), "dur is nan; it must be a finite number"),
    "no length": (set_to("rollout", "dur", None), "dur is None; it must be a finite number"),
    "true for a number": (set_to("rollout", "dur", True), "dur is True; it must be a finite number"),
    "no step": (set_to("rollout", "args", {}), "args.step is None"),
    "another step": (lambda tree: span(tree, "rollout")["args"].update(step=3), "says step 3 and lies in step 2"),
    "a step that was not": (lambda tree: span(tree, "rollout")["args"].update(step=9), "belong to steps [9]"),
    "moved a little": (moved("reward", 200.0), "overlap"),
    "moved out of its step": (moved("checkpoint", 1e7), "lies in no step"),
    "stretched": (stretched("rollout", 1.5), "trace: stage reward at"),
    "shrunk": (stretched("update/forward", 0.5), "timings: step 2: update/forward took"),
    "shrunk stage": (stretched("reward", 0.5), "timings: step 2: reward took"),
    "stages swapped": (swapped, "timings: step 2: "),
    "all of it scaled": (all_scaled, "timings: step 1: step_time_s took"),
    "a span twice": (doubled("reward"), "trace: stage reward at"),
    "a step twice": (doubled("step"), "differ"),
    "the large stages gone": (
        without(lambda e: e["name"].startswith(("rollout", "ref", "update")) and e["args"]["step"] == 2),
        "coverage: the stages of step 2 come to",
    ),
    "a small stage gone": (
        without(lambda e: e["name"] == "metrics" and e["args"]["step"] == 2),
        "step 2: the stages of timings.jsonl and of the trace differ: only the first has ['metrics']",
    ),
    "a step gone": (without(lambda e: e["args"].get("step") == 3), "stated in otherData differ"),
    "more tokens": (lambda tree: span(tree, "step")["args"].update(tokens=999), "tokens: step 2 has 999 by the trace"),
    "no tokens": (lambda tree: span(tree, "step")["args"].pop("tokens"), "tokens is None"),
    "a higher peak": (
        lambda tree: span(tree, "reward")["args"].update(cpu_peak_bytes=10**15),
        "summary: cpu_peak_bytes of reward is",
    ),
    "no operators": (without(lambda e: e.get("cat") == "operator"), "the operators of op_stats.csv and of the trace"),
    "an unknown category": (set_to("rollout", "cat", "thought"), "unknown category 'thought'"),
    "another thread": (set_to("rollout", "tid", 7), "is in process 1 thread 7"),
    "another kind of event": (set_to("rollout", "ph", "B"), "is no complete event"),
    "no events": (lambda tree: tree["traceEvents"].clear(), "has no events"),
    "no list": (lambda tree: tree.pop("traceEvents"), "has no list traceEvents"),
    "no facts": (lambda tree: tree.pop("otherData"), "has no table otherData"),
    "a fact of another kind": (lambda tree: tree["otherData"].update(steps="all"), "otherData.steps is no list"),
    "inflated operators": (inflated, "overlap"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TRACE)
def test_a_spoiled_trace_is_found_out(profile_copy, kind):
    spoil, message = TRACE[kind]
    change_trace(profile_copy, spoil)
    assert message in complaint(profile_copy)


def test_operators_own_time_above_their_stages_is_found_out_by_itself(profile_copy, monkeypatch):
    change_trace(profile_copy, inflated)
    monkeypatch.setattr(check, "CHECKS", (check.check_operator_time,))
    assert "operators: step 1: their own time in rollout is 2" in complaint(profile_copy)


LOGS = {
    "other tokens": ("metrics.jsonl", lambda rows: rows[1].update(response_tokens=999), "tokens: step 2 has"),
    "a step less": ("metrics.jsonl", lambda rows: rows.pop(), "metrics.jsonl has no step 5"),
    "another rate": ("timings.jsonl", lambda rows: rows[1].update(tokens_per_second=5.0), "timings.jsonl says 5.000"),
    "no rate": ("timings.jsonl", lambda rows: rows[1].pop("tokens_per_second"), "tokens_per_second is None"),
    "another time": ("timings.jsonl", lambda rows: rows[1].update(step_time_s=5.0), "step_time_s took 5.0 s"),
    "no stages": ("timings.jsonl", lambda rows: rows[1].update(stages_s=3), "has no table stages_s"),
    "a row less": ("timings.jsonl", lambda rows: rows.pop(), "by timings.jsonl and by the trace differ"),
    "less memory": ("timings.jsonl", lambda rows: rows[1].update(peak_mem_bytes=5), "above the 5 of timings.jsonl"),
}


@pytest.mark.parametrize("kind", LOGS)
def test_logs_that_say_something_else_are_found_out(profile_copy, kind):
    name, spoil, message = LOGS[kind]
    change_log(profile_copy, name, spoil)
    assert message in complaint(profile_copy)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("summary.csv",), "summary: total_ms of step is"),
        (("chrome_trace.json",), "timings: step 1: step_time_s took"),
        (("op_stats.csv",), "operators: self_cpu_ms of"),
        (NAMES, "timings: step 1: step_time_s took"),
    ],
)
def test_files_of_another_run_are_found_out(profile_copy, small_runs, names, message):
    """The other run has the same configuration: only its times differ."""
    for name in names:
        shutil.copy(small_runs[1] / "profiles" / name, profile_copy / "profiles" / name)
    assert message in complaint(profile_copy)


def test_of_several_runs_the_check_ends_at_the_first_that_fails(profile_copy, small_runs):
    change_table(profile_copy, "summary.csv", cell("update", "total_ms", scaled(2)))
    outcome = run_command("check-profile", small_runs[0], profile_copy, small_runs[1])
    assert outcome.code == 1
    assert outcome.out.count("NO ") == 1
    assert str(small_runs[1]) not in outcome.out
