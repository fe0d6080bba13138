"""Drawing completions from a policy, token by token over a key-value cache.

Shape suffixes: B sequences, P prompt positions, T response positions, L = P + T.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from rlhf_core.config import SamplingConfig
from rlhf_core.policy import ForwardArguments, context_length
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
    alone decides the completions. Rows that have ended are filled with padding; the loop stops when all have.

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
    ids, attention = prompts_BP.to(device), attention_BP.to(device)
    arguments = ForwardArguments(model)
    cache = DynamicCache(config=model.config)
    alive_B = torch.ones(len(prompt_ids), dtype=torch.bool, device=device)
    tokens, masks, logprobs = [], [], []
    next_input = ids
    for position in range(config.max_new_tokens):
        output = model(
            input_ids=next_input,
            attention_mask=attention,
            past_key_values=cache,
            use_cache=True,
            **arguments.positions(attention, last=next_input.shape[1]),
            **arguments.keep(1),
        )
        drawn = sample_tokens(
            output.logits[:, -1],
            uniforms.uniforms(position).to(device),
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )
        token_B = torch.where(alive_B, drawn.ids, pad_id)
        tokens.append(token_B)
        masks.append(alive_B)
        logprobs.append(torch.where(alive_B, drawn.logprobs, 0.0))
        attention = torch.cat([attention, alive_B[:, None].long()], dim=1)
        alive_B = alive_B & (token_B != eos_id)
        next_input = token_B[:, None]
        if not alive_B.any():
            break
    return Rollout(
        input_ids_BL=torch.cat([ids, torch.stack(tokens, dim=1)], dim=1),
        attention_mask_BL=attention,
        response_mask_BT=torch.stack(masks, dim=1),
        sampler_logprobs_BT=torch.stack(logprobs, dim=1),
        ended_B=~alive_B,
    )
