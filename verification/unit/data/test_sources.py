"""Files, folders and the hub give their rows; what cannot be a source is named with the remedy."""

import json
import sys
import types

import pytest

from rlhf_core.data.sources import read_records, source_files


def test_a_folder_gives_its_data_files_by_name_and_nothing_else(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": name}) + "\n")
    (tmp_path / "README.md").write_text("no data")
    assert [record.value for record in read_records(str(tmp_path))] == [{"prompt": "a.jsonl"}, {"prompt": "b.jsonl"}]


def test_what_cannot_be_a_source_is_named_with_the_remedy(tmp_path):
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ValueError, match=r"a\.docx': its name must end in one of \.jsonl"):
        source_files(str(tmp_path / "a.docx"))
    with pytest.raises(FileNotFoundError, match=r"neither \*\.pos and \*\.neg files nor a data file"):
        source_files(str(tmp_path))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.jsonl").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"nor a data file .*; its folder '.*/train' has: give that one"):
        source_files(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no data file or folder 'org/set'; for the hub write hub:org/set"):
        source_files("org/set")


class TestHub:
    def test_without_the_package_it_is_refused_with_the_remedy(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ValueError, match=r"hub:org/set needs the package datasets; install it with: pip install"):
            list(read_records("hub:org/set"))

    def test_rows_are_streamed_with_their_number(self, monkeypatch):
        asked = []
        fake = types.ModuleType("datasets")

        def load_dataset(name, split, streaming):
            asked.append((name, split, streaming))
            return iter([{"prompt": "a", "margin": None}])

        fake.load_dataset = load_dataset
        monkeypatch.setitem(sys.modules, "datasets", fake)
        [record] = read_records("hub:org/set:test")
        assert (record.where, record.value) == ("hub:org/set:test: row 1", {"prompt": "a"})
        assert asked == [("org/set", "test", True)]

    def test_what_the_hub_says_becomes_one_line(self, monkeypatch):
        fake = types.ModuleType("datasets")
        fake.load_dataset = lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no route\nto host"))
        monkeypatch.setitem(sys.modules, "datasets", fake)
        with pytest.raises(ValueError, match=r"hub:org/set:train cannot be loaded \(ConnectionError: no route\)"):
            list(read_records("hub:org/set"))
