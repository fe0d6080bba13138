"""The folders of runs: made, named, found."""

import errno
import os

import pytest

from rlhf_core import run_folder


class TestCreateRun:
    def test_makes_the_folder_with_its_configuration_and_points_latest_to_it(self, tmp_path):
        runs = tmp_path / "deep" / "runs"
        for name in ("a", "b.2_C-3"):
            folder = run_folder.create_run(runs, name, "unused", "{}\n")
            assert folder == runs / name
            assert (folder / "config.json").read_text() == "{}\n"
            assert (runs / "latest").resolve() == folder.resolve()
            assert os.readlink(runs / "latest") == name  # relative, so that runs/ can be moved

    def test_without_a_name_the_first_free_number_is_taken(self, tmp_path):
        assert [run_folder.create_run(tmp_path, None, "task-seed0", "").name for _ in range(3)] == [
            "task-seed0",
            "task-seed0-2",
            "task-seed0-3",
        ]

    def test_a_run_that_another_process_makes_at_the_same_moment_is_named_as_taken(self, tmp_path, monkeypatch):
        def late(runs, name):
            (runs / name).mkdir()

        monkeypatch.setattr(run_folder, "check_new_name", late)
        with pytest.raises(FileExistsError, match=r"run '.*a' exists; continue it with --resume, or give another"):
            run_folder.create_run(tmp_path, "a", "", "")

    def test_a_long_default_name_is_cut_and_leaves_room_for_what_is_made_from_it(self, tmp_path):
        for length in (200, 200 + len("-2")):
            assert len(run_folder.create_run(tmp_path, None, "a" * 500, "").name) == length

    @pytest.mark.parametrize(
        ("default", "name"),
        [("my data-seed0", "my-data-seed0"), ("-x", "x"), ("../..", "run"), ("", "run"), ("é!", "run")],
    )
    def test_a_default_name_becomes_a_plain_folder_name(self, tmp_path, default, name):
        assert run_folder.create_run(tmp_path, None, default, "").name.rstrip("-") == name

    def test_a_name_that_is_taken_is_refused_and_nothing_moves(self, tmp_path):
        run_folder.create_run(tmp_path, "a", "", "first")
        run_folder.create_run(tmp_path, "b", "", "second")
        with pytest.raises(
            FileExistsError, match="run '.*a' exists; continue it with --resume, or give another --name"
        ):
            run_folder.create_run(tmp_path, "a", "", "third")
        assert (tmp_path / "a" / "config.json").read_text() == "first"
        assert os.readlink(tmp_path / "latest") == "b"

    @pytest.mark.parametrize(
        "name", ["../up", "a/b", "/abs", "..", ".", "", "latest", ".hidden", "-x", "a b", "a\n", "a\0"]
    )
    def test_a_name_that_could_lead_elsewhere_is_refused(self, tmp_path, name):
        with pytest.raises(ValueError, match="run name .*: use letters, digits"):
            run_folder.create_run(tmp_path / "runs", name, "", "")
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_leaves_no_run_and_does_not_move_latest(self, tmp_path, monkeypatch):
        run_folder.create_run(tmp_path, "a", "", "")

        def full(path, data):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        monkeypatch.setattr(run_folder, "write_atomically", full)
        with pytest.raises(OSError, match="No space left"):
            run_folder.create_run(tmp_path, "b", "", "")
        assert not (tmp_path / "b").exists()
        assert os.readlink(tmp_path / "latest") == "a"

    def test_a_place_that_cannot_be_written_is_named_with_the_option(self, tmp_path):
        (tmp_path / "file").write_text("")
        for runs in (tmp_path / "file", tmp_path / "file" / "runs"):
            with pytest.raises(OSError, match=r"cannot make a run in '.*file.*' \(.*\); give --runs a folder"):
                run_folder.create_run(runs, "a", "", "")


class TestFindRun:
    @pytest.fixture
    def runs(self, tmp_path):
        for name in ("a", "b"):
            run_folder.create_run(tmp_path / "runs", name, "", "{}")
        return tmp_path / "runs"

    def test_takes_a_name_a_folder_or_latest(self, runs):
        assert run_folder.find_run("a", runs) == runs / "a"
        assert run_folder.find_run(str(runs / "a"), runs.parent / "elsewhere") == runs / "a"
        assert run_folder.find_run("latest", runs).resolve() == (runs / "b").resolve()

    def test_a_name_means_the_run_and_not_a_model_folder_of_that_name_here(self, runs, tmp_path, monkeypatch):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
        monkeypatch.chdir(tmp_path)
        assert run_folder.find_run("a", runs) == runs / "a"

    def test_an_unknown_name_lists_the_known_ones(self, runs):
        with pytest.raises(FileNotFoundError, match=r"no run 'c' .*; runs in '.*': a, b$"):
            run_folder.find_run("c", runs)

    def test_a_folder_without_a_configuration_is_no_run(self, runs, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match=r"a run is a folder with config\.json"):
            run_folder.find_run(str(tmp_path / "empty"), runs)

    def test_without_runs_it_says_so(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="there are no runs in '.*none'"):
            run_folder.find_run("latest", tmp_path / "none")
