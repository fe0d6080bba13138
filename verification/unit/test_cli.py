import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import pytest

from rlhf_core import checkpoint, cli, experiment, run_folder, runlog, training
from rlhf_core.commands.options import UsageError
from rlhf_core.config_files import to_json
from rlhf_core.stage_config import DPOConfig, EvalConfig, PipelineConfig, RewardConfig, SFTConfig
from rlhf_core.testing.assertions import assert_runs_differ, assert_runs_identical
from rlhf_core.testing.command import TINY_RUN, run_command

pytestmark = pytest.mark.usefixtures("reviews_drawn_once")


@pytest.fixture
def copied_run(finished_run, tmp_path):
    """A copy of the finished run that a test may spoil, named ``copy`` under its own ``runs``."""
    runs = tmp_path / "runs"
    shutil.copytree(finished_run, runs / "copy", symlinks=True)
    run_folder.point_latest(runs / "copy")
    return runs / "copy"


def tiny_run(runs, name, *options):
    return run_command("train", *TINY_RUN, "--runs", runs, "--name", name, *options)


def resume(run, *options):
    return run_command("train", "--resume", "--name", run.name, "--runs", run.parent, *options)


class TestHelp:
    def test_without_a_command_the_commands_are_listed_and_the_code_is_2(self):
        for arguments, code in (((), 2), (("--help",), 0), (("-h",), 0)):
            outcome = run_command(*arguments)
            assert outcome.code == code
            assert all(f"  {name} " in outcome.out for name in cli.COMMANDS)

    @pytest.mark.parametrize("command", cli.COMMANDS)
    def test_each_command_explains_itself(self, command):
        outcome = run_command(command, "--help")
        assert outcome.code == 0
        assert outcome.err == ""
        assert f"usage: rlhf {command}" in outcome.out
        assert cli.command(command).Options.__doc__.split("\n")[0] in outcome.out

    @pytest.mark.parametrize("command", cli.COMMANDS)
    def test_no_help_has_a_gap_of_two_lines(self, command):
        lines = [line.strip("│ ") for line in run_command(command, "--help").out.splitlines()]
        assert all(one or other for one, other in itertools.pairwise(lines))

    @pytest.mark.parametrize("command", ["train", "sft", "pipeline"])
    @pytest.mark.parametrize("seed", ["abc", "-1"])
    def test_a_seed_in_the_environment_that_cannot_be_used_hides_no_help(self, command, seed, monkeypatch):
        monkeypatch.setenv("SEED", seed)
        outcome = run_command(command, "--help")
        assert outcome.code == 0, outcome.err
        assert f"usage: rlhf {command}" in outcome.out

    def test_help_loads_no_torch(self):
        program = (
            "import sys\nfrom rlhf_core.cli import main\ntry: main(['train', '--help'])\n"
            "except SystemExit: sys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


class TestTrain:
    def test_leaves_the_files_of_a_run_and_nothing_else(self, finished_run):
        assert {path.name for path in finished_run.iterdir()} == {
            "alerts.jsonl", "checkpoints", "config.json", "environment.json", "metrics.jsonl", "models", "rollouts",
            "samples.jsonl", "timings.jsonl",
        }  # fmt: skip
        assert [step for step, _ in checkpoint.steps(finished_run / "checkpoints")] == [
            0,
            4,
            5,
        ]  # every 2nd, last, keep 2
        assert [row["step"] for row in runlog.read(finished_run / "metrics.jsonl")] == [1, 2, 3, 4, 5]
        assert len(list(runlog.read(finished_run / "timings.jsonl"))) == 5

    def test_latest_points_to_the_newest(self, finished_run):
        assert (finished_run.parent / "latest").resolve() == finished_run.resolve()

    def test_the_seed_is_taken_from_the_environment_and_decides_the_run(self, finished_run, tmp_path, monkeypatch):
        monkeypatch.setenv("SEED", "8")
        options = [
            option for pair in zip(TINY_RUN[::2], TINY_RUN[1::2], strict=True) if pair[0] != "--seed" for option in pair
        ]
        outcome = run_command("train", *options, "--runs", tmp_path)
        assert outcome.code == 0, outcome.err
        assert_runs_differ(finished_run, tmp_path / "embedded-seed8")

    @pytest.mark.parametrize("seed", ["abc", "-1", str(2**70)])
    @pytest.mark.parametrize("way", ["--seed 8", "--seed=8", "--config of.toml", "--config=of.json"])
    @pytest.mark.parametrize("command", ["train", "sft"])
    def test_a_seed_that_is_given_counts_whatever_the_environment_has(self, tmp_path, monkeypatch, seed, way, command):
        monkeypatch.setenv("SEED", seed)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "of.toml").write_text("seed = 8\n")
        (tmp_path / "of.json").write_text('{"seed": 8}')
        outcome = run_command(command, *way.split(), "--data", "none.jsonl")
        assert (outcome.code, "no data folder 'none.jsonl'" in outcome.complaint) == (2, True), outcome

    @pytest.mark.parametrize("way", ["", "--config of.toml", "--config none.toml"])
    def test_a_seed_of_the_environment_that_counts_must_be_one(self, tmp_path, monkeypatch, way):
        monkeypatch.setenv("SEED", "abc")
        monkeypatch.chdir(tmp_path)
        (tmp_path / "of.toml").write_text("[ppo]\nsteps = 8\n")
        outcome = run_command("train", *way.split())
        assert outcome.code == 2
        assert "SEED in the environment is 'abc'" in outcome.complaint

    def test_a_run_is_resumed_with_its_own_seed_whatever_the_environment_has(
        self, finished_run, copied_run, monkeypatch
    ):
        monkeypatch.setenv("SEED", "abc")
        outcome = resume(copied_run)
        assert outcome.code == 0, outcome.err
        assert_runs_identical(finished_run, copied_run)

    def test_a_finished_run_resumed_stays_as_it_is(self, finished_run, copied_run):
        outcome = resume(copied_run)
        assert outcome.code == 0, outcome.err
        assert_runs_identical(finished_run, copied_run)

    def test_resume_may_repeat_the_options_it_began_with(self, finished_run, copied_run):
        outcome = resume(copied_run, *TINY_RUN)
        assert outcome.code == 0, outcome.err
        assert_runs_identical(finished_run, copied_run)

    def test_resume_takes_the_latest_when_none_is_named(self, copied_run):
        outcome = run_command("train", "--resume", "--runs", copied_run.parent)
        assert outcome.code == 0, outcome.err
        assert "continuing after step 5" in outcome.out

    def test_a_damaged_checkpoint_is_named_and_the_one_before_leads_to_the_same_bytes(self, finished_run, copied_run):
        damaged = copied_run / "checkpoints" / "step_000005" / "optimizer.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1])
        outcome = resume(copied_run)
        assert outcome.code == 0, outcome.err
        assert "checkpoint passed over: " in outcome.out
        assert "step_000005: optimizer.safetensors does not have the SHA-256" in outcome.out
        assert "continuing after step 4" in outcome.out
        assert_runs_identical(finished_run, copied_run)
        checkpoint.check_folder(copied_run / "checkpoints" / "step_000005")

    def test_a_damaged_base_model_is_trained_anew_to_the_same_bytes(self, finished_run, copied_run):
        (copied_run / "models" / "base" / "model.safetensors").unlink()
        shutil.rmtree(copied_run / "checkpoints")
        outcome = resume(copied_run)
        assert outcome.code == 0, outcome.err
        assert_runs_identical(finished_run, copied_run)


