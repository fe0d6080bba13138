import collections
import itertools
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig

from rlhf_core import data
from rlhf_core.data import (
    EOS,
    PAD,
    UNKNOWN,
    Labelled,
    batches,
    byte_pair_tokenizer,
    prompt_rows,
    right_pad,
    word_tokenizer,
)

any_text = st.text(alphabet=st.characters(exclude_categories=("Cs",)))


@pytest.fixture(scope="module")
def byte_pair():
    return byte_pair_tokenizer(["the film was good .", "the plot was dull .", "wörld film"] * 5, 300)


@pytest.fixture(scope="module")
def words():
    return word_tokenizer(["the", "film", "was", "good", "."])


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
        assert data.read_labelled(folder) == [
            Labelled("three", True), Labelled("one", True), Labelled("two", True), Labelled("four", False),
        ]  # fmt: skip

    def test_only_line_feeds_end_a_sentence(self, tmp_path):
        folder = write(tmp_path / "d", a_pos="one\u2028still one\x85and still\n".encode(), a_neg=b"x\n")
        assert data.read_labelled(folder)[0].text == "one\u2028still one\x85and still"

    def test_a_byte_order_mark_is_no_part_of_the_first_sentence(self, tmp_path):
        folder = write(tmp_path / "d", a_pos=b"\xef\xbb\xbfgood\n", a_neg=b"bad\n")
        assert [sentence.text for sentence in data.read_labelled(folder)] == ["good", "bad"]

    def test_bytes_that_are_not_utf_8_are_named_by_file_and_line(self, tmp_path):
        folder = write(tmp_path / "d", a_pos=b"fine\n\ncaf\xe9 noir\nmore\n", a_neg=b"x\n")
        with pytest.raises(ValueError, match=r"a\.pos:3: not UTF-8 \(.*\); convert the file to UTF-8"):
            data.read_labelled(folder)

    @pytest.mark.parametrize("content", [b"", b"\n \n\t\n"])
    def test_a_file_without_a_sentence_is_named(self, tmp_path, content):
        folder = write(tmp_path / "d", a_pos=b"good\n", a_neg=content)
        with pytest.raises(ValueError, match=r"a\.neg holds no sentence; it must have one a line"):
            data.read_labelled(folder)

    @pytest.mark.parametrize(("there", "missing", "label"), [("pos", "neg", "negative"), ("neg", "pos", "positive")])
    def test_a_kind_of_file_that_is_missing_is_named(self, tmp_path, there, missing, label):
        folder = write(tmp_path / "d", **{f"a_{there}": b"x\n"})
        with pytest.raises(FileNotFoundError, match=rf"no \*\.{missing} file; put the {label} sentences there"):
            data.read_labelled(folder)

    def test_a_folder_that_is_missing_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no data folder '.*none'; give a folder"):
            data.read_labelled(tmp_path / "none")


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
        assert data.part_of(text) == part

    def test_a_tenth_is_held_out_and_the_rest_halved(self):
        n = 20_000
        counts = collections.Counter(data.part_of(f"sentence {number}") for number in range(n))
        # Five standard deviations of a binomial share.
        assert abs(counts["held_out"] / n - 0.10) < 5 * (0.10 * 0.90 / n) ** 0.5
        for part in ("reward", "evaluator"):
            assert abs(counts[part] / n - 0.45) < 5 * (0.45 * 0.55 / n) ** 0.5

    def test_every_sentence_lands_in_one_part_in_its_order(self):
        sentences = [Labelled(f"s{number}", number % 2 == 0) for number in range(200)]
        parts = data.split(sentences)
        assert set(parts) == {"reward", "evaluator", "held_out"}
        for name, members in parts.items():
            assert members == [sentence for sentence in sentences if data.part_of(sentence.text) == name]

    def test_too_few_sentences_are_refused_with_what_is_missing(self):
        one_label = [Labelled(f"s{number}", True) for number in range(200)]
        for sentences in ([], one_label):
            with pytest.raises(
                ValueError, match=r"the part 'reward' of the data has \d+ sentences and not both labels"
            ):
                data.split(sentences)


