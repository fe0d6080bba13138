"""A disk or memory that is full, a place that is read-only or taken: one line, and resume ends in the same bytes."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from refusals import assert_matches, files_of

from rlhf_core import checkpoint, runlog, training
from rlhf_core.testing.assertions import assert_runs_identical
from rlhf_core.testing.command import TINY_RUN, run_command

pytestmark = pytest.mark.usefixtures("reviews_drawn_once")


class TestDisk:
    def test_runs_cannot_be_a_file(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        outcome = run_command("train", *TINY_RUN, "--runs", tmp_path / "file")
        assert outcome.code == 2
        assert_matches(r"cannot make a run in '.*file' \('.*file' is a file\); give --runs a folder", outcome.complaint)
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_read_only_place_is_named(self, tmp_path, monkeypatch):
        def read_only(path, mode=0o777, parents=False, exist_ok=False):
            raise OSError(errno.EROFS, "Read-only file system", str(path))

        monkeypatch.setattr(Path, "mkdir", read_only)
        outcome = run_command("train", *TINY_RUN, "--runs", tmp_path / "runs")
        assert outcome.code == 2
        assert_matches(
            r"cannot make a run in '.*runs' \(Read-only file system\); give --runs a folder", outcome.complaint
        )

    def test_a_disk_that_fills_up_keeps_the_checkpoints_and_resume_ends_in_the_same_bytes(
        self, finished_run, tmp_path, monkeypatch
    ):
        save = training.save_state

        def full_at_step_4(state, tokenizer, folder):
            save(state, tokenizer, folder)
            if state.step == 4:
                raise OSError(errno.ENOSPC, "No space left on device", str(folder / "optimizer.safetensors"))

        monkeypatch.setattr(training, "save_state", full_at_step_4)
        outcome = run_command("train", *TINY_RUN, "--runs", tmp_path, "--name", "mine")
        assert outcome.code == 2
        assert_matches(
            "No space left on device; put that right, then continue with: rlhf train --resume", outcome.complaint
        )
        steps = checkpoint.steps(tmp_path / "mine" / "checkpoints")
        assert [step for step, folder in steps if checkpoint.is_sound(folder)] == [0, 2]
        monkeypatch.setattr(training, "save_state", save)
        assert run_command("train", "--resume", "--name", "mine", "--runs", tmp_path).code == 0
        assert_runs_identical(finished_run, tmp_path / "mine")

    def test_a_log_that_is_torn_by_a_full_disk_is_mended_by_resume(self, finished_run, tmp_path, monkeypatch):
        append = runlog.append

        def full_at_step_3(path, rows):
            rows = list(rows)
            if path.name == "metrics.jsonl" and rows[0]["step"] == 3:
                with path.open("ab") as file:
                    file.write(runlog.encode(rows[0]).encode()[:20])
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            append(path, rows)

        monkeypatch.setattr(runlog, "append", full_at_step_3)
        outcome = run_command("train", *TINY_RUN, "--runs", tmp_path, "--name", "mine")
        assert outcome.code == 2
        assert_matches(r"metrics\.jsonl: No space left on device; put that right", outcome.complaint)
        monkeypatch.setattr(runlog, "append", append)
        assert run_command("train", "--resume", "--name", "mine", "--runs", tmp_path).code == 0
        assert_runs_identical(finished_run, tmp_path / "mine")

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore"), "Tried to allocate 9 GiB"),
            (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 99 bytes"), "99 bytes"),
            (MemoryError("Unable to allocate 8 TiB"), "Unable to allocate 8 TiB"),
        ],
    )
    def test_memory_that_runs_out_is_one_line_and_resume_ends_in_the_same_bytes(
        self, finished_run, tmp_path, monkeypatch, error, said
    ):
        save = training.save_state

        def full_at_step_4(state, tokenizer, folder):
            if state.step == 4:
                raise error
            save(state, tokenizer, folder)

        monkeypatch.setattr(training, "save_state", full_at_step_4)
        outcome = run_command("train", *TINY_RUN, "--runs", tmp_path, "--name", "mine")
        assert outcome.code == 2
        assert_matches(
            f"out of memory: .*{said}.*; a smaller batch or micro-batch needs less; .*: rlhf train --resume",
            outcome.complaint,
        )
        monkeypatch.setattr(training, "save_state", save)
        assert run_command("train", "--resume", "--name", "mine", "--runs", tmp_path).code == 0
        assert_runs_identical(finished_run, tmp_path / "mine")

    def test_an_error_of_ours_is_not_called_a_lack_of_memory(self, tmp_path, monkeypatch):
        def broken(state, tokenizer, folder):
            raise RuntimeError("shapes do not fit")

        monkeypatch.setattr(training, "save_state", broken)
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            run_command("train", *TINY_RUN, "--runs", tmp_path)

    def test_a_run_that_another_process_writes_is_left_alone(self, runs):
        script = "import sys; from pathlib import Path; from rlhf_core.run_folder import writing\n"
        script += "with writing(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
        other = [sys.executable, "-c", script, str(runs / "earlier")]
        before = files_of(runs)
        with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "mine\n"
            outcome = run_command("train", "--resume", "--runs", runs)
            assert outcome.code == 2
            assert_matches("earlier is being written by another process; wait for it, or end it", outcome.complaint)
            assert files_of(runs) == before
            process.kill()
        assert run_command("train", "--resume", "--runs", runs).code == 0

    @pytest.mark.parametrize("kib", [64, 400, 700])
    def test_a_disk_that_is_really_full(self, finished_run, tmp_path, kib):
        """64 KiB hold no model, 400 none of the later checkpoints; 700 hold some."""
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            pytest.skip("needs the right to mount a small disk")
        try:
            outcome = run_command("train", *TINY_RUN, "--runs", disk, "--name", "mine")
            assert outcome.code == 2
            assert_matches(
                "/mine.*: No space left on device; put that right, then continue with: rlhf train", outcome.complaint
            )
            for _, folder in checkpoint.steps(disk / "mine" / "checkpoints"):
                checkpoint.check_folder(folder)
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            outcome = run_command("train", "--resume", "--name", "mine", "--runs", disk)
            assert outcome.code == 0, outcome.err
            assert_runs_identical(finished_run, disk / "mine")
        finally:
            subprocess.run(["umount", str(disk)], check=True)
