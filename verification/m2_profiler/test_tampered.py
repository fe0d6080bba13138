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

    def test_cut_short(self, profile_copy, name):
        """At many places, some of them behind a brace, in a number or in a name."""
        path = profile_copy / "profiles" / name
        data = path.read_bytes().rstrip(b"\n")
        ends = {int(part / 20 * len(data)) for part in range(1, 20)} | set(range(len(data) - 30, len(data)))
        for end in ends:
            path.write_bytes(data[:end].rstrip(b"\n"))
            assert "cut short" in complaint(profile_copy), end

    def test_a_byte_order_mark(self, profile_copy, name):
        path = profile_copy / "profiles" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert f"{name} begins with a byte order mark" in complaint(profile_copy)

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
    "in another order": (lambda rows: [rows[0], *rows[:0:-1]], "summary.csv:2: "),
    "in seconds": (
        lambda rows: [rows[0], *([row[0], row[1], f"{float(row[2]) / 1000:.6f}", *row[3:]] for row in rows[1:])],
        "summary: total_ms of step is",
    ),
    "columns of seconds": (lambda rows: [[name.replace("_ms", "_s") for name in rows[0]], *rows[1:]], "total_s,mean_s"),
    "a column more": (lambda rows: [[*row, "1"] for row in rows], "cuda_peak_bytes,1; they must be"),
    "the header twice": (lambda rows: [rows[0], *rows], "calls is 'calls'; it must be a whole number"),
    "no header": (lambda rows: rows[1:], "the columns are step,5,"),
    "values of another row": (
        lambda rows: [*rows[:2], [rows[2][0], *rows[3][1:]], [rows[3][0], *rows[2][1:]], *rows[4:]],
        "summary: total_ms of ",
    ),
    "a huge count": (cell("update", "calls", lambda text: "9" * 400), "calls is 999999999999999999999999999999… (400 "),
    "a huge time": (cell("update", "total_ms", lambda text: "1e300"), "total_ms is 1e300; it must be below 2^63"),
    "infinite": (cell("update", "share", lambda text: "-inf"), "share is -inf; it must be finite"),
    "no value": (cell("update", "calls", lambda text: ""), "calls is ''; it must be a whole number"),
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
    "in another order": (lambda rows: [rows[0], *rows[:0:-1]], "op_stats.csv:2: "),
    "a huge size": (cell("aten::mul", "self_cpu_bytes", lambda text: "9" * 400), "it must be below 2^63"),
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


def grown_around(name, other):
    def spoil(tree):
        event, inner = span(tree, name), span(tree, other)
        event["dur"] = inner["ts"] + inner["dur"] - event["ts"]

    return spoil


def without(choose):
    return lambda tree: tree.__setitem__("traceEvents", [e for e in tree["traceEvents"] if not choose(e)])


def doubled(name):
    return lambda tree: tree["traceEvents"].append(dict(span(tree, name)))


def all_scaled(tree):
    for event in tree["traceEvents"]:
        if event["ph"] == "X":
            event["ts"], event["dur"] = event["ts"] * 1.5, event["dur"] * 1.5


def in_milliseconds(tree):
    for event in tree["traceEvents"]:
        if event["ph"] == "X":
            event["ts"], event["dur"] = event["ts"] / 1000, event["dur"] / 1000


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
    "grown around the next": (grown_around("rollout", "reward"), "trace: stage reward at"),
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
    "a huge start": (set_to("rollout", "ts", 1e308), "ts is 1e+308; it must be below 2^63 ns"),
    "a huge length": (set_to("rollout", "dur", 10**400), "(401 characters); it must be below 2^63 ns"),
    "huge memory": (lambda tree: span(tree, "step")["args"].update(cpu_peak_bytes=10**400), "args.cpu_peak_bytes is 1"),
    "a huge thread": (set_to("rollout", "tid", 10**400), "tid is 1"),
    "time on a GPU that goes back": (
        lambda tree: next(e for e in tree["traceEvents"] if e.get("cat") == "operator")["args"].update(cuda_ns=-1),
        "the first must not be negative",
    ),
    "a minibatch twice": (doubled("minibatch"), "step 2 has 2 minibatches, 1 of them different; there must be 1"),
    "no minibatch in a step": (
        without(lambda e: e["name"] == "minibatch" and e["args"]["step"] == 3),
        "trace: step 3 has 0 minibatches, 0 of them different; there must be 1",
    ),
    "no minibatches": (without(lambda e: e["name"] == "minibatch"), "the updates have no minibatches"),
    "in milliseconds": (in_milliseconds, "overlap"),
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
    "a step less": ("metrics.jsonl", lambda rows: rows.pop(), "only the first has none, only the second [5]"),
    "a step more": ("metrics.jsonl", lambda rows: rows.append(rows[-1] | {"step": 6}), "only the first has [6]"),
    "a step twice": ("metrics.jsonl", lambda rows: rows.append(rows[-1]), "metrics.jsonl:6: step 5 a second time"),
    "a time twice": ("timings.jsonl", lambda rows: rows.insert(0, rows[1]), "timings.jsonl:2: step 1 after step 2"),
    "rows swapped": ("timings.jsonl", lambda rows: rows.reverse(), "timings.jsonl:2: step 4 after step 5"),
    "a huge rate": (
        "timings.jsonl",
        lambda rows: rows[1].update(tokens_per_second=10**400),
        "(401 characters); it must",
    ),
    "a negative time": ("timings.jsonl", lambda rows: rows[1].update(step_time_s=-1.0), "step_time_s took -1.0 s"),
    "NaN": ("timings.jsonl", lambda rows: rows[1].update(step_time_s=float("nan")), "step_time_s is nan; it must be"),
    "another rate": ("timings.jsonl", lambda rows: rows[1].update(tokens_per_second=5.0), "timings.jsonl says 5.000"),
    "no rate": ("timings.jsonl", lambda rows: rows[1].pop("tokens_per_second"), "tokens_per_second is None"),
    "another time": ("timings.jsonl", lambda rows: rows[1].update(step_time_s=5.0), "step_time_s took 5.0 s"),
    "no stages": ("timings.jsonl", lambda rows: rows[1].update(stages_s=3), "has no table stages_s"),
    "a row less": ("timings.jsonl", lambda rows: rows.pop(), "the steps of metrics.jsonl and of timings.jsonl differ"),
    "less memory": ("timings.jsonl", lambda rows: rows[1].update(peak_mem_bytes=5), "above the 5 of timings.jsonl"),
}


@pytest.mark.parametrize("kind", LOGS)
def test_logs_that_say_something_else_are_found_out(profile_copy, kind):
    name, spoil, message = LOGS[kind]
    change_log(profile_copy, name, spoil)
    assert message in complaint(profile_copy)


@pytest.mark.parametrize("name", ["metrics.jsonl", "timings.jsonl"])
def test_a_log_that_an_editor_saved_anew_is_found_out(profile_copy, name):
    path = profile_copy / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert f"{name} begins with a byte order mark" in complaint(profile_copy)


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
