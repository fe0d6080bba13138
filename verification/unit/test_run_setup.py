"""Where a run's data is prepared."""

import os

from rlhf_core.run_setup import data_place


def prepare(place):
    place.prepare(lambda folder: (folder / "tokens").write_text("1 2 3"))


def test_data_that_another_command_prepares_stay_and_what_a_killed_one_left_goes(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    left = runs / ".preparing-1" / "data"
    left.mkdir(parents=True)
    with data_place(runs, None) as one:
        prepare(one)
        assert not left.exists()
        monkeypatch.setattr(os, "getpid", lambda: 2)
        with data_place(runs, None) as another:
            prepare(another)
            assert one.scratch != another.scratch
            assert (one.scratch / "data" / "tokens").read_text() == "1 2 3"
        assert not another.scratch.exists()
        assert one.scratch.exists()
    assert list(runs.iterdir()) == []


def test_a_folder_of_runs_that_was_made_for_data_goes_with_them(tmp_path):
    with data_place(tmp_path / "runs", None) as place:
        prepare(place)
    assert not (tmp_path / "runs").exists()
