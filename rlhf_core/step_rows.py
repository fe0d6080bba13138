"""The rows of a step that samples.jsonl and timings.jsonl keep."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_core.metrics import rounded
from rlhf_core.ppo import StepResult
from rlhf_core.profiler import Profiler
from rlhf_core.profiling import StageClock, peak_memory_bytes
from rlhf_core.reward import decode


def sample_rows(
    step: int,
    result: StepResult,
    tokenizer: PreTrainedTokenizerBase,
    most: int,
    parts: Mapping[str, torch.Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of samples.jsonl: the first rollouts of a step, ``most`` of them where there are so many.

    ``tokens``, ``logprobs`` and ``ref_logprobs`` go with ``token_ids``: each token's text, the policy's log-prob of it
    when it was drawn and the reference's, so that Σ (logprobs − ref_logprobs) is ``kl``. ``parts`` are the [B]
    unweighted scores that a weighted sum of rewards is made of, by name.
    """
    rollout, scores = result.rollout, result.scores
    mask_BT = rollout.response_mask_BT.cpu()
    logprobs_BT, ref_logprobs_BT = scores.logprobs_BT.cpu(), scores.ref_logprobs_BT.cpu()
    shown = range(min(most, len(result.rewards_B)))
    whole, responses = rollout.token_ids(), rollout.response_token_ids()
    return [
        {
            "step": step,
            "sample": row,
            "prompt": decode(tokenizer, [whole[row][: -len(responses[row])]])[0],
            "completion": decode(tokenizer, [responses[row]])[0],
            "token_ids": responses[row],
            "tokens": [str(tokenizer.decode([token])) for token in responses[row]],
            "logprobs": [rounded(value) for value in logprobs_BT[row][mask_BT[row]].tolist()],
            "ref_logprobs": [rounded(value) for value in ref_logprobs_BT[row][mask_BT[row]].tolist()],
            "reward": rounded(result.rewards_B[row].item()),
            "kl": rounded(result.kl_B[row].item()),
            **({"rewards": {name: rounded(part_B[row].item()) for name, part_B in parts.items()}} if parts else {}),
        }
        for row in shown
    ]


def timing_row(clock: StageClock, profiler: Profiler | None = None) -> dict[str, Any]:
    """Return the row of timings.jsonl: nothing in it can be reproduced, which is why it has a file of its own.

    ``profiled_from`` is the first step of the profile that the step belongs to.
    """
    row = {
        "step": clock.step,
        "step_time_s": clock.wall.seconds,
        "stages_s": clock.stage_seconds(),
        "tokens_per_second": clock.wall.arguments["tokens"] / clock.wall.seconds,
        "peak_mem_bytes": peak_memory_bytes() if profiler is None else profiler.peak_memory_bytes(),
    }
    return row if profiler is None else row | {"profiled_from": profiler.first_step}