class TestBytePair:
    @given(any_text)
    def test_every_text_comes_back(self, byte_pair, text):
        ids = byte_pair(text, add_special_tokens=False)["input_ids"]
        assert byte_pair.decode(ids) == text
        assert not {byte_pair.eos_token_id, byte_pair.pad_token_id, byte_pair.unk_token_id} & set(ids)

    @pytest.mark.parametrize(
        "text", ["<eos>", "good <eos> bad<pad>", "\0\x1b[31m", "👩‍👩‍👧 \u202e", "a  b   c", " lead and trail ", "\n\t"]
    )
    def test_hostile_texts_come_back_and_end_nothing(self, byte_pair, text):
        ids = byte_pair(text, add_special_tokens=False)["input_ids"]
        assert byte_pair.decode(ids, skip_special_tokens=True) == text
        assert byte_pair.eos_token_id not in ids

    def test_it_is_the_same_for_the_same_texts(self, byte_pair):
        again = byte_pair_tokenizer(["the film was good .", "the plot was dull .", "wörld film"] * 5, 300)
        assert again.get_vocab() == byte_pair.get_vocab()

    def test_it_learns_what_is_frequent(self, byte_pair):
        assert len(byte_pair("the film", add_special_tokens=False)["input_ids"]) < len("the film")

    def test_a_vocabulary_too_small_for_the_bytes_is_refused(self):
        with pytest.raises(ValueError, match="vocabulary is 258; a byte-pair vocabulary has at least 259 tokens"):
            byte_pair_tokenizer(["x"], 258)
        assert len(byte_pair_tokenizer(["x"], 259)) == 259


class TestWords:
    def test_decoding_gives_the_words_with_single_spaces(self, words):
        ids = words("the  film\twas good .", add_special_tokens=False)["input_ids"]
        assert words.decode(ids) == "the film was good ."
        assert (
            words.decode([*ids, words.eos_token_id, words.pad_token_id], skip_special_tokens=True)
            == "the film was good ."
        )

    def test_another_word_is_unknown(self, words):
        assert words("terrible", add_special_tokens=False)["input_ids"] == [words.unk_token_id]

    def test_special_tokens_come_first_and_no_word_is_lost(self, words):
        assert sorted(words.get_vocab()) == sorted(["the", "film", "was", "good", ".", EOS, PAD, UNKNOWN])
        assert words.padding_side == "left"


class TestLoadTokenizer:
    @pytest.fixture
    def folder(self, tmp_path, byte_pair):
        byte_pair.save_pretrained(tmp_path / "model")
        LlamaConfig(vocab_size=300, hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def change(self, folder, **changes):
        path = folder / "tokenizer_config.json"
        kept = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in kept.items() if value is not None}))

    def test_gives_back_what_was_saved(self, folder, byte_pair):
        loaded = data.load_tokenizer(folder)
        text = "the film <eos> wörld"
        assert loaded(text)["input_ids"] == byte_pair(text)["input_ids"]
        assert (loaded.eos_token, loaded.pad_token) == (EOS, PAD)

    def test_without_an_end_of_sequence_token_it_is_refused(self, folder):
        self.change(folder, eos_token=None)
        with pytest.raises(
            ValueError, match=r"tokenizer of '.*model' has no end-of-sequence token.*; set eos_token in"
        ):
            data.load_tokenizer(folder)

    def test_without_a_padding_token_it_pads_with_the_end(self, folder):
        self.change(folder, pad_token=None)
        assert AutoTokenizer.from_pretrained(folder).pad_token_id is None
        loaded = data.load_tokenizer(folder)
        assert loaded.pad_token_id == loaded.eos_token_id

    @pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "BPE"}}', "", '{"version": "1.0"}'])
    def test_a_damaged_tokenizer_is_named_with_the_remedy(self, folder, content, capfd):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(
            FileNotFoundError, match=r"cannot load the tokenizer of '.*model' \(.*\); it takes tokenizer\.json"
        ):
            data.load_tokenizer(folder)
        assert capfd.readouterr().err == ""

    def test_a_folder_without_a_tokenizer_is_named(self, folder):
        for path in folder.glob("tokenizer*"):
            path.unlink()
        with pytest.raises((FileNotFoundError, ValueError), match=r"tokenizer of '.*model'"):
            data.load_tokenizer(folder)

    def test_a_folder_that_is_missing_or_no_model_is_named(self, tmp_path, folder):
        with pytest.raises(FileNotFoundError, match="no model folder '.*none'"):
            data.load_tokenizer(tmp_path / "none")
        shutil.rmtree(folder)
        folder.mkdir()
        with pytest.raises(FileNotFoundError, match=r"model folder '.*model' has no config\.json"):
            data.load_tokenizer(folder)


