"""Drawing completions from a policy, token by token over a key-value cache.

Shape suffixes: B sequences, P prompt positions, T response positions, L = P + T.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from rlhf_core.config import SamplingConfig
from rlhf_core.decoding import decoder_for, threads_for_decoding
from rlhf_core.policy import context_length
from rlhf_core.seeding import UniformSource
from rlhf_kernels import sample_tokens


@dataclass(frozen=True)
class Rollout:
    """Prompts with the completions drawn for them."""

    input_ids_BL: torch.Tensor
    """Left-padded prompts followed by right-padded responses."""
    attention_mask_BL: torch.Tensor
    """1 on real tokens, int64."""
    response_mask_BT: torch.Tensor
    """True on tokens that the policy drew, the end-of-sequence token included."""
    sampler_logprobs_BT: torch.Tensor
    """log π of the drawn tokens as the sampler saw it, at the sampling temperature and before top-k and top-p."""
    ended_B: torch.Tensor
    """True where the response ends with the end-of-sequence token."""

    @property
    def response_length(self) -> int:
        """T."""
        return self.response_mask_BT.shape[1]

    @property
    def response_ids_BT(self) -> torch.Tensor:
        """The drawn tokens, padding behind them."""
        return self.input_ids_BL[:, -self.response_length :]

    def token_ids(self) -> list[list[int]]:
        """Return prompt and response tokens of each row, without padding."""
        ids, mask = self.input_ids_BL.cpu(), self.attention_mask_BL.cpu().bool()
        return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]

    def response_token_ids(self) -> list[list[int]]:
        """Return the response tokens of each row, without padding."""
        ids, mask = self.response_ids_BT.cpu(), self.response_mask_BT.cpu()
        return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [B, P] ids and attention mask of prompts of unequal length, padded on the left.

    Raises:
        ValueError: there is no prompt, or one is empty.
    """
    if not prompts:
        raise ValueError("no prompts; give at least one")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty; a prompt has at least one token")
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def check_context(model: PreTrainedModel, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise ValueError when a prompt and its response do not fit into the model's context."""
    check_prompts(context_length(model), prompt_ids, max_new_tokens)


def check_prompts(limit: int | None, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise ValueError when a prompt and its response do not fit into a context of ``limit`` tokens."""
    longest = max(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]))
    length = len(prompt_ids[longest])
    if limit is not None and length + max_new_tokens > limit:
        raise ValueError(
            f"prompt {longest} has {length} tokens and max_new_tokens is {max_new_tokens}, together more than the "
            f"model's context of {limit}; shorten the prompts or lower --sampling.max-new-tokens"
        )


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    uniforms: UniformSource,
    config: SamplingConfig,
    *,
    eos_id: int,
    pad_id: int,
) -> Rollout:
    """Draw one completion for each prompt.

    Each token is the inverse of the policy's cumulative distribution at that row's uniform, so the source of uniforms
    alone decides the completions. What has ended leaves the batch, a quarter of it or more at a time, and is filled
    with padding.

    Args:
        model: a causal language model, in evaluation mode.
        prompt_ids: the prompts' tokens, of unequal length.
        uniforms: :class:`~rlhf_core.seeding.CounterUniforms` or :class:`~rlhf_core.seeding.GeneratorUniforms`.
        config: temperature, top-k, top-p and the longest response.
        eos_id: the token that ends a response and belongs to it.
        pad_id: what fills the rest.

    Raises:
        ValueError: a prompt is empty, or with its response exceeds the model's context.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout would draw random numbers; call model.eval()")
    prompts_BP, attention_BP = left_pad(prompt_ids, pad_id)
    check_context(model, prompt_ids, config.max_new_tokens)
    device = next(model.parameters()).device
    ids_BP, attention_BP = prompts_BP.to(device), attention_BP.to(device)
    rows, length = len(prompt_ids), config.max_new_tokens
    tokens_BT = torch.full((rows, length), pad_id, device=device)
    logprobs_BT = torch.zeros(rows, length, dtype=torch.float64, device=device)
    batch = torch.arange(rows, device=device)  # the rows that the decoder goes on with, some of them ended already
    going = torch.ones(rows, dtype=torch.bool, device=device)
    decoder = decoder_for(model, length)
    logits = decoder.read_prompts(ids_BP, attention_BP)
    with threads_for_decoding(model, rows):
        for position in range(length):
            drawn = sample_tokens(
                logits,
                uniforms.uniforms(position).to(device)[batch],
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
            )
            tokens_BT[batch, position] = drawn.ids
            logprobs_BT[batch, position] = drawn.logprobs.double()
            going, next_ids = going & (drawn.ids != eos_id), drawn.ids
            left = int(going.sum())
            if position + 1 == length or left == 0:
                break
            if left <= 0.75 * len(batch):
                kept = going.nonzero()[:, 0]
                batch, going, next_ids = batch[kept], going[kept], next_ids[kept]
                decoder.keep(kept)
            logits = decoder.read_tokens(next_ids)
    tokens_BT, logprobs_BT = tokens_BT[:, : position + 1], logprobs_BT[:, : position + 1].to(drawn.logprobs.dtype)
    ends_BT = tokens_BT == eos_id
    mask_BT = ends_BT.cumsum(dim=1) - ends_BT.long() == 0  # nothing before it ends the response
    tokens_BT = torch.where(mask_BT, tokens_BT, pad_id)
    return Rollout(
        input_ids_BL=torch.cat([ids_BP, tokens_BT], dim=1),
        attention_mask_BL=torch.cat([attention_BP, mask_BT.long()], dim=1),
        response_mask_BT=mask_BT,
        sampler_logprobs_BT=torch.where(mask_BT, logprobs_BT, 0.0),
        ended_B=(mask_BT & (tokens_BT == eos_id)).any(dim=1),
    )
