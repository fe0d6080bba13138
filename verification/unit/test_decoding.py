import pytest
import torch
from tiny_models import ARCHITECTURES, EOS, PAD, PROMPTS, tiny_lm

from rlhf_core import decoding
from rlhf_core.config import SamplingConfig
from rlhf_core.decoding import (
    BlockDecoder,
    ModelDecoder,
    RowDecoder,
    blocks_of,
    decoder_for,
    threads_for_decoding,
)
from rlhf_core.layers import exchange_layers
from rlhf_core.rollout import left_pad, sample
from rlhf_kernels.products import available


def language_model(architecture):
    model = tiny_lm(architecture)
    exchange_layers(model)
    return model


def decoded(decoder, steps, keep=None):
    """The logits of each step; the tokens read do not depend on them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        found = [decoder.read_prompts(*left_pad(PROMPTS, PAD)).clone()]
        rows = len(PROMPTS)
        for step in range(steps):
            ids = torch.randint(2, 11, (len(PROMPTS),), generator=generator)[:rows]
            if keep is not None and step == 1:
                decoder.keep(keep)
                rows, ids = len(keep), ids[: len(keep)]
            found.append(decoder.read_tokens(ids).clone())
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("keep", [None, [6, 0, 3]])
@pytest.mark.parametrize("kind", [BlockDecoder, RowDecoder])
def test_block_by_block_gives_the_logits_of_the_models_own_forward(architecture, keep, kind):
    model = language_model(architecture)
    blocks, kept = blocks_of(model), None if keep is None else torch.tensor(keep)
    ours = decoded(kind(model, blocks, 5), 5, kept)
    theirs = decoded(ModelDecoder(model), 5, kept)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", [RowDecoder, BlockDecoder, ModelDecoder])
def test_the_logits_are_those_of_one_pass_over_the_whole_sequence(architecture, kind):
    model = language_model(architecture)
    decoder = ModelDecoder(model) if kind is ModelDecoder else kind(model, blocks_of(model), 4)
    with torch.no_grad():
        decoder.read_prompts(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.int64))
        for token in (8, 2, 9):
            last = decoder.read_tokens(torch.tensor([token]))
        whole = model(input_ids=torch.tensor([[5, 6, 7, 8, 2, 9]])).logits[:, -1]
    torch.testing.assert_close(last, whole, rtol=1e-5, atol=2e-5)


@pytest.mark.skipif(not available(), reason="no native products on this processor")
def test_each_step_writes_its_logits_where_the_last_one_did():
    decoder, places = decoder_for(language_model("gpt2"), 4), []
    assert isinstance(decoder, RowDecoder)
    with torch.no_grad():
        places.append(decoder.read_prompts(*left_pad(PROMPTS, PAD)).data_ptr())
        for step in range(2):
            places.append(decoder.read_tokens(torch.full((len(PROMPTS),), step)).data_ptr())
        decoder.keep(torch.tensor([1]))
        places.append(decoder.read_tokens(torch.tensor([2])).data_ptr())
    assert len(set(places)) == 1


def test_a_model_that_is_neither_is_decoded_by_its_own_forward():
    model = language_model("gpt2")
    assert isinstance(decoder_for(model, 3), RowDecoder)
    model.config.reorder_and_upcast_attn = True
    assert isinstance(decoder_for(model, 3), ModelDecoder)
    model.config.reorder_and_upcast_attn = False

    class Another(type(model)):
        pass

    model.__class__ = Another
    assert isinstance(decoder_for(model, 3), ModelDecoder)


def test_having_asked_for_hidden_states_once_changes_nothing():
    model = language_model("gpt2")
    model(input_ids=torch.tensor([[2, 3]]), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    assert isinstance(decoder_for(model, 3), RowDecoder)


def test_hooks_on_a_model_are_not_passed_by():
    model = language_model("llama")
    heard = []
    model.register_forward_hook(lambda module, args, output: heard.append(module))
    sample(model, PROMPTS, Same([0.5] * 3, len(PROMPTS)), SamplingConfig(max_new_tokens=3), eos_id=-1, pad_id=PAD)
    assert len(heard) == 3


def test_portable_numerics_decode_by_the_models_own_forward(monkeypatch):
    monkeypatch.setattr(decoding, "is_portable", lambda: True)
    assert isinstance(decoder_for(language_model("llama"), 3), ModelDecoder)


class Same:
    """Every row draws the same uniform at a position."""

    def __init__(self, values, rows):
        self._values, self._rows = values, rows

    def uniforms(self, position):
        return torch.full((self._rows,), self._values[position], dtype=torch.float64)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_completion_does_not_depend_on_the_rows_that_leave_the_batch(architecture):
    model = language_model(architecture)
    generator = torch.Generator().manual_seed(2)
    values = torch.rand(12, generator=generator).tolist()
    options = SamplingConfig(max_new_tokens=12)
    together = sample(model, PROMPTS, Same(values, len(PROMPTS)), options, eos_id=EOS, pad_id=PAD)
    lengths = together.response_mask_BT.sum(dim=1)
    assert len(set(lengths.tolist())) > 1  # rows did leave at different times
    for row, prompt in enumerate(PROMPTS):
        alone = sample(model, [prompt], Same(values, 1), options, eos_id=EOS, pad_id=PAD)
        length = int(lengths[row])
        assert alone.response_token_ids()[0] == together.response_token_ids()[row]
        torch.testing.assert_close(
            alone.sampler_logprobs_BT[0, :length], together.sampler_logprobs_BT[row, :length], rtol=0, atol=2e-6
        )


def test_small_products_are_computed_by_one_thread_and_the_number_is_given_back():
    model, before = language_model("llama"), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads_for_decoding(model, 4):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with threads_for_decoding(model, 2**30):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
