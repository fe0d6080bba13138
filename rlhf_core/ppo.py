"""Policy optimisation for language models: one step of it, and the loop.

Schulman et al., "Proximal Policy Optimization Algorithms" (2017), with the details of Huang et al., "The N
Implementation Details of RLHF with PPO" (2023). GRPO, RLOO and REINFORCE++ are the same loop with another choice of
advantage, loss mean and KL penalty: :mod:`rlhf_core.algorithms`. Shape suffixes: B sequences, T response positions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from rlhf_core.advantages import adapt_kl_coef, penalize_missing_eos, token_rewards
from rlhf_core.checks.invariants import target_error, tokens_after_end
from rlhf_core.config import PPOConfig, TrainConfig
from rlhf_core.finite import require_finite
from rlhf_core.metrics import rollout_metrics
from rlhf_core.optim import set_learning_rate
from rlhf_core.policy import autocast
from rlhf_core.profiling import StageClock
from rlhf_core.reward import Reward
from rlhf_core.rollout import Rollout, sample
from rlhf_core.scoring import Scores, score_rollout
from rlhf_core.seeding import CounterUniforms
from rlhf_core.targets import make_targets
from rlhf_core.updates import PPOState, plan_epoch, update


@dataclass(frozen=True)
class StepResult:
    """One step's metrics and what its samples are shown from."""

    metrics: dict[str, float]
    rollout: Rollout
    scores: Scores
    rewards_B: torch.Tensor
    kl_B: torch.Tensor
    clock: StageClock


def learning_rate(config: PPOConfig, step: int) -> float:
    """Return the rate of ``step`` (from 1)."""
    return config.learning_rate * (1.0 - (step - 1) / config.steps if config.schedule == "linear" else 1.0)


def ppo_step(
    state: PPOState,
    prompt_ids: list[list[int]],
    reward: Reward,
    config: TrainConfig,
    *,
    eos_id: int,
    pad_id: int,
    clock: StageClock | None = None,
) -> StepResult:
    """Do one step: sample completions, and learn from them.

    Args:
        state: changed in place; ``state.step`` counts up.
        prompt_ids: the step's prompts, ``batch_size / group_size`` of them.
        reward: scores the rollouts.
        config: the whole configuration.
        eos_id: ends a response.
        pad_id: fills the rest.
        clock: takes the time of the stages; by default a new one.

    Raises:
        ValueError: the number of prompts, times the group size, or of scores, is not the batch size.
        NonFiniteError: something is NaN or infinite.
    """
    step, ppo, clock = state.step + 1, config.ppo, clock or StageClock(state.step + 1)
    if len(prompt_ids) != ppo.prompts_per_step:
        raise ValueError(
            f"step {step} has {len(prompt_ids)} prompts; ppo.batch_size is {ppo.batch_size} and ppo.group_size "
            f"{ppo.recipe.group_size}, so it takes {ppo.prompts_per_step}"
        )
    prompt_ids = [prompt for prompt in prompt_ids for _ in range(ppo.recipe.group_size)]

    # 1. Rollout: a group of completions for each prompt, their uniforms keyed by (seed, step, sample, position).
    with clock.stage("rollout"):
        require_finite(step, None, **dict(state.model.named_parameters()))
        length = config.sampling.max_new_tokens
        uniforms = CounterUniforms(config.seed, "rollout", step, np.arange(len(prompt_ids)), length)
        device = next(state.model.parameters()).device
        with autocast(device, config.dtype):
            rollout = sample(state.model.lm, prompt_ids, uniforms, config.sampling, eos_id=eos_id, pad_id=pad_id)
    return learn(state, rollout, reward, config, clock, eos_id=eos_id)


