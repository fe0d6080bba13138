"""Policy optimisation for language models: one step of it, and the loop.

Schulman et al., "Proximal Policy Optimization Algorithms" (2017), with the details of Huang et al., "The N
Implementation Details of RLHF with PPO" (2023). GRPO, RLOO and REINFORCE++ are the same loop with another choice of
advantage, loss mean and KL penalty: :mod:`rlhf_core.algorithms`. Shape suffixes: B sequences, T response positions.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from rlhf_core.advantages import adapt_kl_coef, penalize_missing_eos, token_rewards
from rlhf_core.checks.gradient_probe import GradientProbe
from rlhf_core.checks.invariants import target_error, tokens_after_end
from rlhf_core.config import PPOConfig, TrainConfig
from rlhf_core.finite import NonFiniteError, first_nonfinite_of_update, require_finite
from rlhf_core.losses import (
    clipped_policy_losses,
    clipped_value_losses,
    kl_k3,
    kl_losses,
    log_ratio,
    loss_count,
    loss_sum,
    masked_sum,
)
from rlhf_core.metrics import rollout_metrics
from rlhf_core.optim import add_gradients, clip_gradients, gradients, set_learning_rate, total_norm
from rlhf_core.parallel import together, workers
from rlhf_core.policy import ActorCritic, Outputs, Reference, autocast
from rlhf_core.profiling import StageClock
from rlhf_core.reward import Reward
from rlhf_core.rollout import Rollout, sample
from rlhf_core.scoring import Plan, Scores, evaluate_rows, score_rollout
from rlhf_core.seeding import CounterUniforms, permutation
from rlhf_core.targets import Targets, make_targets
from rlhf_core.update_statistics import LOSS_SUMS, MinibatchSums, UpdateStatistics


@dataclass
class PPOState:
    """What a step changes, and the frozen reference."""

    model: ActorCritic
    reference: Reference
    optimizer: torch.optim.Optimizer
    kl_coef: float
    step: int = 0
    """Steps done."""


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


def plan_epoch(config: PPOConfig, seed: int, step: int, epoch: int) -> Plan:
    """Return the shuffled minibatches of an epoch: a function of (seed, step, epoch) alone."""
    rows = torch.from_numpy(permutation(seed, "minibatches", config.batch_size, step, epoch))
    return [list(minibatch.split(config.micro_batch_size)) for minibatch in rows.split(config.minibatch_size)]


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a rollout, and the losses of one of the model's passes with the way back to its parameters."""

    rows: torch.Tensor
    logprobs_BT: torch.Tensor | None
    """None in the pass of a value model."""
    values_BT: torch.Tensor | None
    """None in the pass of a policy alone."""
    log_ratio_BT: torch.Tensor | None
    policy_loss: torch.Tensor
    """Summed as the losses' mean wants it, not yet divided; 0 where the pass has none."""
    value_loss: torch.Tensor


def micro_batch_losses(
    state: PPOState,
    rollout: Rollout,
    scores: Scores,
    targets: Targets,
    rows: torch.Tensor,
    outputs: Outputs,
    config: TrainConfig,
) -> MicroBatch:
    """Return the losses of some rows, as sums, that a pass of the model gives."""
    ppo, recipe = config.ppo, config.ppo.recipe
    mask_BT = rollout.response_mask_BT[rows]
    logprobs_BT, _, values_BT = evaluate_rows(
        state.model, rollout, rows, config.sampling.temperature, config.dtype, outputs
    )
    policy_loss = value_loss = scores.logprobs_BT.new_zeros(())
    log_ratio_BT = None
    if logprobs_BT is not None:
        log_ratio_BT = log_ratio(logprobs_BT, scores.logprobs_BT[rows], mask_BT)
        losses_BT = clipped_policy_losses(log_ratio_BT, targets.advantages_BT[rows], mask_BT, clip_range=ppo.clip_range)
        if recipe.kl_place == "loss":
            to_ref_BT = log_ratio(logprobs_BT, scores.ref_logprobs_BT[rows], mask_BT)
            losses_BT = losses_BT + state.kl_coef * kl_losses(recipe.kl_estimator, to_ref_BT, log_ratio_BT)
        policy_loss = loss_sum(losses_BT, mask_BT, recipe.loss_mean)
    if values_BT is not None:
        assert scores.values_BT is not None
        assert targets.returns_BT is not None
        value_losses_BT = clipped_value_losses(
            values_BT, scores.values_BT[rows], targets.returns_BT[rows], mask_BT, clip_range=ppo.value_clip_range
        )
        value_loss = loss_sum(value_losses_BT, mask_BT, recipe.loss_mean)
    return MicroBatch(rows, logprobs_BT, values_BT, log_ratio_BT, policy_loss, value_loss)


