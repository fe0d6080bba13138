"""``Profiler`` around loops that are not ours, and what torch's recorder is made to say."""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rlhf_core import profiling
from rlhf_core.profiler import Profiler, powers_of_100
from rlhf_core.profiles.check import check_profile
from rlhf_core.profiles.operators import Operator, OperatorTotals, add_operators, clock_shift, snapped
from rlhf_core.profiling import PeakMemory
from rlhf_core.testing.command import run_command

pytestmark = pytest.mark.m2

ROOT = Path(__file__).parents[2]


def plain_loop(profiler, steps=3):
    """What anybody's trainer does."""
    model = torch.nn.Linear(32, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        batch = torch.randn(64, 32)
        with profiler.step(tokens=batch.numel()):
            with profiler.stage("rollout"):
                time.sleep(0.2)  # so long that a busy machine cannot put a seventh of the step between two stages
                for _ in range(20):
                    model(batch).softmax(-1)
            with profiler.stage("update"):
                with profiler.stage("forward"):
                    loss = model(batch).square().mean()
                with profiler.stage("backward"):
                    loss.backward()
                optimizer.step()


def table(folder, name):
    with (folder / name).open(newline="") as file:
        return {
            row[0]: dict(zip(header, row, strict=True)) for header, *rows in [list(csv.reader(file))] for row in rows
        }


def test_a_plain_torch_loop_gets_files_that_add_up(tmp_path):
    with Profiler(tmp_path) as profiler:
        plain_loop(profiler)
    lines = list(check_profile(tmp_path))
    assert any("tokens: 6144" in line for line in lines)
    rows = table(tmp_path, "summary.csv")
    assert list(rows) == ["step", "rollout", "update", "update/forward", "update/backward"]
    assert {name: row["calls"] for name, row in rows.items()} == dict.fromkeys(rows, "3")
    assert table(tmp_path, "op_stats.csv")["aten::linear"]["calls"] == "21"
    assert {path.name for path in tmp_path.iterdir()} == {"summary.csv", "op_stats.csv", "chrome_trace.json"}
    outcome = run_command("check-profile", tmp_path)
    assert outcome.code == 0, outcome.out


def test_calls_and_times_are_torchs_own(tmp_path):
    """torch.profiler on the same loop counts the same calls."""
    with Profiler(tmp_path) as profiler:
        plain_loop(profiler, steps=1)
    off = Profiler(tmp_path / "off", records_operators=lambda number: False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as theirs, off:
        plain_loop(off, steps=1)
    counts = {event.key: event.count for event in theirs.key_averages()}
    for name in ("aten::linear", "aten::addmm", "aten::_softmax", "aten::mm", "AddmmBackward0"):
        assert int(table(tmp_path, "op_stats.csv")[name]["calls"]) == counts[name]


def test_a_loop_that_fails_keeps_the_steps_that_were_done(tmp_path):
    def fail():
        with Profiler(tmp_path, records_operators=lambda number: True) as profiler:
            plain_loop(profiler, steps=2)
            with profiler.step(tokens=1), profiler.stage("rollout"):
                raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert any("steps: 2, from 1 to 2" in line for line in check_profile(tmp_path))
    with Profiler(tmp_path / "again") as profiler:  # torch's recorder was let go of
        plain_loop(profiler, steps=1)


def test_a_stage_outside_of_a_step_says_what_to_do(tmp_path):
    message = "put it inside `with profiler.step"
    with Profiler(tmp_path) as profiler, pytest.raises(RuntimeError, match=message), profiler.stage("rollout"):
        pass


def test_a_profile_of_no_step_is_told_apart(tmp_path):
    with Profiler(tmp_path):
        pass
    outcome = run_command("check-profile", tmp_path)
    assert outcome.code == 1
    assert "has no events; no step ended while it was profiled" in outcome.out


def test_operators_are_recorded_in_the_steps_that_the_schedule_names(tmp_path):
    assert [number for number in range(1, 20_000) if powers_of_100(number)] == [1, 100, 10_000]
    with Profiler(tmp_path, records_operators=lambda number: number == 2) as profiler:
        plain_loop(profiler)
    assert json.loads((tmp_path / "chrome_trace.json").read_text())["otherData"]["operator_steps"] == [2]
    assert any("recorded in 1 of 3 steps" in line for line in check_profile(tmp_path))


def test_a_step_whose_error_the_loop_catches_is_left_out_and_the_next_is_recorded(tmp_path):
    with Profiler(tmp_path) as profiler:
        with pytest.raises(RuntimeError, match="cannot be multiplied"), profiler.step(), profiler.stage("rollout"):
            torch.ones(8).exp() @ torch.ones(7, 2)
        with pytest.raises(RuntimeError, match="lies in no step"), profiler.stage("rollout"):
            pass
        plain_loop(profiler, steps=2)
    assert any("recorded in 1 of 2 steps" in line for line in check_profile(tmp_path))
    assert table(tmp_path, "summary.csv")["rollout"]["calls"] == "2"
    assert "aten::exp" not in table(tmp_path, "op_stats.csv")


HOLDS_MEMORY = """
import mmap, sys
from pathlib import Path
from rlhf_core.profiler import Profiler
size = int(sys.argv[2])
with Profiler(Path(sys.argv[1])) as profiler:
    for _ in range(2):
        with profiler.step():
            for name, held in (("before", 0), ("large", size), ("after", 0)):
                with profiler.stage(name), mmap.mmap(-1, held or mmap.PAGESIZE) as block:
                    for page in range(0, held, mmap.PAGESIZE):
                        block[page] = 1
"""


def test_a_stages_peak_is_that_of_its_own_allocations(tmp_path):
    """A stage that holds 100 MiB for a moment peaks 100 MiB above the one after it.

    In a process of its own, because what else a process holds may come and go.
    """
    if not PeakMemory().method.startswith("VmHWM"):
        pytest.skip("this system does not let a process set its peak back")
    size = 100 * 2**20
    subprocess.run([sys.executable, "-c", HOLDS_MEMORY, str(tmp_path), str(size)], cwd=ROOT, check=True)
    peaks = {name: int(row["cpu_peak_bytes"]) for name, row in table(tmp_path, "summary.csv").items()}
    assert peaks["large"] - peaks["after"] > 0.9 * size
    assert peaks["step"] == peaks["large"]


def test_where_the_peak_cannot_be_set_back_the_resident_memory_has_to_do_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "CLEAR_REFS", tmp_path / "none")
    with Profiler(tmp_path / "a") as profiler:
        plain_loop(profiler, steps=1)
    facts = json.loads((tmp_path / "a" / "chrome_trace.json").read_text())["otherData"]
    assert facts["cpu_memory"] == "resident memory at the stage's ends, a lower bound"
    assert list(check_profile(tmp_path / "a"))
    monkeypatch.setattr(profiling, "STATUS", tmp_path / "none")
    with Profiler(tmp_path / "b") as profiler:
        plain_loop(profiler, steps=1)
    assert int(table(tmp_path / "b", "summary.csv")["step"]["cpu_peak_bytes"]) > 0


def test_two_clocks_are_set_by_what_lies_between_what():
    markers = [(10, 20), (30, 45)]
    brackets = [((1008, 1013), (1019, 1022)), ((1029, 1031), (1044, 1050))]
    assert clock_shift(markers, brackets) == 1000  # not below 999 (1019 - 20, 1029 - 30), not above 1001 (1031 - 30)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ((100, 900), (100, 900)),
        ((100, 1000), (100, 1000)),
        ((100, 1010), (100, 1000)),
        ((995, 1900), (1000, 1900)),
        ((1000, 2000), (1000, 2000)),
        ((2500, 9000), (2500, 9000)),
    ],
)
def test_a_call_that_seems_to_reach_across_a_border_by_a_little_ends_there(call, expected):
    assert snapped(*call, [1000, 2000]) == expected


def test_own_and_total_figures_of_calls_inside_calls():
    calls = [
        Operator("a", 0, 100, 1, cpu_bytes=1, cuda_ns=10),
        Operator("b", 10, 60, 1, cpu_bytes=2, cuda_ns=20),
        Operator("a", 20, 50, 1, cpu_bytes=4, cuda_bytes=7),
        Operator("b", 70, 90, 1, cpu_bytes=-3),
        Operator("a", 0, 5, 2),
    ]
    totals: dict[str, OperatorTotals] = {}
    add_operators(totals, calls)
    # On the CPU: the outer a is 100 - 50 - 20 its own, the first b 50 - 30.
    assert totals["a"] == OperatorTotals(3, [30 + 30 + 5, 10, 5, 7], [105, 30, 4, 7])
    assert totals["b"] == OperatorTotals(2, [20 + 20, 20, -1, 0], [70, 20, 3, 7])