@pytest.fixture
def stop_after_step_3(monkeypatch):
    """Send the process a signal when the third step is being logged."""

    def plant(number):
        append = runlog.append

        def append_and_signal(path, rows):
            rows = list(rows)
            append(path, rows)
            if path.name == "metrics.jsonl" and rows[0]["step"] == 3:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(runlog, "append", append_and_signal)
        return lambda: monkeypatch.setattr(runlog, "append", append)

    return plant


class TestStop:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_finishes_the_step_saves_and_the_printed_command_ends_in_the_same_bytes(
        self, finished_run, tmp_path, monkeypatch, stop_after_step_3, number
    ):
        monkeypatch.chdir(tmp_path)
        handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        heal = stop_after_step_3(number)
        outcome = tiny_run("some runs", "mine")
        assert outcome.code == 128 + number
        assert "stopped after step 3 of 5, saved; continue with: rlhf train --resume" in outcome.complaint
        run = tmp_path / "some runs" / "mine"
        assert checkpoint.newest_sound(run / "checkpoints", print).name == "step_000003"
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
        heal()
        program, *arguments = shlex.split(outcome.complaint.partition("continue with: ")[2])
        assert program == "rlhf"
        outcome = run_command(*arguments)
        assert outcome.code == 0, outcome.err
        assert_runs_identical(finished_run, run)

    def test_a_signal_during_pre_training_says_so_and_resumes(self, finished_run, tmp_path, monkeypatch):
        trained = experiment.train_language_model

        def signalled(*arguments, report, **options):
            def hear(loss):
                os.kill(os.getpid(), signal.SIGTERM)
                report(loss)

            trained(*arguments, report=hear, **options)

        monkeypatch.setattr(experiment, "train_language_model", signalled)
        outcome = tiny_run(tmp_path, "mine")
        assert outcome.code == 143
        assert (
            "stopped during pre-training, which starts anew on resume; continue with: rlhf train" in outcome.complaint
        )
        monkeypatch.setattr(experiment, "train_language_model", trained)
        outcome = resume(tmp_path / "mine")
        assert outcome.code == 0, outcome.err
        assert_runs_identical(finished_run, tmp_path / "mine")

    def test_a_second_ctrl_c_stops_at_once(self, tmp_path, monkeypatch):
        def impatient(*arguments):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(training, "sample_rows", impatient)
        outcome = tiny_run(tmp_path, "mine")
        assert (outcome.code, outcome.complaint) == (130, "rlhf: interrupted")
        assert checkpoint.newest_sound(tmp_path / "mine" / "checkpoints", print).name == "step_000000"


