import json
import shutil

import pytest
import torch
import transformers
from tiny_models import ARCHITECTURES, PROMPTS, VALUES, draw, rows_of, same_bits, snapshot, tiny_config, tiny_lm
from torch import nn

from rlhf_core.config import ModelConfig
from rlhf_core.data.tokenization import word_tokenizer
from rlhf_core.layers import ROWWISE
from rlhf_core.policy import (
    ActorCritic,
    ForwardArguments,
    Reference,
    build_model,
    context_length,
    load_model,
    position_ids,
    predicting,
    require_model_source,
    round_up,
)

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
values = pytest.mark.parametrize("value", VALUES)
ROLLOUT = draw(tiny_lm("gpt2"), PROMPTS, tiny_config())


def with_random_head(lm, value):
    model = ActorCritic(lm, value)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        model.value_head.weight.normal_()
        model.value_head.bias.fill_(0.5)
    return model


@architectures
def test_a_built_model_has_the_configured_shape_and_vocabulary(architecture):
    tokenizer = word_tokenizer(["good", "bad", "film"])
    config = ModelConfig(architecture=architecture, layers=2, hidden_size=24, heads=3, context=40)
    model = build_model(config, tokenizer)
    shape = model.config
    assert (shape.model_type, shape.vocab_size, shape.hidden_size) == (architecture, 6, 24)
    assert (shape.num_hidden_layers, shape.num_attention_heads, context_length(model)) == (2, 3, 40)
    assert (shape.eos_token_id, shape.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    dropouts = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert not any(dropouts)


@architectures
def test_a_built_models_weights_come_from_torchs_generator(architecture):
    tokenizer, config = word_tokenizer(["a"]), ModelConfig(architecture=architecture, layers=1, hidden_size=8, heads=2)

    def weights(seed):
        torch.manual_seed(seed)
        return snapshot(build_model(config, tokenizer))

    with torch.random.fork_rng(devices=[]):
        first, again, other = weights(1), weights(1), weights(2)
    assert all(same_bits(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_round_up_gives_the_least_multiple_that_is_not_below():
    assert [round_up(value, 32) for value in (1, 32, 33, 256)] == [32, 32, 64, 256]


def test_positions_count_real_tokens_from_zero():
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 2, 2, 2, 2]]


def test_predicting_takes_the_positions_before_the_response_tokens():
    columns = torch.arange(7.0).repeat(2, 1)[..., None]
    assert predicting(columns, 3)[0, :, 0].tolist() == [3.0, 4.0, 5.0]
    assert predicting(columns[:, -4:], 3)[0, :, 0].tolist() == [3.0, 4.0, 5.0]  # after logits_to_keep


@torch.no_grad()
@architectures
@values
def test_logits_and_values_are_those_of_each_sequence_alone_at_the_state_before_each_token(architecture, value):
    model = with_random_head(tiny_lm(architecture), value)
    logits, got_values = model(ROLLOUT.input_ids_BL, ROLLOUT.attention_mask_BL, ROLLOUT.response_length)
    reference_logits = Reference(tiny_lm(architecture))(
        ROLLOUT.input_ids_BL, ROLLOUT.attention_mask_BL, ROLLOUT.response_length
    )
    assert logits.shape == (8, ROLLOUT.response_length, model.lm.config.vocab_size)
    trunk = model.lm.base_model if value == "shared" else model.value_trunk
    for row, (ids, count) in enumerate(rows_of(ROLLOUT)):
        alone = model.lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        hidden = trunk(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        for t in range(count):
            state = len(ids) - count + t - 1  # what the model has read when it draws token t
            torch.testing.assert_close(logits[row, t], alone[state], rtol=0, atol=1e-5)
            torch.testing.assert_close(reference_logits[row, t], alone[state], rtol=0, atol=1e-5)
            expected = float(hidden[state] @ model.value_head.weight[0]) + 0.5
            assert got_values[row, t].item() == pytest.approx(expected, abs=1e-5)


@architectures
@values
def test_every_value_is_zero_before_any_update(architecture, value):
    _, got = ActorCritic(tiny_lm(architecture), value)(ROLLOUT.input_ids_BL, ROLLOUT.attention_mask_BL, 3)
    assert not got.any()


@architectures
def test_only_a_shared_value_model_sends_gradients_into_the_policy(architecture):
    for value in VALUES:
        model = with_random_head(tiny_lm(architecture), value)
        model(ROLLOUT.input_ids_BL, ROLLOUT.attention_mask_BL, 3)[1].sum().backward()
        touched = any(parameter.grad is not None for parameter in model.lm.parameters())
        assert touched == (value == "shared")
        assert model.value_head.weight.grad is not None
    separate = {id(parameter) for parameter in model.value_trunk.parameters()}
    assert not separate & {id(parameter) for parameter in model.lm.parameters()}


@values
def test_the_value_head_keeps_float32_under_autocast(value):
    model = with_random_head(tiny_lm("llama"), value)
    _, exact = model(ROLLOUT.input_ids_BL, ROLLOUT.attention_mask_BL, 3)
    with torch.autocast("cpu", torch.bfloat16):
        logits, got = model(ROLLOUT.input_ids_BL, ROLLOUT.attention_mask_BL, 3)
    assert logits.dtype == torch.bfloat16
    assert got.dtype == torch.float32
    assert not torch.equal(got, got.bfloat16().float())  # not rounded to bfloat16 on the way
    torch.testing.assert_close(got, exact, rtol=0.1, atol=0.1)


@values
def test_a_policy_has_dropout_off_whatever_mode_its_model_came_in(value):
    model = ActorCritic(tiny_lm("gpt2", dropout=0.5).train(), value)
    assert not any(module.training for module in model.modules())


def test_the_reference_is_frozen_and_in_evaluation_mode():
    reference = Reference(tiny_lm("gpt2", dropout=0.5).train())
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert not reference.lm.training


class BareModel(nn.Module):
    """Its forward knows neither position_ids nor logits_to_keep."""

    def forward(self, input_ids, attention_mask, past_key_values=None, use_cache=False):
        return input_ids


def test_a_model_that_derives_its_own_positions_is_given_none():
    mask = torch.tensor([[0, 1, 1]])
    bare, full = ForwardArguments(BareModel()), ForwardArguments(tiny_lm("gpt2"))
    assert bare.positions(mask) == {}
    assert bare.keep(2) == {}
    assert full.keep(2) == {"logits_to_keep": 2}
    assert full.positions(mask, last=1)["position_ids"].tolist() == [[1]]


def test_a_model_without_positions_or_kept_logits_gives_the_same_as_alone():
    """Bloom's attention takes its distances from the mask, and it has no position_ids."""
    shape = transformers.AutoConfig.for_model(
        "bloom", vocab_size=11, hidden_size=8, n_layer=2, n_head=2, initializer_range=0.3, hidden_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = transformers.AutoModelForCausalLM.from_config(shape, attn_implementation="eager").eval()
    assert ForwardArguments(lm).positions(ROLLOUT.attention_mask_BL) == {}
    logits, _ = ActorCritic(lm, "shared")(ROLLOUT.input_ids_BL, ROLLOUT.attention_mask_BL, ROLLOUT.response_length)
    for row, (ids, count) in enumerate(rows_of(ROLLOUT)):
        alone = lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, :count], alone[-count - 1 : -1], rtol=0, atol=1e-5)


@pytest.fixture(params=ARCHITECTURES)
def saved(request, tmp_path):
    transformers.utils.logging.disable_progress_bar()
    model = tiny_lm(request.param)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_a_saved_model_is_loaded_with_the_same_bits_in_float32_and_evaluation_mode(saved):
    model, folder = saved
    loaded = load_model(folder, "eager")
    expected, got = model.state_dict(), loaded.state_dict()
    assert expected.keys() == got.keys()
    assert all(same_bits(expected[name], got[name]) for name in expected)
    assert not loaded.training
    assert loaded.config._attn_implementation == ROWWISE


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./missing", "../missing", "a/b/c", "~/missing"])
def test_a_missing_folder_is_named(path):
    for function in (require_model_source, lambda given: load_model(given, "eager")):
        with pytest.raises(FileNotFoundError, match=path.replace(".", r"\.")):
            function(path)


def one_line(raised):
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_a_folder_without_config_json_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json") as raised:
        load_model(tmp_path, "eager")
    assert str(tmp_path) in one_line(raised)


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
def test_damaged_weights_are_one_line_with_the_folder_and_the_remedy(saved, keep):
    _, folder = saved
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    with pytest.raises(ValueError, match=r"weights are damaged.*copy or save it again") as raised:
        load_model(folder, "eager")
    assert str(folder) in one_line(raised)


def test_pickled_weights_are_refused(saved):
    model, folder = saved
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="safetensors") as raised:
        load_model(folder, "eager")
    assert str(folder) in one_line(raised)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_layer_without_weights_is_an_error_and_not_drawn_at_random(saved, capfd):
    model, folder = saved
    change_config(folder, **{"n_layer" if model.config.model_type == "gpt2" else "num_hidden_layers": 3})
    with pytest.raises(ValueError, match=r"has no weights for .*\.2\..*save it again") as raised:
        load_model(folder, "eager")
    assert str(folder) in one_line(raised)
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


