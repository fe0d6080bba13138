import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlhf_core import checkpoint
from rlhf_core.checkpoint import check_folder, is_sound, load_tensors, newest_sound, prune, write_folder

CONTENTS = {"weights.bin": b"w" * 1000, "state.json": b"{}", "policy/config.json": b'{"a": 1}'}


def fill(folder):
    for name, content in CONTENTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def sound(tmp_path):
    write_folder(tmp_path / "step_000001", fill)
    return tmp_path / "step_000001"


class TestWriteFolder:
    def test_holds_what_was_written_and_a_manifest_of_its_hashes(self, sound):
        found = files_of(sound)
        manifest = json.loads(found.pop("manifest.json"))
        assert found == CONTENTS
        assert manifest == {name: hashlib.sha256(content).hexdigest() for name, content in CONTENTS.items()}
        check_folder(sound)
        assert [path.name for path in sound.parent.iterdir()] == [sound.name]

    @pytest.mark.parametrize("moment", ["while writing", "while syncing", "at the rename"])
    @pytest.mark.parametrize("there_before", [False, True])
    def test_a_failure_leaves_what_was_there_before_and_nothing_else(self, tmp_path, monkeypatch, moment, there_before):
        folder = tmp_path / "step_000001"
        if there_before:
            write_folder(folder, fill)
        before = files_of(tmp_path)
        full = OSError(errno.ENOSPC, "No space left on device")
        rename = Path.rename

        def failing_write(partial):
            fill(partial)
            (partial / "weights.bin").write_bytes(b"half")
            if moment == "while writing":
                raise full

        def failing_rename(path, target):
            if path.name.endswith(".partial"):
                raise full
            return rename(path, target)

        def failing_sync(descriptor):
            raise full

        if moment == "while syncing":
            monkeypatch.setattr(os, "fsync", failing_sync)
        if moment == "at the rename":
            monkeypatch.setattr(Path, "rename", failing_rename)
        with pytest.raises(OSError, match="No space left"):
            write_folder(folder, failing_write)
        assert files_of(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == ([folder.name] if there_before else [])

    def test_an_interruption_cleans_up_as_well(self, tmp_path):
        def interrupted(partial):
            fill(partial)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_folder(tmp_path / "step_000001", interrupted)
        assert list(tmp_path.iterdir()) == []

    def test_what_a_kill_left_half_written_does_not_get_into_the_next_one(self, tmp_path):
        leftover = tmp_path / ".step_000001.partial"
        leftover.mkdir()
        (leftover / "old").write_text("torn")
        write_folder(tmp_path / "step_000001", fill)
        assert set(files_of(tmp_path / "step_000001")) == {*CONTENTS, "manifest.json"}

    def test_a_new_folder_takes_the_place_of_a_damaged_one(self, sound):
        (sound / "weights.bin").unlink()
        write_folder(sound, fill)
        check_folder(sound)
        assert [path.name for path in sound.parent.iterdir()] == [sound.name]

    def test_every_file_and_folder_is_synced_before_it_gets_its_name(self, tmp_path, monkeypatch):
        events = []
        rename = Path.rename
        monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.readlink(f"/proc/self/fd/{descriptor}")))
        monkeypatch.setattr(Path, "rename", lambda path, target: (events.append("rename"), rename(path, target))[1])
        write_folder(tmp_path / "s", fill)
        before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
        partial = tmp_path / ".s.partial"
        names = ["", "/manifest.json", "/policy", *(f"/{name}" for name in CONTENTS)]
        assert sorted(before) == sorted(f"{partial}{name}" for name in names)
        assert after == [str(tmp_path)]

    def test_a_full_disk_that_safetensors_or_tokenizers_report_in_their_own_way_is_an_os_error(self, tmp_path):
        for text in ("Error while serializing: I/O error: No space left on device (os error 28)", "Bad (os error 28)"):

            def write(partial, text=text):
                raise Exception(text)

            with pytest.raises(OSError, match="No space left on device") as caught:
                write_folder(tmp_path / "step_000001", write)
            assert caught.value.errno == errno.ENOSPC
            assert caught.value.filename == str(tmp_path / "step_000001")

    def test_another_exception_stays_what_it_is(self, tmp_path):
        def write(partial):
            raise KeyError("a bug")

        with pytest.raises(KeyError, match="a bug"):
            write_folder(tmp_path / "step_000001", write)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 256 KiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = sys.platform == "linux" and os.geteuid() == 0
    mounted = (
        mounted
        and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=False).returncode == 0
    )
    if not mounted:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full_keeps_the_earlier_checkpoint(small_disk):
    tensors = {"weight": torch.zeros(40_000)}
    write_folder(small_disk / "step_000001", lambda partial: save_file(tensors, partial / "weights.safetensors"))
    with pytest.raises(OSError, match="No space left on device"):
        write_folder(small_disk / "step_000002", lambda partial: save_file(tensors, partial / "weights.safetensors"))
    assert [path.name for path in small_disk.iterdir()] == ["step_000001"]
    check_folder(small_disk / "step_000001")


