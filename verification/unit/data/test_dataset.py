"""A source becomes a store of tokens: checked, counted, split, and never whole in memory."""

import gzip
import json
import os
import subprocess
import sys

import pytest

from rlhf_core.data.dataset import build_store, fingerprint, open_rows, texts_of
from rlhf_core.data.tokenization import byte_pair_tokenizer
from rlhf_core.tasks import cut_prompt

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_pair_tokenizer(["abc"], 259)  # a token a byte


def store(folder, rows, need, tokenizer, *, errors="stop", longest=40, held_out_share=0.0, **options):
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    target = folder / f"store-{len(list(folder.iterdir()))}"
    report = build_store(
        str(path), need, target,
        tokenizer=tokenizer, longest=longest, errors=errors, held_out_share=held_out_share, **options,
    )  # fmt: skip
    return report, target


def texts(tokenizer, folder, column, split="train"):
    return [tokenizer.decode(ids) for ids in open_rows(folder, split).column(column)]


def test_pairs_keep_their_texts_margins_and_ties_and_end_with_eos(tmp_path, tokenizer):
    rows = [
        {"prompt": "p", "chosen": " c", "rejected": "r", "margin": 2.5},
        {"prompt": "q", "chosen": "x", "rejected": "", "tie": True},
    ]
    rows[1]["rejected"] = "y"
    report, folder = store(tmp_path, rows, "pair", tokenizer)
    assert texts(tokenizer, folder, "prompt") == ["p", "q"]
    assert texts(tokenizer, folder, "chosen") == [" c<eos>", "x<eos>"]
    assert texts(tokenizer, folder, "rejected") == ["r<eos>", "y<eos>"]
    train = open_rows(folder, "train")
    assert train.margins_and_ties().tolist() == [[2.5, 0.0], [0.0, 1.0]]
    assert train.column("chosen").lengths().tolist() == [3, 2]
    assert train.column("chosen")[-1] == train.column("chosen")[0:2][1]
    assert str(report).endswith("rows.jsonl: 2 rows: 2 to train on, 0 held out")


def test_pairs_serve_as_demonstrations_of_the_chosen_one_and_as_prompts(tmp_path, tokenizer):
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "p", "chosen": "d", "rejected": "r"}]
    _, folder = store(tmp_path, rows, "demonstration", tokenizer)
    assert texts(tokenizer, folder, "completion") == ["c<eos>", "d<eos>"]
    report, folder = store(tmp_path, rows, "prompt", tokenizer)
    assert texts(tokenizer, folder, "prompt") == ["p"]
    assert report.repeated == 1


def test_a_text_is_a_completion_of_nothing_and_gives_its_beginning_as_a_prompt(tmp_path, tokenizer):
    row = {"text": "one two three four five six seven"}
    _, folder = store(tmp_path, [row], "demonstration", tokenizer)
    assert open_rows(folder, "train").column("prompt")[0] == []
    assert texts(tokenizer, folder, "completion") == ["one two three four five six seven<eos>"]
    cut = lambda text, number: cut_prompt(text, 0, number)  # noqa: E731
    _, folder = store(tmp_path, [row], "prompt", tokenizer, cut_prompt=cut)
    [prompt] = texts(tokenizer, folder, "prompt")
    assert row["text"].startswith(prompt + " ")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: too short: the text gives no prompt"):
        store(tmp_path, [{"text": "one"}], "prompt", tokenizer, cut_prompt=cut)


def test_special_tokens_count_where_a_template_wrote_them_and_nowhere_else(tmp_path, tokenizer):
    chatty = byte_pair_tokenizer(["abc"], 259)
    chatty.chat_template = TEMPLATE
    message = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    rows = [{"messages": message}, {"prompt": "hi<eos>", "completion": "yo"}]
    _, folder = store(tmp_path, rows, "demonstration", chatty)
    prompts = open_rows(folder, "train").column("prompt")
    completions = open_rows(folder, "train").column("completion")
    assert prompts[0].count(chatty.eos_token_id) == 1
    assert prompts[1].count(chatty.eos_token_id) == 0
    # The template's own end is the end: there is no second one behind it.
    assert completions[0] == completions[1] == [*chatty("yo")["input_ids"], chatty.eos_token_id]


def test_a_tokenizer_that_begins_with_bos_does_so_once_and_before_the_prompt(tmp_path):
    from tokenizers import processors

    beginning = byte_pair_tokenizer(["abc"], 259)
    beginning.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", beginning.unk_token_id)]
    )
    beginning.bos_token = "<unk>"
    _, folder = store(tmp_path, [{"prompt": "ab", "completion": "c"}, {"text": "d"}], "demonstration", beginning)
    bos = beginning.bos_token_id
    assert [row.count(bos) for row in open_rows(folder, "train").column("prompt")] == [1, 1]
    assert [row.count(bos) for row in open_rows(folder, "train").column("completion")] == [0, 0]


