import copy

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_lm
from transformers.activations import ACT2FN

from rlhf_core import packing
from rlhf_core.layers import exchange_layers
from rlhf_core.packing import hidden_states, pack, packable, response_logprobs

IDS = torch.tensor([[9, 1, 2, 3, 4], [5, 6, 7, 9, 9], [1, 2, 3, 4, 5]])
MASK = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
"""Prompts of one, two and two tokens; responses of three, one and three."""


def test_only_real_tokens_are_kept_and_know_their_places():
    packed = pack(IDS, MASK, 3)
    assert packed.ids_N.tolist() == [1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5]
    assert packed.positions_N.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]
    assert packed.starts.tolist() == [0, 4, 7, 12]
    assert packed.places_N.tolist() == [0, 1, 2, 3, 5, 6, 7, 10, 11, 12, 13, 14]
    assert packed.labels_M.tolist() == [2, 3, 4, 7, 3, 4, 5]
    assert packed.ids_N[packed.predicting_M].tolist() == [1, 2, 3, 6, 2, 3, 4]
    assert packed.on_responses(torch.arange(1.0, 8.0)).tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 7]]


def test_rows_without_padding_need_no_places():
    assert pack(IDS, torch.ones_like(MASK), 3).places_N is None


@pytest.mark.parametrize("mask", [MASK, torch.ones_like(MASK)], ids=["padded", "full"])
def test_laying_out_by_rows_and_back_changes_nothing(mask):
    packed = pack(IDS, mask, 3)
    x = torch.randn(len(packed.ids_N), 2, 4)
    assert torch.equal(packed.side_by_side(packed.by_rows(x)), x.reshape(len(x), -1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probs_are_those_of_each_row_alone_in_float64(architecture):
    model = tiny_lm(architecture, seed=4)
    blocks, packed = packable(model), pack(IDS, MASK, 3)
    with torch.no_grad():
        logprobs, entropies = response_logprobs(blocks, packed, hidden_states(blocks, packed, packed.predicting_M), 0.7)
    exact = tiny_lm(architecture, seed=4).double()
    for row, (ids, mask) in enumerate(zip(IDS, MASK.bool(), strict=True)):
        alone = ids[mask]
        count = int(mask[-3:].sum())
        with torch.no_grad():
            wanted = torch.log_softmax(exact(alone[None]).logits[0, -count - 1 : -1] / 0.7, dim=-1)
        taken = wanted.gather(1, alone[-count:, None])[:, 0]
        torch.testing.assert_close(logprobs[row, :count].double(), taken, rtol=0, atol=2e-6)
        torch.testing.assert_close(entropies[row, :count].double(), -(wanted.exp() * wanted).sum(1), rtol=0, atol=2e-6)
        assert logprobs[row, count:].tolist() == [0.0] * (3 - count)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float64_goes_through_torchs_attention_to_the_same_log_probs(architecture):
    narrow, wide = tiny_lm(architecture, seed=4), tiny_lm(architecture, seed=4).double()
    found = []
    for model in (narrow, wide):
        blocks, packed = packable(model), pack(IDS, MASK, 3)
        logprobs, _ = response_logprobs(blocks, packed, hidden_states(blocks, packed, packed.predicting_M), 0.7)
        (gradient,) = torch.autograd.grad(logprobs.sum(), [model.base_model.get_input_embeddings().weight])
        found.append((logprobs.detach().double(), gradient.double()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_what_stands_in_padding_is_never_read():
    garbage = torch.where(MASK.bool(), IDS, 10**9)
    one, other = pack(IDS, MASK, 3), pack(garbage, MASK, 3)
    assert torch.equal(one.ids_N, other.ids_N)
    assert torch.equal(one.labels_M, other.labels_M)


def test_tied_embeddings_get_the_gradient_that_the_whole_model_has():
    packed_model, whole = tiny_lm("gpt2", seed=4), tiny_lm("gpt2", seed=4)
    full = torch.ones_like(MASK)
    packed = pack(IDS, full, 3)
    blocks = packable(packed_model)
    logprobs, _ = response_logprobs(blocks, packed, hidden_states(blocks, packed, packed.predicting_M), 1.0)
    (gradient,) = torch.autograd.grad(logprobs.sum(), [packed_model.lm_head.weight])
    wanted = torch.log_softmax(whole(IDS).logits[:, -4:-1], dim=-1).gather(2, IDS[:, -3:, None])
    (expected,) = torch.autograd.grad(wanted.sum(), [whole.lm_head.weight])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_tied_embeddings_alone_leaves_out_the_padding_token():
    model = tiny_lm("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    padding = model.model.embed_tokens.padding_idx = 3
    blocks = packable(model)
    ids = torch.tensor([3, 4, 4, 5])
    x_ND = blocks.embed(ids, torch.arange(4))
    (gradient,) = torch.autograd.grad(x_ND.sum(), [model.lm_head.weight])
    counts = torch.bincount(ids, minlength=len(gradient)).float()
    counts[padding] = 0.0
    assert torch.equal(gradient, counts[:, None].expand_as(gradient))


def test_a_trunk_without_a_head_has_no_weight_of_one():
    blocks = packable(tiny_lm("gpt2").base_model)
    with pytest.raises(TypeError, match="no language model head"):
        blocks.head_weight()


def test_models_in_training_mode_hooked_into_or_under_portable_numerics_go_their_own_way(monkeypatch):
    assert packable(tiny_lm("gpt2").train()) is None
    hooked = tiny_lm("llama")
    hooked.model.layers[0].register_forward_hook(lambda *_: None)
    assert packable(hooked) is None
    monkeypatch.setattr(packing, "is_portable", lambda: True)
    assert packable(tiny_lm("gpt2")) is None


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "silu"])
def test_every_matrix_has_the_gradient_of_transformers_own_forward_after_sampling(activation):
    """Blocks are remembered from the rollout, where no gradient is kept."""
    model = tiny_lm("gpt2", seed=4)
    for block in model.transformer.h:
        block.mlp.act = ACT2FN[activation].eval()
    exact, packed = copy.deepcopy(model).double(), pack(IDS, torch.ones_like(MASK), 3)
    exchange_layers(model)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            blocks = packable(model)
            hidden_MD = hidden_states(blocks, packed, packed.predicting_M)
            logprobs, _ = response_logprobs(blocks, packed, hidden_MD, 1.0)
    logits = exact(IDS).logits[:, 1:-1].log_softmax(-1)
    expected = logits.gather(-1, IDS[:, 2:, None])[..., 0]
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(logprobs.square().sum(), parameters.values(), allow_unused=True)
    wanted = torch.autograd.grad(expected.square().sum(), [exact.get_parameter(name) for name in parameters])
    for name, one, other in zip(parameters, found, wanted, strict=True):
        assert one is not None, name
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5, msg=name)