class TestEncoding:
    def test_a_sentence_ends_with_eos_unless_it_is_cut(self, words):
        the, film, good = (words.convert_tokens_to_ids(word) for word in ("the", "film", "good"))
        eos = words.eos_token_id
        assert data.encode_sentences(words, ["the film", "the film good"], 3) == [[the, film, eos], [the, film, good]]

    def test_a_prompt_has_no_eos(self, words):
        the, film = (words.convert_tokens_to_ids(word) for word in ("the", "film"))
        assert data.encode_prompts(words, ["the film", "film"]) == [[the, film], [film]]

    def test_without_prompts_the_data_is_to_blame(self, words):
        with pytest.raises(ValueError, match="the sentences give no prompt: none has more than a few words"):
            data.encode_prompts(words, [])

    def test_a_prompt_without_a_token_is_named(self, words):
        with pytest.raises(ValueError, match="no token for the prompt ' '"):
            data.encode_prompts(words, ["the film", " "])

    def test_a_tokenizer_larger_than_the_model_is_refused(self, words):
        data.check_vocabulary(words, len(words))
        with pytest.raises(ValueError, match="the tokenizer has 8 tokens and the model 7; take the model's own"):
            data.check_vocabulary(words, 7)

    def test_right_pad_fills_behind_and_masks_it(self):
        ids, mask = right_pad([[5, 6], [7], [8, 9, 3]], pad_id=0)
        assert ids.tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 3]]
        assert mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
        assert (ids.dtype, mask.dtype) == (torch.int64, torch.int64)


class TestBatches:
    @given(st.integers(1, 80), st.integers(1, 9), st.integers(0, 5))
    def test_an_epoch_has_no_row_twice_and_drops_less_than_a_batch_a_pool(self, n, size, seed):
        lengths = [1 + (7 * row) % 13 for row in range(n)]
        size = min(size, n)
        per_epoch = sum(len(range(0, min(16 * size, n - start) - size + 1, size)) for start in range(0, n, 16 * size))
        stream = batches(lengths, size, seed, "test")
        for epoch in (list(itertools.islice(stream, per_epoch)) for _ in range(2)):
            rows = [row for batch in epoch for row in batch]
            assert all(len(batch) == size for batch in epoch)
            assert len(set(rows)) == len(rows) > n - size
            assert set(rows) <= set(range(n))

    def test_it_is_a_function_of_seed_and_purpose(self):
        lengths = list(range(1, 41))

        def first(seed, purpose):
            return list(itertools.islice(batches(lengths, 4, seed, purpose), 20))

        assert first(1, "a") == first(1, "a")
        assert first(1, "a") != first(2, "a")
        assert first(1, "a") != first(1, "b")

    def test_epochs_differ(self):
        stream = batches([1] * 40, 4, 0, "a")
        assert list(itertools.islice(stream, 10)) != list(itertools.islice(stream, 10))

    def test_rows_of_a_batch_have_similar_lengths(self):
        lengths = [1 + (37 * row) % 64 for row in range(64)]
        for batch in itertools.islice(batches(lengths, 4, 0, "a"), 16):
            spread = max(lengths[row] for row in batch) - min(lengths[row] for row in batch)
            assert spread == 3  # one pool holds all: 1 to 64, sorted, in fours

    def test_fewer_rows_than_a_batch_give_one_batch(self):
        assert sorted(next(batches([3, 1, 2], 8, 0, "a"))) == [0, 1, 2]


class TestPromptRows:
    @given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 3))
    def test_successive_steps_go_through_one_permutation_after_the_other(self, n, size, seed):
        steps = range(1, 2 + 3 * n // size)
        rows = [row for step in steps for row in prompt_rows(n, size, step, seed)]
        for start in range(0, len(rows) - n + 1, n):
            assert sorted(rows[start : start + n]) == list(range(n))

    def test_a_step_is_a_function_of_its_number_and_the_seed(self):
        assert prompt_rows(50, 8, 7, 1) == prompt_rows(50, 8, 7, 1)
        assert prompt_rows(50, 8, 7, 1) != prompt_rows(50, 8, 7, 2)
        assert prompt_rows(50, 8, 7, 1) != prompt_rows(50, 8, 8, 1)

    def test_a_batch_may_be_longer_than_the_data(self):
        rows = prompt_rows(3, 7, 1, 0)
        assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]