class TestUnusableRows:
    ROWS = (
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        "{bad",
        {"prompt": "p", "chosen": "c", "rejected": "c"},
        {"prompt": "p", "chosen": "", "rejected": "c"},
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"prompt": "x" * 50, "chosen": "c", "rejected": "r"},
        {"prompt": "x" * 38, "chosen": "aaX", "rejected": "aaY"},
        {"prompt": "x" * 36, "chosen": "abcdef", "rejected": "b"},
        "also bad",
    )

    def test_skip_counts_them_by_reason_with_the_first_place(self, tmp_path, tokenizer):
        report, folder = store(tmp_path, self.ROWS, "pair", tokenizer, errors="skip")
        assert dict(report.unusable) == {
            "malformed JSON": 2,
            "chosen equals rejected": 1,
            "empty chosen": 1,
            "prompt too long": 1,
            "equal when cut": 1,
        }
        assert (report.rows, report.used, report.repeated, report.cut) == (9, 2, 1, 1)
        assert "2 malformed JSON, first " in str(report)
        assert f"first {tmp_path}/rows.jsonl:2" in str(report)
        assert json.loads((folder / "report.json").read_text())["unusable"]["malformed JSON"] == 2
        # What is cut has no end.
        assert texts(tokenizer, folder, "chosen") == ["c<eos>", "abcd"]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (
                ROWS[:2],
                r"rows\.jsonl:2: malformed JSON: .*; correct the row, or leave such rows out with --data-errors",
            ),
            ((ROWS[0], ROWS[2]), r"rows\.jsonl:2: chosen equals rejected"),
            ((ROWS[5],), r"rows\.jsonl:1: prompt too long: 50 tokens; the context has 40"),
            ((ROWS[6],), r"rows\.jsonl:1: equal when cut"),
        ],
    )
    def test_stop_names_the_first(self, tmp_path, tokenizer, rows, message):
        with pytest.raises(ValueError, match=message):
            store(tmp_path, rows, "pair", tokenizer)

    def test_repetitions_stop_nothing(self, tmp_path, tokenizer):
        report, _ = store(tmp_path, [self.ROWS[0]] * 3, "pair", tokenizer)
        assert (report.used, report.repeated) == (1, 2)

    def test_when_nothing_is_left_the_reasons_are_said(self, tmp_path, tokenizer):
        with pytest.raises(ValueError, match=r"no row of the data can be used: .*1 rows: .*1 malformed JSON"):
            store(tmp_path, ["{bad"], "pair", tokenizer, errors="skip")
        with pytest.raises(ValueError, match=r"no row of the data can be used: .*0 rows"):
            store(tmp_path, [], "pair", tokenizer)


def test_rows_of_one_prompt_are_never_on_both_sides_and_the_order_is_that_of_the_file(tmp_path, tokenizer):
    rows = [{"prompt": f"p{n % 40}", "completion": f"c{n}"} for n in range(200)]
    _, folder = store(tmp_path, rows, "demonstration", tokenizer, held_out_share=0.3)
    sides = {split: texts(tokenizer, folder, "prompt", split) for split in ("train", "held_out")}
    assert not set(sides["train"]) & set(sides["held_out"])
    assert len(sides["train"]) + len(sides["held_out"]) == 200
    assert 2 < len(set(sides["held_out"])) < 25
    order = [row["prompt"] for row in rows]
    for side in sides.values():
        assert side == [prompt for prompt in order if prompt in set(side)]


def test_texts_for_a_tokenizer_stop_when_there_are_enough(tmp_path):
    (tmp_path / "a.txt").write_text("abcd\n" * 100)
    assert len(list(texts_of(str(tmp_path / "a.txt"), "stop", most_characters=20))) == 6


def test_a_fingerprint_is_of_the_content(tmp_path):
    (tmp_path / "a.jsonl").write_text("x\n")
    before = fingerprint(str(tmp_path / "a.jsonl"))
    os.utime(tmp_path / "a.jsonl", (0, 0))
    assert fingerprint(str(tmp_path / "a.jsonl")) == before
    (tmp_path / "a.jsonl").write_text("y\n")
    assert fingerprint(str(tmp_path / "a.jsonl")) != before


MEASURE = """
import sys
from pathlib import Path
import pyarrow.parquet  # a library's own size is not the file's
from rlhf_core.data.dataset import build_store, open_rows
from rlhf_core.profiling import peak_memory_bytes
from rlhf_core.data.tokenization import word_tokenizer

tokenizer = word_tokenizer(["word"])
before = peak_memory_bytes()
report = build_store(sys.argv[1], "demonstration", Path(sys.argv[2]), tokenizer=tokenizer, longest=64, errors="stop",
                     held_out_share=0.1)
rows = open_rows(Path(sys.argv[2]), "train").column("completion")
print(report.rows, peak_memory_bytes() - before, sum(len(rows[n]) for n in range(0, len(rows), 1000)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "parquet", "csv"])
def test_a_file_of_300_megabytes_needs_less_than_a_fifth_of_that(tmp_path, form):
    import pyarrow
    import pyarrow.parquet

    n, path = 75_000, tmp_path / f"big.{form}"
    row = {"prompt": "p", "completion": "word " * 800}  # 4 kB
    if form == "parquet":  # one row group, without a dictionary or compression that would make the file small
        columns = {"prompt": [str(number) for number in range(n)], "completion": [row["completion"]] * n}
        pyarrow.parquet.write_table(
            pyarrow.table(columns), path, row_group_size=n, use_dictionary=False, compression="none"
        )
        assert path.stat().st_size > 300_000_000
    else:
        with gzip.open(path, "wt", compresslevel=1) if form == "jsonl.gz" else path.open("w") as file:
            file.write({"json": "[", "csv": "prompt,completion\n"}.get(form, ""))
            for number in range(n):
                made = {**row, "prompt": str(number)}
                line = ",".join(made.values()) if form == "csv" else json.dumps(made)
                file.write(("," if form == "json" and number else "") + line + "\n")
            file.write("]" if form == "json" else "")
    command = [sys.executable, "-c", MEASURE, path, tmp_path / "store"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    rows, grown, _ = map(int, outcome.stdout.split())
    assert rows == n
    assert grown < 60_000_000
