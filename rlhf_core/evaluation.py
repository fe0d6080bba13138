"""Judging a policy on held-out prompts, before training and after."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy
import torch
from transformers import PreTrainedModel

from rlhf_core.config import SamplingConfig
from rlhf_core.policy import ForwardArguments, Reference, autocast, response_logits
from rlhf_core.reward import Reward
from rlhf_core.rollout import Rollout, sample
from rlhf_core.scoring import response_scores
from rlhf_core.seeding import CounterUniforms, UniformSource

CONFIDENCE = 0.95
RESAMPLES = 10_000
PROMPTS_AT_A_TIME = 64


@dataclass(frozen=True)
class Evaluation:
    """What a policy did on the held-out prompts."""

    rewards: dict[str, np.ndarray]
    """[N] scores by the reward's name."""
    kl: np.ndarray
    """[N] Σ_t log π − log π_ref of each completion, nats."""
    entropy: float
    """Mean over response tokens, nats."""
    distinct_bigrams: float
    """Distinct bigrams over all bigrams of all completions."""
    distinct_completions: float
    """Share of completions that are different from all before."""
    eos_rate: float
    """Share of completions that ended."""
    response_ids: list[list[int]]


@dataclass(frozen=True)
class Drawn:
    """Completions, and what policy and reference say of them; [B, T], 0 where there is no response token."""

    rollout: Rollout
    log_ratios_BT: torch.Tensor
    """log π − log π_ref of each token; 0 without a reference."""
    entropies_BT: torch.Tensor


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: np.ndarray, seed: int) -> Interval:
    """Return the mean and its 95% interval (Efron's BCa where it exists, else the mean itself).

    Values that are all equal have no spread: the interval is the point.
    """
    mean = float(values.mean())
    if len(values) < 2 or np.ptp(values) == 0:
        return Interval(mean, mean, mean)
    result = scipy.stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        rng=np.random.Generator(np.random.PCG64(seed)),
    )
    return Interval(mean, float(result.confidence_interval.low), float(result.confidence_interval.high))


@torch.no_grad()
def draw_and_score(
    lm: PreTrainedModel,
    reference: Reference | None,
    prompt_ids: Sequence[Sequence[int]],
    uniforms: UniformSource,
    config: SamplingConfig,
    *,
    dtype: str,
    eos_id: int,
    pad_id: int,
) -> Drawn:
    """Draw a completion for each prompt, and score it without holding logits where the models allow that.

    Args:
        lm: the policy's language model.
        reference: what the KL is taken against, if anything.
        prompt_ids: the prompts.
        uniforms: what decides each token.
        config: how completions are drawn.
        dtype: as in training.
        eos_id: ends a response.
        pad_id: fills the rest.
    """
    logits_of = partial(response_logits, lm, ForwardArguments(lm))
    with autocast(next(lm.parameters()).device, dtype):
        rollout = sample(lm, prompt_ids, uniforms, config, eos_id=eos_id, pad_id=pad_id)
        rows = (rollout.input_ids_BL, rollout.attention_mask_BL, rollout.response_length, config.temperature)
        logprobs_BT, entropies_BT = response_scores(lm, logits_of, *rows)
        ref_logprobs_BT = logprobs_BT if reference is None else response_scores(reference.lm, reference, *rows)[0]
    mask_BT = rollout.response_mask_BT
    log_ratios_BT = torch.where(mask_BT, logprobs_BT - ref_logprobs_BT, 0.0)
    return Drawn(rollout, log_ratios_BT, torch.where(mask_BT, entropies_BT, 0.0))


@torch.no_grad()
def evaluate(
    lm: PreTrainedModel,
    reference: Reference,
    prompt_ids: Sequence[Sequence[int]],
    rewards: Mapping[str, Reward],
    config: SamplingConfig,
    *,
    seed: int,
    dtype: str,
    eos_id: int,
    pad_id: int,
    batch_size: int = PROMPTS_AT_A_TIME,
    advance: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Draw a completion for each prompt and judge it.

    The uniforms belong to (seed, prompt), so two policies are compared on the same luck.

    Args:
        lm: the policy's language model.
        reference: what the KL is taken against.
        prompt_ids: the prompts.
        rewards: judges by name.
        config: how completions are drawn.
        seed: the run's seed.
        dtype: as in training.
        eos_id: ends a response.
        pad_id: fills the rest.
        batch_size: prompts at a time.
        advance: hears of prompts done.
    """
    scores: dict[str, list[torch.Tensor]] = {name: [] for name in rewards}
    kls, entropies, response_ids, ended = [], [], [], []
    for start in range(0, len(prompt_ids), batch_size):
        prompts = prompt_ids[start : start + batch_size]
        numbers = np.arange(start, start + len(prompts))
        uniforms = CounterUniforms(seed, "evaluation", 0, numbers, config.max_new_tokens)
        drawn = draw_and_score(lm, reference, prompts, uniforms, config, dtype=dtype, eos_id=eos_id, pad_id=pad_id)
        rollout = drawn.rollout
        kls.append(drawn.log_ratios_BT.sum(dim=1))
        entropies.append(drawn.entropies_BT[rollout.response_mask_BT])
        response_ids += rollout.response_token_ids()
        ended.append(rollout.ended_B)
        for name, reward in rewards.items():
            scores[name].append(reward(rollout))
        advance(len(prompts))
    return Evaluation(
        rewards={name: torch.cat(parts).double().cpu().numpy() for name, parts in scores.items()},
        kl=torch.cat(kls).double().cpu().numpy(),
        entropy=float(torch.cat(entropies).double().mean()),
        distinct_bigrams=distinct_bigrams(response_ids),
        distinct_completions=len({tuple(ids) for ids in response_ids}) / len(response_ids),
        eos_rate=float(torch.cat(ended).double().mean()),
        response_ids=response_ids,
    )


def distinct_bigrams(rows: Sequence[Sequence[int]]) -> float:
    """Return the share of distinct bigrams among all bigrams of all rows (distinct-2; Li et al., 2016); 1 for none."""
    bigrams = [pair for row in rows for pair in itertools.pairwise(row)]
    return len(set(bigrams)) / len(bigrams) if bigrams else 1.0