def test_a_real_process_stopped_by_sigterm_prints_a_command_that_works_in_its_shell(tmp_path):
    program = tmp_path / "bin" / "rlhf"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from rlhf_core.cli import main; main()' \"$@\"\n")
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    steps = ("--ppo.steps", "20", "--log.save-every", "100")

    def start(name):
        command = ["rlhf", "train", *TINY_RUN, *steps, "--name", name]
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
        )

    stopped, whole = start("stopped"), start("whole")
    metrics = tmp_path / "runs" / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        assert stopped.poll() is None, stopped.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    stopped.terminate()
    _, complaint = stopped.communicate(timeout=120)
    assert stopped.returncode == 143, complaint
    assert len(complaint.splitlines()) == 1
    assert metrics.read_bytes().count(b"\n") < 20
    command = complaint.strip().partition("continue with: ")[2]
    resumed = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    _, complaint = whole.communicate(timeout=120)
    assert whole.returncode == 0, complaint
    assert_runs_identical(tmp_path / "runs" / "stopped", tmp_path / "runs" / "whole")


class TestCompare:
    def test_identical_runs_give_0(self, finished_run, copied_run):
        outcome = run_command("compare", finished_run, copied_run)
        assert (outcome.code, outcome.out, outcome.err) == (0, "identical\n", "")

    def test_a_difference_gives_1_with_its_step_metric_and_values(self, finished_run, copied_run):
        rows = list(runlog.read(copied_run / "metrics.jsonl"))
        kl = rows[2]["kl"]
        rows[2]["kl"] = 123.5
        (copied_run / "metrics.jsonl").unlink()
        runlog.append(copied_run / "metrics.jsonl", rows)
        outcome = run_command("compare", "copy", finished_run, "--runs", copied_run.parent)
        assert (outcome.code, outcome.err) == (1, "")
        assert outcome.out == f"metrics.jsonl: first difference at step 3: kl is 123.5 and {kl}\n"

    def test_a_run_that_is_not_there_gives_2(self, finished_run):
        outcome = run_command("compare", finished_run, "none", "--runs", finished_run.parent)
        assert outcome.code == 2
        assert "no run 'none'" in outcome.complaint
        assert "tiny" in outcome.complaint

    def test_a_name_in_a_log_cannot_harm_the_terminal(self, tmp_path):
        for name, value in (("a", 1), ("b", 2)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text("{}")
            runlog.append(tmp_path / name / "metrics.jsonl", [{"step": 1, "\x1b[31mkl": value}])
        outcome = run_command("compare", tmp_path / "a", tmp_path / "b")
        assert outcome.code == 1
        assert "\x1b" not in outcome.out
        assert "\\x1b[31mkl is 1 and 2" in outcome.out

    def test_a_malformed_log_gives_2_with_file_and_line(self, finished_run, copied_run):
        (copied_run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2\n')
        outcome = run_command("compare", finished_run, copied_run)
        assert outcome.code == 2
        assert "metrics.jsonl:2: not JSON" in outcome.complaint


HOSTILE = {
    "escape": "\x1b[2J\x1b]0;owned\x07\x1b[31mred",
    "markup": "[red]danger[/red] [link=file:///etc/passwd]x[/link] [/]",
    "direction": "\u202eright to left\u2066",
    "lines": "one\r\ntwo\x0b\x85three",
    "huge": "word " * 20_000,
    "surrogate": "\ud800",
    "empty": "",
}


class TestSamples:
    def show(self, tmp_path, text, *options):
        run = tmp_path / "r"
        run.mkdir()
        (run / "config.json").write_text("{}")
        row = {"step": 1, "sample": 0, "prompt": text, "completion": text, "reward": 0.5, "kl": 0.25, "token_ids": []}
        runlog.append(run / "samples.jsonl", [row, {**row, "step": 2}])
        return run_command("samples", run, *options)

    @pytest.mark.parametrize("kind", HOSTILE)
    def test_what_a_model_writes_cannot_harm_the_terminal(self, tmp_path, kind):
        outcome = self.show(tmp_path, HOSTILE[kind])
        assert (outcome.code, outcome.err) == (0, "")
        assert "\x1b" not in outcome.out
        assert all(char.isprintable() for char in outcome.out.replace("\n", ""))
        outcome.out.encode()

    def test_markup_is_shown_as_it_was_written(self, tmp_path):
        shown = "".join(
            char for char in self.show(tmp_path, HOSTILE["markup"]).out if char.isascii() and char not in "\n "
        )
        assert "[red]danger" in shown

    def test_a_huge_completion_is_shown_whole(self, tmp_path):
        assert self.show(tmp_path, HOSTILE["huge"], "--step", "2").out.count("word") == 2 * 20_000

    def test_the_samples_of_other_steps_are_not_held(self, tmp_path):
        self.show(tmp_path, "short")
        long = {"sample": 0, "prompt": "x" * 10_000, "completion": "", "reward": 0.5, "kl": 0.25}
        last = [{**long, "step": 401, "prompt": "p"}]
        runlog.append(tmp_path / "r" / "samples.jsonl", [{**long, "step": step} for step in range(3, 401)] + last)
        tracemalloc.start()
        outcome = run_command("samples", tmp_path / "r", "--last", "1")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert outcome.code == 0, outcome.err
        assert peak < 2_000_000

    def test_shows_the_last_steps_or_the_one_asked_for(self, finished_run):
        def steps_shown(*options):
            outcome = run_command("samples", finished_run, *options)
            assert outcome.code == 0, outcome.err
            return sorted(
                {
                    int(cell)
                    for line in outcome.out.splitlines()
                    for cell in line.split("│")[1:2]
                    if cell.strip().isdigit()
                }
            )

        assert steps_shown() == [3, 4, 5]
        assert steps_shown("--last", "1") == [5]
        assert steps_shown("--last", "100") == [1, 2, 3, 4, 5]
        assert steps_shown("--step", "2") == [2]

    def test_a_step_that_is_not_there_is_named_with_those_that_are(self, finished_run):
        outcome = run_command("samples", finished_run, "--step", "9")
        assert outcome.code == 2
        assert "has samples of steps 1 to 5; step 9 is not among them" in outcome.complaint

    def test_a_run_without_samples_says_why(self, finished_run, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "samples.jsonl").write_text("")
        outcome = run_command("samples", tmp_path)
        assert outcome.code == 2
        assert "has no samples; it has done no step, or was run with --log.samples-per-step 0" in outcome.complaint


@pytest.mark.parametrize("command", ["alerts", "report", "check-metrics"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [("sft", SFTConfig()), ("reward", RewardConfig()), ("dpo", DPOConfig()), ("eval", EvalConfig()),
     ("pipeline", PipelineConfig())],
)  # fmt: skip
def test_what_is_for_runs_of_train_names_the_command_that_made_another(tmp_path, command, kind, config):
    (tmp_path / "config.json").write_text(to_json(config))
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1.0, "nonfinite": [], "step": 1}\n')
    outcome = run_command(command, tmp_path)
    assert outcome.code == 2
    assert outcome.complaint == f"rlhf: {tmp_path} is a run of rlhf {kind}; this command is for runs of rlhf train"


def test_rlhf_traceback_in_the_environment_shows_where_an_error_comes_from(monkeypatch):
    monkeypatch.setenv("RLHF_TRACEBACK", "1")
    with pytest.raises(UsageError):
        run_command("nonsense")


def test_the_package_is_the_command_and_ends_quietly_when_its_reader_is_gone():
    command = [sys.executable, "-m", "rlhf_core", "--help"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("usage: rlhf COMMAND")
    read_end, write_end = os.pipe()
    os.close(read_end)
    outcome = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert (outcome.returncode, outcome.stderr) == (128 + signal.SIGPIPE, "")
