"""Bad data: named by file, with what to do, and no run is made."""

import pytest
from refusals import assert_matches, refuse

pytestmark = pytest.mark.usefixtures("reviews_drawn_once")


@pytest.fixture
def sentences(tmp_path):
    """A folder of labelled sentences that can be trained on."""
    folder = tmp_path / "sentences"
    folder.mkdir()
    for suffix, word in (("pos", "good"), ("neg", "bad")):
        lines = [f"the film number {number} of this year was really {word} ." for number in range(60)]
        (folder / f"a.{suffix}").write_text("\n".join(lines) + "\n")
    return folder


class TestData:
    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda folder: (folder / "a.pos").write_bytes(b""), r"a\.pos holds no sentence; it must have one a line"),
            (lambda folder: (folder / "a.neg").write_bytes(b"x\n\xff\n"), r"a\.neg:2: not UTF-8 .*; convert the file"),
            (lambda folder: (folder / "a.pos").unlink(), r"no \*\.pos file; put the positive sentences there"),
            (lambda folder: (folder / "a.pos").write_text("one\n"), "has .* sentences and not both labels; give more"),
            (
                lambda folder: [
                    (folder / f"a.{suffix}").write_text("\n".join(f"{suffix}{number}" for number in range(90)))
                    for suffix in ("pos", "neg")
                ],
                "the sentences give no prompt: none has more than a few words; give longer ones",
            ),
        ],
    )
    def test_is_named_by_file(self, runs, sentences, spoil, message):
        spoil(sentences)
        assert_matches(message, refuse(runs, "--data", sentences, "--model.vocabulary", "300"))

    def test_a_folder_without_data_is_named_with_the_folder_in_it_that_has_some(self, runs, tmp_path):
        (tmp_path / "data" / "train").mkdir(parents=True)
        message = r"data' has neither \*\.pos and \*\.neg files nor a data file \(.*\)"
        assert_matches(message, refuse(runs, "--data", tmp_path / "data"))
        (tmp_path / "data" / "train" / "a.jsonl").write_text('{"prompt": "p"}\n')
        assert_matches(message + r"; its folder '.*/train' has", refuse(runs, "--data", tmp_path / "data"))

    def test_a_vocabulary_too_small(self, runs, sentences):
        complaint = refuse(runs, "--data", sentences, "--model.vocabulary", "200")
        assert "vocabulary is 200; a byte-pair vocabulary has at least 259 tokens" in complaint
