"""The rows of a step that samples.jsonl keeps."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_core.metrics import rounded
from rlhf_core.ppo import StepResult
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