def cut(folder):
    content = (folder / "weights.bin").read_bytes()
    (folder / "weights.bin").write_bytes(content[:-1])


def flip(folder):
    content = bytearray((folder / "policy/config.json").read_bytes())
    content[3] ^= 1
    (folder / "policy/config.json").write_bytes(content)


DAMAGES = [
    (cut, "weights.bin does not have the SHA-256 of the manifest; it was damaged or changed"),
    (flip, "policy/config.json does not have the SHA-256"),
    (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    (lambda folder: shutil.rmtree(folder / "policy"), "policy/config.json is missing"),
    (lambda folder: (folder / "extra.bin").write_bytes(b""), "extra.bin is not in the manifest"),
    (lambda folder: (folder / "manifest.json").unlink(), "no readable manifest.json .*No such file"),
    (lambda folder: (folder / "manifest.json").write_text("{torn"), r"no readable manifest.json \(Expecting"),
    (lambda folder: (folder / "manifest.json").write_bytes(b"\xff"), r"no readable manifest.json \(.*utf-8"),
    (lambda folder: (folder / "manifest.json").write_text("[" * 10**5), r"no readable manifest.json \(nested too deep"),
    (lambda folder: (folder / "manifest.json").write_text("[1]"), "manifest.json is not a table"),
    (lambda folder: (folder / "manifest.json").write_text("{}"), "is not in the manifest"),
    (lambda folder: (folder / "manifest.json").write_text('{"state.json": 3}'), "state.json does not have the SHA-256"),
    (lambda folder: ((folder / "state.json").unlink(), (folder / "state.json").mkdir()), "state.json cannot be read"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_each_kind_of_damage_is_named(sound, damage, message):
    assert is_sound(sound)
    damage(sound)
    with pytest.raises(ValueError, match=f"step_000001: .*{message}"):
        check_folder(sound)
    assert not is_sound(sound)


def test_a_folder_that_is_not_there_is_not_sound(tmp_path):
    assert not is_sound(tmp_path / "none")


@pytest.fixture
def checkpoints(tmp_path):
    for step in (0, 2, 9, 10, 1_000_000):
        write_folder(checkpoint.step_folder(tmp_path, step), fill)
    (tmp_path / "step_12").mkdir()  # not of our form
    (tmp_path / ".step_000011.partial").mkdir()  # what a kill leaves
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class TestNewestSound:
    def test_is_the_one_of_the_highest_step(self, checkpoints):
        heard = []
        assert newest_sound(checkpoints, heard.append) == checkpoints / "step_1000000"
        assert heard == []

    def test_passes_over_each_damaged_one_and_says_what_is_wrong_with_it(self, checkpoints):
        cut(checkpoints / "step_1000000")
        (checkpoints / "step_000010" / "state.json").unlink()
        heard = []
        assert newest_sound(checkpoints, heard.append) == checkpoints / "step_000009"
        assert len(heard) == 2
        assert heard[0].startswith("checkpoint passed over: ")
        assert "step_1000000: weights.bin does not have the SHA-256" in heard[0]
        assert "step_000010: state.json is missing" in heard[1]

    def test_there_may_be_none(self, tmp_path):
        assert newest_sound(tmp_path / "none", print) is None
        (tmp_path / "step_000001").mkdir()
        assert newest_sound(tmp_path, lambda line: None) is None


class TestPrune:
    def test_keeps_the_newest_and_step_0_and_sweeps_what_a_kill_left(self, checkpoints):
        prune(checkpoints, 2)
        assert names(checkpoints) == ["step_000000", "step_000010", "step_1000000", "step_12"]

    def test_keeps_all_where_there_are_fewer(self, checkpoints):
        prune(checkpoints, 9)
        assert len(checkpoint.steps(checkpoints)) == 5


class TestOptimizer:
    def parameters(self):
        torch.manual_seed(0)
        return {name: torch.nn.Parameter(torch.randn(3)) for name in ("a.weight", "b/odd", "never_used")}

    def optimizer(self, parameters):
        return torch.optim.AdamW(parameters.values(), lr=0.1)

    def step(self, parameters, optimizer, number):
        for name in ("a.weight", "b/odd"):
            parameters[name].grad = torch.full((3,), float(number))
        optimizer.step()

    def test_goes_on_bit_for_bit_after_a_round_trip(self, tmp_path):
        one, other = self.parameters(), self.parameters()
        first, second = self.optimizer(one), self.optimizer(other)
        for number in (1, 2):
            self.step(one, first, number)
            self.step(other, second, number)
        loaded = self.optimizer(other)
        checkpoint.save_optimizer(second, {value: name for name, value in other.items()}, tmp_path / "o")
        checkpoint.load_optimizer(loaded, {value: name for name, value in other.items()}, tmp_path / "o")
        self.step(one, first, 3)
        self.step(other, loaded, 3)
        for name in one:
            assert torch.equal(one[name], other[name]), name

    def test_state_of_a_parameter_that_the_model_does_not_have_is_named(self, tmp_path):
        parameters = self.parameters()
        optimizer = self.optimizer(parameters)
        self.step(parameters, optimizer, 1)
        checkpoint.save_optimizer(optimizer, {value: name for name, value in parameters.items()}, tmp_path / "o")
        renamed = {value: name.replace("a.", "z.") for name, value in parameters.items()}
        with pytest.raises(ValueError, match=r"state '(step|exp_avg|exp_avg_sq)/a\.weight' belongs to no parameter"):
            checkpoint.load_optimizer(optimizer, renamed, tmp_path / "o")

    def test_state_of_another_shape_is_named_with_both(self, tmp_path):
        parameters = self.parameters()
        optimizer = self.optimizer(parameters)
        self.step(parameters, optimizer, 1)
        names = {value: name for name, value in parameters.items()}
        checkpoint.save_optimizer(optimizer, names, tmp_path / "o")
        larger = {name: torch.nn.Parameter(torch.zeros(4)) for name in parameters}
        with pytest.raises(ValueError, match=r"state 'exp_avg\S*/\S*' is \(3,\), and \(4,\) here"):
            checkpoint.load_optimizer(
                self.optimizer(larger), {value: name for name, value in larger.items()}, tmp_path / "o"
            )


def test_tensors_are_those_that_are_wanted_by_name_and_shape(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "t")
    assert load_tensors(tmp_path / "t", {"a": torch.empty(2), "b": torch.empty(3)})["a"].tolist() == [1.0, 1.0]
    for wanted, message in (
        ({"a": 2}, "b is none of this configuration's"),
        ({"a": 2, "b": 3, "c": 1}, "c is not there"),
        ({"a": 2, "b": 4}, r"b is \(3,\), and \(4,\) by the configuration"),
    ):
        with pytest.raises(ValueError, match=f"t: {message}; was the run's config"):
            load_tensors(tmp_path / "t", {name: torch.empty(size) for name, size in wanted.items()})
