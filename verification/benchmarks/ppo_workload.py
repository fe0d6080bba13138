"""One workload that any PPO trainer can run: GPT-2 shapes S and M, 32 prompts of 32 tokens a step, 48 new tokens each.

Four epochs of minibatches of 8 (16 optimizer steps), AdamW at 1e-5, a separate value model, no end of sequence.
"""

import random
from dataclasses import dataclass
from typing import Any

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, BATCH, MINIBATCH, EPOCHS, RATE = 64, 32, 48, 32, 8, 4, 1e-5
EOS, PAD = 256, 257


@dataclass(frozen=True)
class Shape:
    """A GPT-2 shape."""

    layers: int
    heads: int
    width: int
    vocabulary: int

    @property
    def block_weights(self) -> int:
        """Weights of the matrices of all blocks."""
        return 12 * self.width**2 * self.layers

    def configuration(self, context: int = 256) -> Any:
        """Return the model's configuration."""
        from transformers import GPT2Config

        return GPT2Config(
            n_layer=self.layers, n_head=self.heads, n_embd=self.width, vocab_size=self.vocabulary, n_positions=context,
            eos_token_id=EOS, bos_token_id=EOS, pad_token_id=PAD, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip


SHAPES = {"S": Shape(2, 4, 128, 258), "M": Shape(6, 6, 384, 50257)}


def prompts(count: int = PROMPTS) -> list[list[int]]:
    """Return the prompts as bytes."""
    draw = random.Random(0)
    return [[ord(draw.choice("abcdefghijklmnopqrstuvwxyz ")) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def operations(shape: Shape, new_tokens: int = NEW_TOKENS, batch: int = BATCH) -> dict[str, float]:
    """Return the floating-point operations of a step's matrix products that cannot be left out, by stage.

    A product of [M, K] and [K, N] counts 2 M K N; a backward pass counts twice its forward. Attention counts the causal
    half. The head sees only tokens that predict a response, and of the others the last block of policy and value model
    makes keys and values alone.
    """
    tokens = PROMPT_TOKENS + new_tokens
    attention = 2 * tokens**2 * shape.width  # of scores and mixing, half of each
    block = 2 * tokens * shape.block_weights // shape.layers + attention
    trunk = shape.layers * block - 2 * PROMPT_TOKENS * (10 * shape.width**2 + PROMPT_TOKENS * shape.width)
    head = 2 * new_tokens * shape.vocabulary * shape.width
    return {
        "rollout": batch * (trunk + head),
        "reference_and_value": batch * (3 * trunk + 2 * head),
        "update": EPOCHS * batch * 3 * (2 * trunk + head),
    }