def test_weights_of_another_shape_are_an_error_that_names_both_shapes(saved):
    _, folder = saved
    change_config(folder, vocab_size=12)
    with pytest.raises(ValueError, match=r"is \(11, 8\), but \(12, 8\) by its config\.json") as raised:
        load_model(folder, "eager")
    assert str(folder) in one_line(raised)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("{", FileNotFoundError, "not a valid JSON"),
        ("{}", ValueError, "model_type"),
        ('{"model_type": "nonsense"}', ValueError, "nonsense"),
        ('{"model_type": "t5"}', ValueError, "T5Config"),
    ],
)
def test_a_config_that_is_no_causal_language_model_is_one_line(saved, text, kind, message):
    _, folder = saved
    (folder / "config.json").write_text(text)
    with pytest.raises(kind, match=message) as raised:
        load_model(folder, "eager")
    assert str(folder) in one_line(raised)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "a quantized model cannot be",
        ),
        ({"quantization_config": {"quant_method": "torchao"}}, "a quantized model cannot be"),
        ({"num_attention_heads": 0}, "its config.json makes no model .*; correct it or save it again"),
        ({"hidden_act": "nonsense"}, "its config.json makes no model .*nonsense"),
        ({"vocab_size": "many"}, "its config.json makes no model .*many"),
        ({"architectures": 3}, "architectures in its config.json is 3; it must be a list of names"),
        ({"architectures": [1]}, r"architectures in its config.json is \[1\]; it must be a list of names"),
        ({"model_type": "x", "auto_map": {"AutoConfig": "code.X", "AutoModelForCausalLM": "code.Y"}}, "custom code"),
    ],
)
def test_a_config_with_which_transformers_fails_in_its_own_way_is_one_line(tmp_path, monkeypatch, changes, message):
    tiny_lm("llama").save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(f"asked: {prompt}"))
    with pytest.raises(ValueError, match=message) as raised:
        load_model(tmp_path, "eager")
    assert str(tmp_path) in one_line(raised)


def test_loading_leaves_the_loudness_of_transformers_as_it_was(saved):
    _, folder = saved
    before = transformers.utils.logging.get_verbosity()
    load_model(folder, "eager")
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        load_model(folder, "eager")
    assert transformers.utils.logging.get_verbosity() == before


@pytest.mark.parametrize("shows_bars", [True, False])
def test_loading_leaves_the_progress_bars_of_transformers_as_they_were(saved, shows_bars):
    _, folder = saved
    logging = transformers.utils.logging
    before = logging.is_progress_bar_enabled()
    set_to = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    try:
        set_to[shows_bars]()
        load_model(folder, "eager")
        assert logging.is_progress_bar_enabled() == shows_bars
    finally:
        set_to[before]()


def test_a_reward_model_is_not_taken_for_a_language_model(saved, tmp_path):
    _, folder = saved
    transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(
        tmp_path / "reward"
    )
    with pytest.raises(ValueError, match="ForSequenceClassification, a reward model; give a language model"):
        load_model(tmp_path / "reward", "eager")
