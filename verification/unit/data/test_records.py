"""Every form of file gives the same rows; damage is named by its place, and a file is never read whole."""

import csv
import gzip
import io
import itertools
import json

import pyarrow
import pyarrow.parquet
import pytest

from rlhf_core.data.records import RowError, read_file

ROWS = [{"prompt": "a, b", "completion": 'say "c"\nand d'}, {"prompt": "ü", "completion": "e"}]


def write_csv(path, rows, delimiter=","):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(text.getvalue().encode())


def write(folder, form):
    path = folder / f"rows.{form}"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif form == "csv":
        write_csv(path, ROWS)
    elif form == "tsv":
        write_csv(path, ROWS, "\t")
    elif form == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif form == "csv.gz":
        write_csv(path, ROWS)
        path.write_bytes(gzip.compress(path.read_bytes()))
    else:
        path.write_bytes(b"\xef\xbb\xbf" + lines + b"\n  \n")
    return path


def values(path):
    return [record.value for record in read_file(path)]


def reasons(path):
    return [(record.where, record.value.reason) for record in read_file(path) if isinstance(record.value, RowError)]


@pytest.mark.parametrize("form", ["jsonl", "ndjson", "jsonl.gz", "json", "csv", "csv.gz", "tsv", "parquet"])
def test_every_form_gives_the_same_rows(tmp_path, form):
    assert values(write(tmp_path, form)) == ROWS


def test_text_gives_its_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"drei\n"))
    assert values(tmp_path / "a.txt") == [{"text": "one"}, {"text": "two"}]
    assert values(tmp_path / "b.txt.gz") == [{"text": "drei"}]


def test_a_file_named_json_may_hold_json_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert values(path) == [{"prompt": "a"}, {"prompt": "b"}]


