import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig

from rlhf_core.data import tokenization
from rlhf_core.data.tokenization import EOS, PAD, UNKNOWN, byte_pair_tokenizer, word_tokenizer

any_text = st.text(alphabet=st.characters(exclude_categories=("Cs",)))


@pytest.fixture(scope="module")
def byte_pair():
    return byte_pair_tokenizer(["the film was good .", "the plot was dull .", "wörld film"] * 5, 300)


@pytest.fixture(scope="module")
def words():
    return word_tokenizer(["the", "film", "was", "good", "."])


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
        loaded = tokenization.load_tokenizer(folder)
        text = "the film <eos> wörld"
        assert loaded(text)["input_ids"] == byte_pair(text)["input_ids"]
        assert (loaded.eos_token, loaded.pad_token) == (EOS, PAD)

    def test_without_an_end_of_sequence_token_it_is_refused(self, folder):
        self.change(folder, eos_token=None)
        with pytest.raises(
            ValueError, match=r"tokenizer of '.*model' has no end-of-sequence token.*; set eos_token in"
        ):
            tokenization.load_tokenizer(folder)

    def test_without_a_padding_token_it_pads_with_the_end(self, folder):
        self.change(folder, pad_token=None)
        assert AutoTokenizer.from_pretrained(folder).pad_token_id is None
        loaded = tokenization.load_tokenizer(folder)
        assert loaded.pad_token_id == loaded.eos_token_id

    @pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "BPE"}}', "", '{"version": "1.0"}'])
    def test_a_damaged_tokenizer_is_named_with_the_remedy(self, folder, content, capfd):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(
            FileNotFoundError, match=r"cannot load the tokenizer of '.*model' \(.*\); it takes tokenizer\.json"
        ):
            tokenization.load_tokenizer(folder)
        assert capfd.readouterr().err == ""

    def test_a_folder_without_a_tokenizer_is_named(self, folder):
        for path in folder.glob("tokenizer*"):
            path.unlink()
        with pytest.raises((FileNotFoundError, ValueError), match=r"tokenizer of '.*model'"):
            tokenization.load_tokenizer(folder)

    def test_a_folder_that_is_missing_or_no_model_is_named(self, tmp_path, folder):
        with pytest.raises(FileNotFoundError, match="no model folder '.*none'"):
            tokenization.load_tokenizer(tmp_path / "none")
        shutil.rmtree(folder)
        folder.mkdir()
        with pytest.raises(FileNotFoundError, match=r"model folder '.*model' has no config\.json"):
            tokenization.load_tokenizer(folder)


class TestEncoding:
    def test_a_sentence_ends_with_eos_unless_it_is_cut(self, words):
        the, film, good = (words.convert_tokens_to_ids(word) for word in ("the", "film", "good"))
        eos = words.eos_token_id
        assert tokenization.encode_sentences(words, ["the film", "the film good"], 3) == [
            [the, film, eos],
            [the, film, good],
        ]

    def test_a_prompt_has_no_eos(self, words):
        the, film = (words.convert_tokens_to_ids(word) for word in ("the", "film"))
        assert tokenization.encode_prompts(words, ["the film", "film"]) == [[the, film], [film]]

    def test_without_prompts_the_data_is_to_blame(self, words):
        with pytest.raises(ValueError, match="the sentences give no prompt: none has more than a few words"):
            tokenization.encode_prompts(words, [])

    def test_a_prompt_without_a_token_is_named(self, words):
        with pytest.raises(ValueError, match="no token for the prompt ' '"):
            tokenization.encode_prompts(words, ["the film", " "])

    def test_a_tokenizer_larger_than_the_model_is_refused(self, words):
        tokenization.check_vocabulary(words, len(words))
        with pytest.raises(ValueError, match="the tokenizer has 8 tokens and the model 7; take the model's own"):
            tokenization.check_vocabulary(words, 7)
