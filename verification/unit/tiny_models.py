"""What the unit tests of the trainer share: models of a few hundred weights, and how to compare bits."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import settings
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf_core.config import PPOConfig, SamplingConfig, TrainConfig
from rlhf_core.policy import ActorCritic, Reference
from rlhf_core.rollout import Rollout, sample
from rlhf_core.seeding import CounterUniforms
from rlhf_core.trainer_state import new_state
from rlhf_core.updates import PPOState

ARCHITECTURES = ("gpt2", "llama")
VALUES = ("shared", "separate")
EOS, PAD = 0, 1
VOCABULARY = 11
PROMPTS = [[5, 6, 7], [8], [9, 2, 3, 4, 10], [2, 2], [7, 3, 9], [10, 4], [3], [6, 5, 4, 3]]

few_examples = settings(max_examples=25)


def tiny_lm(architecture: str, *, vocabulary: int = VOCABULARY, seed: int = 0, context: int = 32, dropout: float = 0.0):
    """A causal language model whose weights are wide enough that its distributions are far from uniform."""
    common = {
        "vocab_size": vocabulary,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
    }
    if architecture == "gpt2":
        shape = AutoConfig.for_model(
            "gpt2", n_embd=8, n_layer=2, n_head=2, n_positions=context,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, **common,
        )  # fmt: skip
    else:
        shape = AutoConfig.for_model(
            "llama", hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=context, attention_dropout=dropout, **common,
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(shape, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def tiny_config(*, dtype: str = "float32", max_new_tokens: int = 6, temperature: float = 1.0, **ppo) -> TrainConfig:
    settings_of_ppo = {"steps": 4, "batch_size": 8, "minibatch_size": 4, "micro_batch_size": 2, "epochs": 2} | ppo
    return TrainConfig(
        seed=3,
        dtype=dtype,
        sampling=SamplingConfig(max_new_tokens=max_new_tokens, temperature=temperature),
        ppo=PPOConfig(**settings_of_ppo),
    )


def tiny_state(
    architecture: str, value: str | None, config: TrainConfig, *, reference_seed: int = 0, **shape
) -> PPOState:
    """A policy with seed 0, its reference, and a value head (where there is one) that is not zero."""
    model = ActorCritic(tiny_lm(architecture, **shape), value)
    if model.value_head is not None:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(17)
            model.value_head.weight.normal_(0.0, 0.3)
            model.value_head.bias.fill_(0.1)
    return new_state(model, Reference(tiny_lm(architecture, **(shape | {"seed": reference_seed}))), config)


def draw(model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: TrainConfig, *, step: int = 1) -> Rollout:
    length = config.sampling.max_new_tokens
    uniforms = CounterUniforms(config.seed, "test", step, np.arange(len(prompts)), length)
    return sample(model, prompts, uniforms, config.sampling, eos_id=EOS, pad_id=PAD)


def rows_of(rollout: Rollout) -> list[tuple[list[int], int]]:
    """Each row without padding, and how many of its tokens are response."""
    counts = rollout.response_mask_BT.sum(dim=1).tolist()
    return list(zip(rollout.token_ids(), counts, strict=True))


def share_of_sevens(rollout: Rollout) -> torch.Tensor:
    """A reward that a policy can learn: the share of sevens, and a little for the length."""
    rows = rollout.response_token_ids()
    return torch.tensor([row.count(7) / len(row) + 0.01 * len(row) for row in rows])


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and bits; a NaN equals the same NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    left, right = (x.detach().contiguous().flatten().numpy().view(np.uint8) for x in (a, b))
    return bool(np.array_equal(left, right))
