"""Real transformers for an enumerated world: a few hundred float64 weights behind the same forward pass as any other.

They share weights between prefixes, which a table does not, and have attention, positions and a cache of their own.
"""

from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf_core.config import ModelConfig
from rlhf_core.data.tokenization import word_tokenizer
from rlhf_core.policy import build_model
from rlhf_core.testing.world import World

ARCHITECTURES = ("llama", "gpt2")


def tiny_transformer(
    world: World, architecture: Literal["llama", "gpt2"] = "llama", *, seed: int = 0, scale: float = 0.5
) -> PreTrainedModel:
    """Return a transformer of one layer in float64 over a world's vocabulary, built by ``rlhf_core.policy``.

    Args:
        world: gives vocabulary and longest sequence.
        architecture: ``llama`` or ``gpt2``.
        seed: of the weights.
        scale: deviation of the matrices, wide enough that its distributions are far from uniform.

    Raises:
        ValueError: the world's special tokens are not the tokenizer's.
    """
    if (world.eos_id, world.pad_id) != (0, 1) or world.vocabulary < 3:
        raise ValueError("a transformer's world has eos_id 0, pad_id 1 and at least 3 tokens, as its tokenizer has")
    longest = max(map(len, world.prompts)) + world.length
    tokenizer = word_tokenizer([f"token{index}" for index in range(3, world.vocabulary)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Llama's eager attention takes its softmax in float32; sdpa stays in float64.
        shape = ModelConfig(
            architecture=architecture, layers=1, hidden_size=8, heads=2, context=longest, attention="sdpa"
        )
        model = build_model(shape, tokenizer)
        _use_own_norms(model)
        model.double()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, scale)
    return model.eval()


def _use_own_norms(model: PreTrainedModel) -> None:
    """Put torch's RMS norm in place of Llama's, which computes in float32 whatever the model's dtype."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            norm = nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon)
            model.set_submodule(path, norm)
