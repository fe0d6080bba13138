import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from tiny_models import ARCHITECTURES, PAD, VALUES, share_of_sevens, snapshot, tiny_config, tiny_state
from tiny_models import EOS as EOS_ID
from tiny_models import PROMPTS as TINY_PROMPTS

from rlhf_core.checkpoint import check_folder, write_folder
from rlhf_core.config import ModelConfig
from rlhf_core.data.tokenization import word_tokenizer
from rlhf_core.ppo import ppo_step
from rlhf_core.trainer_state import load_state, save_state

CPU = torch.device("cpu")
TOKENIZER = word_tokenizer([f"w{number}" for number in range(8)])


def configured(value):
    return dataclasses.replace(tiny_config(), model=ModelConfig(value=value))


def step(state, config):
    prompts = (TINY_PROMPTS * config.ppo.batch_size)[: config.ppo.batch_size]
    return ppo_step(state, prompts, share_of_sevens, config, eos_id=EOS_ID, pad_id=PAD)


def same_numbers(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("value", VALUES)
def test_a_step_after_a_round_trip_gives_the_bits_of_a_step_without_it(tmp_path, architecture, value):
    config = configured(value)
    straight, through = tiny_state(architecture, value, config), tiny_state(architecture, value, config)
    for state in (straight, through):
        step(state, config)
        step(state, config)
    assert same_numbers(snapshot(straight.model), snapshot(through.model))
    write_folder(tmp_path / "s", lambda partial: save_state(through, TOKENIZER, partial))
    check_folder(tmp_path / "s")
    loaded = load_state(tmp_path / "s", through.reference, config, CPU)
    assert (loaded.step, loaded.kl_coef) == (straight.step, straight.kl_coef)
    assert same_numbers(snapshot(loaded.model), snapshot(straight.model))
    for parameter, again in zip(straight.model.parameters(), loaded.model.parameters(), strict=True):
        assert same_numbers(straight.optimizer.state[parameter], loaded.optimizer.state[again])
    metrics, metrics_again = step(straight, config).metrics, step(loaded, config).metrics
    assert metrics == metrics_again
    assert same_numbers(snapshot(loaded.model), snapshot(straight.model))


def test_the_state_before_the_first_step_makes_the_round_trip_too(tmp_path):
    config = tiny_config()
    state = tiny_state("llama", "separate", config)
    save_state(state, TOKENIZER, tmp_path)
    loaded = load_state(tmp_path, state.reference, config, CPU)
    assert loaded.step == 0
    assert not loaded.optimizer.state
    assert same_numbers(snapshot(loaded.model), snapshot(state.model))


def test_the_kl_coefficient_keeps_every_bit(tmp_path):
    config = configured("shared")
    state = tiny_state("gpt2", "shared", config)
    state.kl_coef = 0.1 + 0.2
    save_state(state, TOKENIZER, tmp_path)
    assert load_state(tmp_path, state.reference, config, CPU).kl_coef == 0.30000000000000004


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kl_coef": 0.1}', "step is missing; it must be a whole number of 0 or more; remove this checkpoint"),
        ('{"kl_coef": 0.1, "step": "3"}', "step is '3'; it must be a whole number"),
        ('{"kl_coef": 0.1, "step": 3.0}', r"step is 3\.0; it must be a whole number"),
        ('{"kl_coef": 0.1, "step": -1}', "step is -1; it must be a whole number of 0 or more"),
        ('{"kl_coef": 0.1, "step": true}', "step is True; it must be a whole number"),
        ('{"step": 3}', "kl_coef is missing; it must be a number of 0 or more"),
        ('{"kl_coef": null, "step": 3}', "kl_coef is None; it must be a number"),
        ('{"kl_coef": NaN, "step": 3}', "kl_coef is nan; it must be a number"),
        ("[3]", "holds a list; remove this checkpoint"),
        ("{", "is not valid JSON: .*; remove this checkpoint"),
    ],
)
def test_a_number_of_the_state_that_is_not_as_it_must_be_is_named(tmp_path, content, message):
    config = configured("shared")
    state = tiny_state("llama", "shared", config)
    save_state(state, TOKENIZER, tmp_path)
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(ValueError, match=rf"state\.json:? {message}"):
        load_state(tmp_path, state.reference, config, CPU)


@pytest.mark.parametrize(
    ("saved", "asked", "message"),
    [
        ("shared", "separate", r"value_trunk\.\S* is not there; was the run's config\.json changed\?"),
        ("separate", "shared", r"value_trunk\.\S* is none of this configuration's; was"),
    ],
)
def test_a_value_model_of_another_kind_is_refused_and_not_left_as_it_began(tmp_path, saved, asked, message):
    state = tiny_state("llama", saved, configured(saved))
    save_state(state, TOKENIZER, tmp_path)
    with pytest.raises(ValueError, match=rf"value\.safetensors: {message}"):
        load_state(tmp_path, state.reference, configured(asked), CPU)


def test_all_generators_go_on_where_they_stood(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()  # noqa: NPY002

    config = tiny_config()
    state = tiny_state("llama", "separate", config)
    draw()
    save_state(state, TOKENIZER, tmp_path)
    expected = draw()
    draw()
    load_state(tmp_path, state.reference, config, CPU)
    assert draw() == expected


def test_the_policy_is_an_ordinary_transformers_folder(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    state = tiny_state("gpt2", "shared", tiny_config())
    save_state(state, TOKENIZER, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert same_numbers(model.state_dict(), state.model.lm.state_dict())
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").get_vocab() == TOKENIZER.get_vocab()
    assert json.loads((tmp_path / "state.json").read_text()) == {"kl_coef": state.kl_coef, "step": 0}
