import collections

import pytest

from rlhf_core.data import labelled
from rlhf_core.data.labelled import Labelled


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_bytes(content)
    return folder


class TestReadLabelled:
    def test_reads_every_file_of_both_kinds_stripped_and_without_repetitions(self, tmp_path):
        folder = write(
            tmp_path / "d", b_pos=b"  one \r\n\r\ntwo\n", a_pos=b"three\none\n", x_neg=b"two\nfour", y_txt=b"ignored\n"
        )
        assert labelled.read_labelled(folder) == [
            Labelled("three", True), Labelled("one", True), Labelled("two", True), Labelled("four", False),
        ]  # fmt: skip

    def test_only_line_feeds_end_a_sentence(self, tmp_path):
        folder = write(tmp_path / "d", a_pos="one\u2028still one\x85and still\n".encode(), a_neg=b"x\n")
        assert labelled.read_labelled(folder)[0].text == "one\u2028still one\x85and still"

    def test_a_byte_order_mark_is_no_part_of_the_first_sentence(self, tmp_path):
        folder = write(tmp_path / "d", a_pos=b"\xef\xbb\xbfgood\n", a_neg=b"bad\n")
        assert [sentence.text for sentence in labelled.read_labelled(folder)] == ["good", "bad"]

    def test_bytes_that_are_not_utf_8_are_named_by_file_and_line(self, tmp_path):
        folder = write(tmp_path / "d", a_pos=b"fine\n\ncaf\xe9 noir\nmore\n", a_neg=b"x\n")
        with pytest.raises(ValueError, match=r"a\.pos:3: not UTF-8 \(.*\); convert the file to UTF-8"):
            labelled.read_labelled(folder)

    @pytest.mark.parametrize("content", [b"", b"\n \n\t\n"])
    def test_a_file_without_a_sentence_is_named(self, tmp_path, content):
        folder = write(tmp_path / "d", a_pos=b"good\n", a_neg=content)
        with pytest.raises(ValueError, match=r"a\.neg holds no sentence; it must have one a line"):
            labelled.read_labelled(folder)

    @pytest.mark.parametrize(("there", "missing", "label"), [("pos", "neg", "negative"), ("neg", "pos", "positive")])
    def test_a_kind_of_file_that_is_missing_is_named(self, tmp_path, there, missing, label):
        folder = write(tmp_path / "d", **{f"a_{there}": b"x\n"})
        with pytest.raises(FileNotFoundError, match=rf"no \*\.{missing} file; put the {label} sentences there"):
            labelled.read_labelled(folder)

    def test_a_folder_that_is_missing_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no data folder '.*none'; give a folder"):
            labelled.read_labelled(tmp_path / "none")


class TestSplit:
    # `printf %s TEXT | sha256sum | cut -c1-8`, modulo 20: 0 and 1 are held out, other even numbers the reward's.
    @pytest.mark.parametrize(
        ("text", "part"),
        [
            ("superb", "held_out"),  # 0178fa91: 1
            ("good", "reward"),  # 770e6076: 2
            ("a", "reward"),  # ca978112: 10
            ("the film was good .", "evaluator"),  # 60151cb7: 3
            ("naïve", "evaluator"),  # f86fd89d: 17
        ],
    )
    def test_a_sentence_belongs_for_ever_to_one_part(self, text, part):
        assert labelled.part_of(text) == part

    def test_a_tenth_is_held_out_and_the_rest_halved(self):
        n = 20_000
        counts = collections.Counter(labelled.part_of(f"sentence {number}") for number in range(n))
        # Five standard deviations of a binomial share.
        assert abs(counts["held_out"] / n - 0.10) < 5 * (0.10 * 0.90 / n) ** 0.5
        for part in ("reward", "evaluator"):
            assert abs(counts[part] / n - 0.45) < 5 * (0.45 * 0.55 / n) ** 0.5

    def test_every_sentence_lands_in_one_part_in_its_order(self):
        sentences = [Labelled(f"s{number}", number % 2 == 0) for number in range(200)]
        parts = labelled.split(sentences)
        assert set(parts) == {"reward", "evaluator", "held_out"}
        for name, members in parts.items():
            assert members == [sentence for sentence in sentences if labelled.part_of(sentence.text) == name]

    def test_too_few_sentences_are_refused_with_what_is_missing(self):
        one_label = [Labelled(f"s{number}", True) for number in range(200)]
        for sentences in ([], one_label):
            with pytest.raises(
                ValueError, match=r"the part 'reward' of the data has \d+ sentences and not both labels"
            ):
                labelled.split(sentences)