class TestDamage:
    def test_bad_lines_are_named_by_file_and_line_and_the_others_are_read(self, tmp_path):
        path = tmp_path / "a.jsonl"
        deep = b'{"a":' + b"[" * 100_000
        lines = [b'{"prompt": "a"}', b"{bad", b"[1]", b'{"p": NaN}', b"", b'{"p": "\xff"}', b'{"prompt": "b"', deep]
        path.write_bytes(b"\n".join([*lines, b'{"prompt": "z"}']))
        assert reasons(path) == [
            (f"{path}:2", "malformed JSON"),
            (f"{path}:3", "not an object"),
            (f"{path}:4", "NaN or infinity"),
            (f"{path}:6", "not UTF-8"),
            (f"{path}:7", "malformed JSON"),
            (f"{path}:8", "malformed JSON"),
        ]
        assert [value for value in values(path) if not isinstance(value, RowError)] == [
            {"prompt": "a"},
            {"prompt": "z"},
        ]

    def test_a_csv_row_of_another_width_is_named_by_the_line_it_begins_in(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_text('prompt,completion\n"a\nb",c\nonly\nd,e\nf,g,h\n')
        assert reasons(path) == [(f"{path}:4", "wrong number of columns"), (f"{path}:6", "wrong number of columns")]

    def test_a_key_that_stands_twice_is_named_and_whatever_stands_in_the_row_the_next_is_read(self, tmp_path):
        rows = ['{"prompt": "a", "prompt": "b"}', '{"m": [{"x": 1, "x": 1}]}', '{"p": NaN}', "7", '{"prompt": "z"}']
        (tmp_path / "a.jsonl").write_text("\n".join(rows))
        (tmp_path / "a.json").write_text(f"[{', '.join(rows)}]")
        expected = ["repeated key", "repeated key", "NaN or infinity", "not an object"]
        assert [reason for _, reason in reasons(tmp_path / "a.jsonl")] == expected
        assert [reason for _, reason in reasons(tmp_path / "a.json")] == expected
        assert values(tmp_path / "a.jsonl")[-1] == values(tmp_path / "a.json")[-1] == {"prompt": "z"}
        assert "prompt stands twice" in str(values(tmp_path / "a.jsonl")[0])

    def test_an_integer_that_python_does_not_read_is_named_and_the_next_row_is_read(self, tmp_path):
        rows = ['{"prompt": "a", "margin": ' + "1" * 5000 + "}", '{"prompt": "z", "margin": 12}']
        (tmp_path / "a.jsonl").write_text("\n".join(rows))
        (tmp_path / "a.json").write_text(f"[{', '.join(rows)}]")
        for name, where in (("a.jsonl", "a.jsonl:1"), ("a.json", "a.json: row 1")):
            assert reasons(tmp_path / name) == [(f"{tmp_path / where}", "number too long")]
            assert values(tmp_path / name)[-1] == {"prompt": "z", "margin": 12}

    @pytest.mark.parametrize("behind", ["", '"x, y",d\n', '"two\nlines",d\n'])
    def test_a_quote_that_is_not_closed_costs_its_own_row_and_none_behind_it(self, tmp_path, behind):
        path = tmp_path / "a.csv"
        path.write_text('prompt,completion\na,b\n"open,c\n' + behind + "e,f\n")
        assert reasons(path) == [(f"{path}:3", "malformed CSV")]
        found = [value for value in values(path) if not isinstance(value, RowError)]
        middle = [{"prompt": behind.split('"')[1], "completion": "d"}] if behind else []
        assert found == [{"prompt": "a", "completion": "b"}, *middle, {"prompt": "e", "completion": "f"}]
        path.write_text(path.read_text() + "one cell\n")
        last = 5 + behind.count("\n")
        assert reasons(path)[1:] == [(f"{path}:{last}", "wrong number of columns")]

    @pytest.mark.parametrize("header", ["", "a,a\n1,2\n", " , \n1,2\n"])
    def test_a_csv_without_a_header_is_refused(self, tmp_path, header):
        (tmp_path / "a.csv").write_text(header)
        with pytest.raises(ValueError, match=r"a\.csv:1: the header is .*; it must name each column once"):
            values(tmp_path / "a.csv")

    @pytest.mark.parametrize(
        ("text", "rows", "message"),
        [
            ('[{"p": 1}, {"p": ]', 1, "Expecting value"),
            ('[{"p": 1}, {"p": "x', 1, "Unterminated string"),
            ('[{"p": 1}, {"p": 2}', 2, "the array does not end"),
            ('[{"p": 1} 7x]', 1, None),
        ],
    )
    def test_an_array_is_read_up_to_its_damage(self, tmp_path, text, rows, message):
        path = tmp_path / "a.json"
        path.write_text(text)
        found = list(read_file(path))
        assert [record.value for record in found[:rows]] == [{"p": number + 1} for number in range(rows)]
        assert isinstance(found[rows].value, RowError)
        assert found[rows].where == f"{path}: row {rows + 1}"
        assert message is None or message in str(found[rows].value)

    def test_an_array_larger_than_the_window_is_read_whole(self, tmp_path):
        rows = [{"p": "x" * 3000, "n": number} for number in range(1000)]
        (tmp_path / "a.json").write_text(json.dumps(rows))
        assert values(tmp_path / "a.json") == rows

    @pytest.mark.parametrize(("cut", "row"), [(1, "200"), (200, r"1\d\d")])
    def test_a_truncated_gzip_file_is_named(self, tmp_path, cut, row):
        path = tmp_path / "a.jsonl.gz"
        content = gzip.compress(b"".join(json.dumps({"prompt": str(n**5)}).encode() + b"\n" for n in range(200)))
        path.write_bytes(content[:-cut])
        with pytest.raises(ValueError, match=rf"a\.jsonl\.gz: damaged gzip file after row {row} \(.*\); copy it again"):
            values(path)

    def test_what_is_no_gzip_and_no_parquet_is_named(self, tmp_path):
        (tmp_path / "a.jsonl.gz").write_text("plain")
        (tmp_path / "a.parquet").write_text("plain")
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz: damaged gzip file"):
            values(tmp_path / "a.jsonl.gz")
        with pytest.raises(ValueError, match=r"a\.parquet: damaged Parquet file after row 0"):
            values(tmp_path / "a.parquet")

    def test_null_cells_of_parquet_are_missing_keys(self, tmp_path):
        pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", None], "x": [None, 1.5]}), tmp_path / "a.parquet")
        assert values(tmp_path / "a.parquet") == [{"prompt": "a"}, {"x": 1.5}]


class TestSize:
    def test_the_first_rows_of_a_file_of_ten_gigabytes_come_at_once(self, tmp_path):
        path = tmp_path / "huge.jsonl"
        with path.open("wb") as file:
            file.write(b'{"prompt": "a"}\n{"prompt": "b"}\n')
            file.truncate(10 * 2**30)  # sparse: it takes no room
        assert [record.value for record in itertools.islice(read_file(path), 2)] == [
            {"prompt": "a"},
            {"prompt": "b"},
        ]

    def test_a_line_without_an_end_is_given_up(self, tmp_path, monkeypatch):
        monkeypatch.setattr("rlhf_core.data.records.LONGEST_ROW", 100)
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'{"prompt": "a"}\n' + b"x" * 1000 + b'\n{"prompt": "b"}\n')
        assert reasons(path) == [(f"{path}:2", "too long to be a row")]
        assert values(path)[-1] == {"prompt": "b"}
