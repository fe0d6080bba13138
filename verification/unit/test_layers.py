import copy

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_lm
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_core.layers import ROWWISE, exchange_layers, rowwise_attention
from rlhf_kernels import token_logprobs


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def exchanged(architecture, model=None):
    model = model or tiny_lm(architecture)
    exchange_layers(model)
    return model


def inputs(rows=5, length=9, padded=2):
    ids = torch.randint(2, 11, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def wide(architecture, width=32):
    """A small model of the architecture with the kit's layers."""
    common = {"vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.1}
    if architecture == "gpt2":
        shape = AutoConfig.for_model("gpt2", n_embd=width, n_layer=2, n_head=2, n_positions=64, **common)
    else:
        shape = AutoConfig.for_model(
            "llama", hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, **common,
        )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape, attn_implementation="eager", dtype=torch.float32).eval()
    return exchanged(architecture, model)


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    logprobs = token_logprobs(model(**batch).logits[:, :-1], batch["input_ids"][:, 1:])
    (logprobs * batch["attention_mask"][:, 1:]).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_gradients_are_those_of_the_layers_they_replace(architecture):
    plain, ours, batch = tiny_lm(architecture).double(), exchanged(architecture), inputs(padded=0)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours(**batch).logits[real].double(), plain(**batch).logits[real], rtol=1e-4, atol=1e-4)
    expected, got = gradients(plain, batch), gradients(ours, batch)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name].double(), gradient, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_gradient_has_the_same_bits_for_any_number_of_threads(architecture, threads):
    model, batch = wide(architecture, 128), inputs(rows=16, length=37)
    found = []
    for count in (1, 2, 4):
        threads(count)
        found.append(gradients(model, batch))
    for other in found[1:]:
        assert [name for name in found[0] if not torch.equal(found[0][name], other[name])] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_logits_of_a_row_have_the_same_bits_whatever_rows_stand_beside_it(architecture):
    model, batch = wide(architecture), inputs()
    with torch.no_grad():
        whole = model(**batch).logits
        for rows in ([1], [3, 2], [4, 1, 0]):
            part = model(**{name: tensor[rows] for name, tensor in batch.items()}).logits
            assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_saves_loads_and_copies_as_before(architecture, tmp_path):
    plain, ours, batch = tiny_lm(architecture), exchanged(architecture), inputs()
    assert ours.state_dict().keys() == plain.state_dict().keys()
    ours.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(loaded(**batch).logits, plain(**batch).logits)
    copied = copy.deepcopy(ours)
    assert torch.equal(copied(**batch).logits, ours(**batch).logits)
    assert not {id(one) for one in copied.parameters()} & {id(one) for one in ours.parameters()}


def test_exchanging_twice_changes_nothing_and_other_layers_stay():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 3), Own(3, 3), nn.LayerNorm(3, elementwise_affine=False))
    exchange_layers(model)
    kinds = [type(module) for module in model]
    exchange_layers(model)
    assert [type(module) for module in model] == kinds
    assert kinds[1] is Own
    x = torch.randn(4, 2)
    hidden = model[1](model[0](x))
    torch.testing.assert_close(model(x), nn.functional.layer_norm(hidden, (3,)))


def test_an_attention_that_was_chosen_stays():
    model = tiny_lm("llama")
    model.set_attn_implementation("sdpa")
    exchange_layers(model)
    assert model.config._attn_implementation == "sdpa"
    assert exchanged("llama").config._attn_implementation == ROWWISE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_under_autocast_works(architecture):
    model, batch = exchanged(architecture), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**batch).logits
    torch.testing.assert_close(logits.float(), model(**batch).logits, rtol=0.1, atol=0.3)


def test_dropout_is_as_in_transformers_where_it_is_left_on():
    model, batch = exchanged("llama", tiny_lm("llama", dropout=0.5)), inputs(padded=0)
    still = model(**batch).logits
    assert torch.equal(model(**batch).logits, still)
    model.train()
    assert not torch.equal(model(**batch).logits, still)


def test_a_second_derivative_of_attention_is_refused_and_not_left_out():
    x = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = x.detach()

    def attended(x):
        return rowwise_attention(nn.Module(), x, value, value, None, 0.5)[0]

    result = attended(x).sum()
    (gradient,) = torch.autograd.grad(result, x, create_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(attended(x).sum(), x)[0])
    with pytest.raises(RuntimeError, match="_Softmax has no second derivative"):
        (result + gradient.square().sum()).backward()