def learn(
    state: PPOState, rollout: Rollout, reward: Reward, config: TrainConfig, clock: StageClock, *, eos_id: int
) -> StepResult:
    """Do what follows the sampling of a step: score, estimate advantages, update.

    Args:
        state: changed in place; ``state.step`` counts up.
        rollout: ``batch_size`` completions, those of a prompt side by side.
        reward: scores them.
        config: the whole configuration.
        clock: of the step.
        eos_id: ends a response.

    Raises:
        ValueError: the number of scores is not that of the completions.
        NonFiniteError: something is NaN or infinite.
    """
    step, ppo, recipe = state.step + 1, config.ppo, config.ppo.recipe
    mask_BT = rollout.response_mask_BT
    lr = learning_rate(ppo, step)
    set_learning_rate(state.optimizer, lr)

    # 2. Reward of the whole text; a response that did not end costs something.
    with clock.stage("reward"):
        rewards_B = reward(rollout).detach().to(rollout.sampler_logprobs_BT.dtype).cpu()
        if rewards_B.shape != rollout.ended_B.shape:
            raise ValueError(f"the reward returned shape {tuple(rewards_B.shape)}; it must be one score a completion")
        require_finite(step, None, reward=rewards_B)
        scores_B = penalize_missing_eos(rewards_B, rollout.ended_B.cpu(), ppo.missing_eos_penalty)

    # 3. Log-probs, values and the reference's log-probs, in the micro-batches of the first epoch.
    with clock.stage("reference_and_value"):
        plan = plan_epoch(ppo, config.seed, step, epoch=0)
        scores = score_rollout(state.model, state.reference, rollout, plan, config.sampling.temperature, config.dtype)
        require_finite(
            step, mask_BT, logprobs=scores.logprobs_BT, values=scores.values_BT, ref_logprobs=scores.ref_logprobs_BT
        )

    # 4. Per-token rewards, with the KL penalty where it is not in the loss; advantages; whitening.
    with clock.stage("advantages"):
        in_reward = recipe.kl_place == "reward"
        rewards_BT = token_rewards(
            scores_B.to(mask_BT.device),
            scores.logprobs_BT,
            scores.ref_logprobs_BT,
            mask_BT,
            kl_coef=state.kl_coef if in_reward else 0.0,
            estimator=recipe.kl_estimator if in_reward else "k1",
        )
        targets, raw_advantages_BT = make_targets(rewards_BT, scores.values_BT, mask_BT, ppo)

    # 5. Epochs of clipped updates over shuffled minibatches.
    with clock.stage("update"):
        update_metrics = update(state, rollout, scores, targets, plan, config, step, clock)

    # 6. Metrics, and the KL coefficient of the next step.
    with clock.stage("metrics"):
        metrics = update_metrics | rollout_metrics(
            rewards=rewards_B.numpy(),
            scores=scores_B.numpy(),
            ended=rollout.ended_B.cpu().numpy(),
            mask=mask_BT.cpu().numpy(),
            logprobs=scores.logprobs_BT.cpu().numpy(),
            ref_logprobs=scores.ref_logprobs_BT.cpu().numpy(),
            sampler_logprobs=rollout.sampler_logprobs_BT.cpu().numpy(),
            entropies=scores.entropies_BT.cpu().numpy(),
            values=None if scores.values_BT is None else scores.values_BT.cpu().numpy(),
            advantages=raw_advantages_BT.cpu().numpy(),
            returns=None if targets.returns_BT is None else targets.returns_BT.cpu().numpy(),
            group_size=recipe.group_size,
            kl_coef=state.kl_coef,
            kl_target=ppo.kl_target,
        )
        metrics["lr"] = lr
        metrics["tokens_after_eos"] = tokens_after_end(
            rollout.response_ids_BT.cpu().numpy(), mask_BT.cpu().numpy(), eos_id
        )
        if recipe.has_closed_form:
            assert scores.values_BT is not None
            assert targets.returns_BT is not None
            metrics["target_error"] = target_error(
                rewards_B=rewards_B.numpy(),
                ended_B=rollout.ended_B.cpu().numpy(),
                missing_eos_penalty=ppo.missing_eos_penalty,
                logprobs_BT=scores.logprobs_BT.cpu().numpy(),
                ref_logprobs_BT=scores.ref_logprobs_BT.cpu().numpy(),
                values_BT=scores.values_BT.cpu().numpy(),
                mask_BT=mask_BT.cpu().numpy(),
                kl_coef=state.kl_coef,
                gamma=ppo.gamma,
                lam=ppo.lam,
                whiten_rewards=ppo.whiten_rewards,
                whiten_advantages=recipe.whiten_advantages,
                raw_advantages_BT=raw_advantages_BT.cpu().numpy(),
                advantages_BT=targets.advantages_BT.cpu().numpy(),
                returns_BT=targets.returns_BT.cpu().numpy(),
            )
        if ppo.kl_control == "adaptive":
            n = len(rewards_B)
            state.kl_coef = adapt_kl_coef(
                state.kl_coef, metrics["kl"], target=ppo.kl_target, n=n, horizon=ppo.kl_horizon
            )
        kl_B = torch.where(mask_BT, scores.logprobs_BT - scores.ref_logprobs_BT, 0.0).sum(dim=1).cpu()
    state.step = step
    return StepResult(metrics, rollout, scores, rewards_B, kl_B, clock)


def train(
    state: PPOState,
    prompts_of_step: Callable[[int], list[list[int]]],
    reward: Reward,
    config: TrainConfig,
    *,
    eos_id: int,
    pad_id: int,
    new_clock: Callable[[int], StageClock] = StageClock,
) -> Iterator[StepResult]:
    """Do the steps from ``state.step + 1`` to the configured last, yielding each when it is done.

    The clock that ``new_clock`` makes for a step runs on when the step is yielded: whoever takes it stops it.
    """
    while state.step < config.ppo.steps:
        clock = new_clock(state.step + 1)
        with clock.stage("prompts"):
            prompt_ids = prompts_of_step(state.step + 1)
        yield ppo_step(state, prompt_ids, reward, config, eos_id=eos_id, pad_id=pad_id, clock=clock)
