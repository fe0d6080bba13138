"""The rows of a step that samples.jsonl and timings.jsonl keep."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_core.metrics import rounded
from rlhf_core.ppo import StepResult
from rlhf_core.profiling import peak_memory_bytes
from rlhf_core.reward import decode


def sample_rows(
    step: int,
    result: StepResult,
    tokenizer: PreTrainedTokenizerBase,
    most: int,
    parts: Mapping[str, torch.Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of samples.jsonl: the first rollouts of a step, ``most`` of them where there are so many.

    ``parts`` are the [B] unweighted scores that a weighted sum of rewards is made of, by name.
    """
    rollout = result.rollout
    shown = range(min(most, len(result.rewards_B)))
    whole, responses = rollout.token_ids(), rollout.response_token_ids()
    return [
        {
            "step": step,
            "sample": row,
            "prompt": decode(tokenizer, [whole[row][: -len(responses[row])]])[0],
            "completion": decode(tokenizer, [responses[row]])[0],
            "token_ids": responses[row],
            "reward": rounded(result.rewards_B[row].item()),
            "kl": rounded(result.kl_B[row].item()),
            **({"rewards": {name: rounded(part_B[row].item()) for name, part_B in parts.items()}} if parts else {}),
        }
        for row in shown
    ]


def timing_row(step: int, result: StepResult) -> dict[str, Any]:
    """Return the row of timings.jsonl: nothing in it can be reproduced, which is why it has a file of its own."""
    seconds = result.clock.total()
    return {
        "step": step,
        "step_time_s": seconds,
        "stages_s": result.clock.seconds,
        "tokens_per_second": result.metrics["response_tokens"] / seconds,
        "peak_mem_bytes": peak_memory_bytes(),
    }
