"""A damaged or unfit model folder: named with what to do, and no run is made."""

import json
import os
import shutil

import pytest
from refusals import assert_matches, refuse
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_core.data import reviews
from rlhf_core.data.tokenization import word_tokenizer
from rlhf_core.testing.command import TINY_RUN, run_command

pytestmark = pytest.mark.usefixtures("reviews_drawn_once")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A GPT-2 of the embedded task's vocabulary, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("model") / "gpt2"
    tokenizer = word_tokenizer(reviews.VOCABULARY)
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = AutoConfig.for_model(
        "gpt2", n_embd=8, n_layer=1, n_head=2, n_positions=32, vocab_size=len(tokenizer), **ends
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    return tmp_path / "model"


def change_json(path, **changes):
    tree = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in tree.items() if value is not None}))


class TestModel:
    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda folder: (folder / "config.json").unlink(), r"model folder '.*model' has no config\.json"),
            (lambda folder: (folder / "config.json").write_text("{"), "'.*model'"),
            (lambda folder: (folder / "tokenizer.json").write_text("[]"), "cannot load the tokenizer of '.*model' "),
            (lambda folder: change_json(folder / "tokenizer_config.json", eos_token=None), "no end-of-sequence token"),
            (lambda folder: (folder / "model.safetensors").unlink(), "cannot load model '.*model': "),
            (lambda folder: os.truncate(folder / "model.safetensors", 999), "cannot load model '.*': .* are damaged"),
            (lambda folder: change_json(folder / "config.json", n_positions=12), "cannot load model '.*model': .*wpe"),
            (lambda folder: change_json(folder / "config.json", architectures=3), "is 3; it must be a list of names"),
        ],
    )  # fmt: skip
    def test_is_named_with_the_remedy(self, runs, model, spoil, message):
        spoil(model)
        assert_matches(message, refuse(runs, "--model.path", model))

    def test_a_tokenizer_with_more_tokens_than_the_model(self, runs, model):
        word_tokenizer([*reviews.VOCABULARY, "more", "words"]).save_pretrained(model)
        assert_matches("the tokenizer has .* tokens and the model .*; take", refuse(runs, "--model.path", model))

    def test_a_tokenizer_without_a_padding_token_is_no_error(self, tmp_path, model):
        change_json(model / "tokenizer_config.json", pad_token=None)
        outcome = run_command("train", *TINY_RUN, "--runs", tmp_path / "r", "--model.path", model, "--ppo.steps", "1")
        assert outcome.code == 0, outcome.err
