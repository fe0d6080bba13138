"""The log-prob with which a token is drawn is the one that training computes for it: no bit differs."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_core.config import SamplingConfig
from rlhf_core.policy import as_computed_here, autocast
from rlhf_core.rollout import sample
from rlhf_core.scoring import response_scores
from rlhf_core.seeding import CounterUniforms

EOS, PAD = 1, 2
SHAPES = {
    "gpt2": {"model_type": "gpt2", "n_embd": 96, "n_layer": 2, "n_head": 3, "n_positions": 128},
    "llama": {
        "model_type": "llama", "hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128,
    },
    "llama, tied": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 96, "tie_word_embeddings": True,
    },
}  # fmt: skip


def language_model(shape, vocabulary):
    special = {"bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": PAD}
    config = AutoConfig.for_model(**SHAPES[shape], vocab_size=vocabulary, initializer_range=0.2, **special)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    return as_computed_here(model.eval())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocabulary", [258, 5003])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampled_log_probs_are_those_of_training_to_the_bit(shape, vocabulary, threads, dtype):
    model, draw = language_model(shape, vocabulary), np.random.default_rng(0)
    prompts = [draw.integers(3, vocabulary, size=int(length)).tolist() for length in draw.integers(1, 30, size=13)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad(), autocast(torch.device("cpu"), dtype):
            uniforms = CounterUniforms(0, "rollout", 1, np.arange(len(prompts)), 40)
            sampling = SamplingConfig(max_new_tokens=40, temperature=0.8)
            rollout = sample(model, prompts, uniforms, sampling, eos_id=EOS, pad_id=PAD)
            mask = rollout.response_mask_BT
            assert (
                len(set(mask.sum(dim=1).tolist())) > 1 or vocabulary == 5003
            )  # some rows left the batch before others
            for rows in (torch.arange(13), torch.tensor([7, 3]), torch.tensor([12])):
                tensors = rollout.input_ids_BL[rows], rollout.attention_mask_BL[rows], rollout.response_length
                logprobs, _ = response_scores(model, None, *tensors, temperature=0.8)
                off = torch.where(mask[rows], logprobs - rollout.sampler_logprobs_BT[rows], 0.0)
                assert off.abs().max().item() == 0.0
    finally:
        torch.set_num_threads(before)
