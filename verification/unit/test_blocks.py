import copy
import gc
import weakref

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_lm
from torch import nn

from rlhf_core.blocks import KNOWN, blocks_of
from rlhf_core.layers import exchange_layers
from rlhf_core.packing import hidden_states, pack, response_logprobs
from rlhf_kernels import memory
from rlhf_kernels.products import available

IDS = torch.tensor([[9, 1, 2, 3, 4], [5, 6, 7, 9, 9], [1, 2, 3, 4, 5]])
MASK = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
native = pytest.mark.skipif(not available(), reason="no native products on this processor")


def model_of(architecture, seed=4):
    model = tiny_lm(architecture, seed=seed)
    exchange_layers(model)
    return model


def found(model, *, program=True, read=None):
    """Hidden states, those that predict or others, and the gradient of each parameter that has a part in them."""
    blocks = blocks_of(model)
    if not program:
        blocks.program = None
    packed = pack(IDS, MASK, 3)
    hidden = hidden_states(blocks, packed, packed.predicting_M if read is None else read)
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [hidden.detach(), *torch.autograd.grad(hidden, learned, upstream, allow_unused=True)]


def same(one, other):
    return all(x is y is None or torch.equal(x, y) for x, y in zip(one, other, strict=True))


@native
@pytest.mark.parametrize("frozen", ["nothing", "embeddings", "the first block"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_program_gives_the_bits_of_the_blocks_one_by_one(architecture, frozen):
    model = model_of(architecture)
    if frozen != "nothing":
        for name, parameter in model.named_parameters():
            first = ".0." in name and frozen == "the first block"
            parameter.requires_grad_(not (first or "embed" in name or "wte" in name or "wpe" in name))
    assert blocks_of(model).program is not None
    assert same(found(model), found(model, program=False))


@native
@pytest.mark.parametrize("program", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_read_has_the_bits_of_the_whole(architecture, program):
    model, read = model_of(architecture), torch.tensor([0, 3, 4, 11])
    whole = found(model, program=program, read=torch.arange(12))
    assert torch.equal(found(model, program=program, read=read)[0], whole[0][read])


@native
def test_a_program_is_made_once():
    model = model_of("gpt2")
    assert blocks_of(model).program is blocks_of(model).program


@native
def test_rows_that_are_read_at_the_same_time_keep_their_own_positions():
    model = model_of("llama")
    one, other = blocks_of(model), blocks_of(model)
    one.embed(torch.tensor([1, 2]), torch.tensor([0, 1]))
    other.embed(torch.tensor([3]), torch.tensor([5]))
    assert len(one.turns[0]) == 2
    assert len(other.turns[0]) == 1


def replaced_weight(model):
    model.transformer.h[0].mlp.c_fc.weight = nn.Parameter(2 * model.transformer.h[0].mlp.c_fc.weight.detach())


def weight_elsewhere(model):
    model.transformer.h[1].attn.c_attn.weight.data = 2 * model.transformer.h[1].attn.c_attn.weight.data


def replaced_layer(model):
    model.transformer.h[0].ln_1 = copy.deepcopy(model.transformer.ln_f)
    exchange_layers(model)
    nn.init.constant_(model.transformer.h[0].ln_1.weight, 3.0)


def changed_in_place(model):
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.bias.add_(1.0)


@native
@pytest.mark.parametrize("change", [replaced_weight, weight_elsewhere, replaced_layer, changed_in_place])
def test_what_is_remembered_of_a_model_follows_its_changes(change):
    model = model_of("gpt2")
    before = found(model)
    change(model)
    after = found(model)
    assert not torch.equal(before[0], after[0])
    assert same(after, found(model, program=False))


@native
def test_a_copy_of_a_model_has_blocks_of_its_own():
    model = model_of("llama")
    right = found(model)
    blocks_of(model).embed(torch.tensor([1]), torch.tensor([0]))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.model.layers.parameters():
            parameter.zero_()
    assert not torch.equal(found(twin)[0], right[0])
    assert same(found(model), right)


@pytest.mark.parametrize("part", ["whole", "trunk"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_remembered_keeps_no_model_alive(architecture, part):
    model = model_of(architecture)
    model = model.base_model if part == "trunk" else model
    found(model)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_what_is_remembered_is_no_part_of_what_is_saved(tmp_path):
    model = model_of("gpt2")
    names = set(model.state_dict())
    blocks_of(model)
    assert KNOWN in model.__dict__
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert KNOWN not in (tmp_path / "config.json").read_text()


class Widening(nn.Module):
    """Stands for a layer that somebody else put in: an adapter, a quantised weight."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2.0 * self.layer(x)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_that_a_program_does_not_know_are_done_one_by_one(architecture):
    model = model_of(architecture)
    mlp = model.transformer.h[0].mlp if architecture == "gpt2" else model.model.layers[0].mlp
    name = "c_fc" if architecture == "gpt2" else "up_proj"
    before = found(model)[0]
    setattr(mlp, name, Widening(getattr(mlp, name)).eval())
    assert blocks_of(model).program is None
    assert not torch.equal(found(model)[0], before)


@native
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_a_minibatch_lie_where_those_of_the_one_before_lay(architecture, monkeypatch):
    monkeypatch.setattr(memory, "LARGE", 1)
    new, made = memory.output, []
    monkeypatch.setattr(memory, "output", lambda *what: made.append(what) or new(*what))
    model = model_of(architecture)
    with memory.reused():
        for number in range(3):
            blocks, packed = blocks_of(model), pack(IDS, MASK, 3)
            hidden = hidden_states(blocks, packed, packed.predicting_M)
            response_logprobs(blocks, packed, hidden, 1.0)[0].sum().backward()
            model.zero_grad(set_to_none=True)
            if number == 0:
                assert len(made) == len(blocks.program.parameters) + 1  # and the head
                made.clear()
    assert made == []


def test_a_second_derivative_of_the_embeddings_is_refused():
    model = model_of("gpt2")  # whose head has the same weight
    weight = model.get_input_embeddings().weight
    x_ND = blocks_of(model).embed(torch.tensor([3, 4]), torch.tensor([0, 1]))
    (gradient,) = torch.autograd.grad(x_ND.sum(), weight, create_graph=True)
    assert gradient.sum() == 2 * weight.shape[1]
    with pytest.raises(RuntimeError, match="_EmbedAndPass has no second derivative"):
        (gradient * weight).sum().backward()