def accumulate_gradients(
    state: PPOState,
    rollout: Rollout,
    scores: Scores,
    targets: Targets,
    minibatch: list[torch.Tensor],
    config: TrainConfig,
    clock: StageClock,
    probe: GradientProbe | None = None,
) -> MinibatchSums:
    """Add the gradient of a minibatch's loss to the parameters, a micro-batch on each thread.

    Every micro-batch is divided by the count of the whole minibatch, so their gradients add up to its gradient however
    it is split; they are added in the order of the micro-batches, however many threads there are. A value model of its
    own follows the policy, so that what is kept for the backward pass is kept for one of them at a time. A probe gets
    to see the gradient with respect to log-probs and values.
    """
    device = rollout.input_ids_BL.device
    whole_mask_BT = rollout.response_mask_BT[torch.cat(minibatch).to(device)]
    count = loss_count(whole_mask_BT, config.ppo.recipe.loss_mean, config.sampling.max_new_tokens)
    parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    sums = torch.zeros(len(LOSS_SUMS), dtype=scores.logprobs_BT.dtype, device=device)
    deviation = sums.new_zeros(())
    at_once = workers(device)

    def forward(piece: tuple[torch.Tensor, Outputs]) -> MicroBatch:
        rows, outputs = piece
        return micro_batch_losses(state, rollout, scores, targets, rows.to(device), outputs, config)

    def loss(micro: MicroBatch) -> torch.Tensor:
        return (micro.policy_loss + config.ppo.value_coef * micro.value_loss) / count

    def backward(micro: MicroBatch) -> tuple[torch.Tensor | None, ...]:
        total = loss(micro)
        if not total.requires_grad:  # what this pass goes through is frozen
            return (None,) * len(parameters)
        return torch.autograd.grad(total, parameters, allow_unused=True)

    groups = [minibatch[at : at + at_once] for at in range(0, len(minibatch), at_once)]
    for group, outputs in itertools.product(groups, state.model.passes):
        with clock.stage("forward"):
            micro_batches = together(forward, [(rows, outputs) for rows in group], at_once)
        if probe is not None:
            assert targets.returns_BT is not None
            for micro in micro_batches:
                constants = targets.advantages_BT[micro.rows], targets.returns_BT[micro.rows]
                probe.watch(micro.rows, micro.logprobs_BT, micro.values_BT, *constants, loss(micro))
        with clock.stage("backward"):
            for grads in together(backward, micro_batches, at_once):
                add_gradients(parameters, grads)
        with torch.no_grad():
            for micro in micro_batches:
                sums[:2] += torch.stack([micro.policy_loss, micro.value_loss])
                if micro.log_ratio_BT is not None:
                    mask_BT = rollout.response_mask_BT[micro.rows]
                    off_BT = micro.log_ratio_BT.expm1().abs()
                    k3 = masked_sum(kl_k3(-micro.log_ratio_BT), mask_BT)
                    clipped = (off_BT > config.ppo.clip_range).sum()
                    sums[2:] += torch.stack([k3, clipped.to(k3.dtype)])
                    deviation = torch.maximum(deviation, off_BT.max())
    return MinibatchSums(sums, deviation, count, int(whole_mask_BT.sum()))


def optimizer_step(
    state: PPOState, sums: MinibatchSums, parameters: list[torch.nn.Parameter], max_norm: float, step: int
) -> float:
    """Move the weights by their gradients, which are gone then, and return the gradients' norm before clipping.

    Raises:
        NonFiniteError: a loss or a gradient is not finite; the weights are as they were.
    """
    grads = gradients(parameters)
    norm = total_norm(grads)
    if not (math.isfinite(norm) and bool(sums.sums.isfinite().all())):
        raise NonFiniteError(step, first_nonfinite_of_update(state.model, sums.sums))
    clip_gradients(grads, norm, max_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return norm


def update(
    state: PPOState,
    rollout: Rollout,
    scores: Scores,
    targets: Targets,
    first_plan: Plan,
    config: TrainConfig,
    step: int,
    clock: StageClock,
) -> dict[str, float]:
    """Run the epochs of a step and return their metrics.

    Raises:
        NonFiniteError: a loss or a gradient is not finite, and the weights are as they were before that minibatch; or
            a weight is no longer finite after the last one.
    """
    parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    # Which tokens count, the probe takes from the attention mask, and so not from where the loss takes it.
    real_BT = rollout.attention_mask_BL[:, -rollout.response_length :].bool()
    probe = GradientProbe(real_BT, config.ppo.value_coef) if config.ppo.recipe.has_closed_form else None
    statistics = UpdateStatistics()
    for epoch in range(config.ppo.epochs):
        plan = first_plan if epoch == 0 else plan_epoch(config.ppo, config.seed, step, epoch)
        for number, minibatch in enumerate(plan):
            with clock.minibatch(epoch=epoch, minibatch=number):
                first = probe if epoch == number == 0 else None
                sums = accumulate_gradients(state, rollout, scores, targets, minibatch, config, clock, first)
                with clock.stage("optimizer"):
                    statistics.add(sums, optimizer_step(state, sums, parameters, config.ppo.max_grad_norm, step))
    require_finite(step, None, **dict(state.model.named_parameters()))
    return statistics.metrics(value=state.model.has_value) | (probe.metrics() if probe else {})


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
