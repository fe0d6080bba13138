"""Real transformers for an enumerated world: a few hundred float64 weights behind the same forward pass as any other.

They share weights between prefixes, which a table does not, and have attention, positions and a cache of their own.
"""

import torch
from transformers import PreTrainedModel

from rlhf_core.config import ModelConfig
from rlhf_core.data import word_tokenizer
from rlhf_core.policy import build_model
from rlhf_core.testing.world import World

ARCHITECTURES = ("llama", "gpt2")


def tiny_transformer(world: World, architecture: str = "llama", *, seed: int = 0, scale: float = 0.5) -> PreTrainedModel:
    """Return a transformer of one layer in float64 over a world's vocabulary, built by ``rlhf_core.policy``.

    Args:
        world: gives vocabulary and longest sequence.
        architecture: ``llama`` or ``gpt2``.
        seed: of the weights.
        scale: deviation of the matrices, wide enough that its distributions are far from uniform.
    """
    longest = max(map(len, world.prompts)) + world.length
    tokenizer = _tokenizer_of(world)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = ModelConfig(architecture=architecture, layers=1, hidden_size=8, heads=2, context=longest)  # type: ignore[arg-type]
        model = build_model(shape, tokenizer).double()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, scale)
    return model.eval()
