"""Proximal policy optimisation for language models: one step of it, and the loop.

Schulman et al., "Proximal Policy Optimization Algorithms" (2017), with the details of Huang et al., "The N
Implementation Details of RLHF with PPO" (2023). Shape suffixes: B sequences, L positions of prompt and response,
T response positions, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch

from rlhf_core.advantages import adapt_kl_coef, penalize_missing_eos, token_rewards
from rlhf_core.config import PPOConfig, TrainConfig
from rlhf_core.losses import clipped_value_loss, kl_k3, log_ratio, masked_sum, ppo_policy_loss
from rlhf_core.metrics import rollout_metrics
from rlhf_core.optim import clip_gradients, gradients, set_learning_rate, total_norm
from rlhf_core.policy import ActorCritic, Reference
from rlhf_core.profiling import StageClock
from rlhf_core.reward import Reward
from rlhf_core.rollout import Rollout, sample
from rlhf_core.seeding import CounterUniforms, permutation
from rlhf_kernels import gae, token_logprobs, whiten

Plan = list[list[torch.Tensor]]
"""The minibatches of an epoch, each a list of micro-batches, each the rows of a rollout."""


class NonFiniteError(FloatingPointError):
    """A tensor of the step holds NaN or infinity."""

    def __init__(self, step: int, name: str) -> None:
        super().__init__(
            f"step {step}: {name} is not finite, so training stops and nothing more is saved; "
            "lower the learning rate, or look at the reward"
        )


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
class Scores:
    """What the models say of a rollout before its updates; constants of the update, all [B, T] float32."""

    logprobs_BT: torch.Tensor
    entropies_BT: torch.Tensor
    values_BT: torch.Tensor
    ref_logprobs_BT: torch.Tensor


@dataclass(frozen=True)
class Targets:
    """What the update steers to, all [B, T]: A whitened as configured, and the returns."""

    advantages_BT: torch.Tensor
    returns_BT: torch.Tensor


@dataclass(frozen=True)
class StepResult:
    """One step's metrics and what its samples are shown from."""

    metrics: dict[str, float]
    rollout: Rollout
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


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[None]:
    """Return the context in which the models run: bfloat16 products under ``bfloat16``, else as they are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


@torch.no_grad()
def score_rollout(state: PPOState, rollout: Rollout, plan: Plan, temperature: float, dtype: str) -> Scores:
    """Return log-probs, entropies, values and reference log-probs of a rollout.

    The rows go through the models in the micro-batches of the first epoch. A row's bits may depend on the rows beside
    it; so the first update sees the very log-probs that it is compared with, and its ratio is exactly 1.
    """
    device = rollout.input_ids_BL.device
    out = [torch.zeros(rollout.response_mask_BT.shape, device=device) for _ in range(4)]
    logprobs_BT, entropies_BT, values_BT, ref_logprobs_BT = out
    for rows in (rows.to(device) for minibatch in plan for rows in minibatch):
        logprobs_BT[rows], entropies_BT[rows], values_BT[rows] = evaluate_rows(
            state.model, rollout, rows, temperature, dtype
        )
        with autocast(device, dtype):
            ref_logits_BTV = state.reference(
                rollout.input_ids_BL[rows], rollout.attention_mask_BL[rows], rollout.response_length
            )
        ref_logprobs_BT[rows] = token_logprobs(ref_logits_BTV, rollout.response_ids_BT[rows], temperature=temperature)
    return Scores(logprobs_BT, entropies_BT, values_BT, ref_logprobs_BT)


def evaluate_rows(
    model: ActorCritic, rollout: Rollout, rows: torch.Tensor, temperature: float, dtype: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return [b, T] log-probs, entropies and values of some rows of a rollout, in float32."""
    with autocast(rollout.input_ids_BL.device, dtype):
        logits_BTV, values_BT = model(
            rollout.input_ids_BL[rows], rollout.attention_mask_BL[rows], rollout.response_length
        )
    logprobs_BT, entropies_BT = token_logprobs(
        logits_BTV, rollout.response_ids_BT[rows], temperature=temperature, with_entropy=True
    )
    return logprobs_BT, entropies_BT, values_BT


def make_targets(
    rewards_BT: torch.Tensor, values_BT: torch.Tensor, mask_BT: torch.Tensor, config: PPOConfig
) -> tuple[Targets, torch.Tensor]:
    """Return the update's targets, and the advantages before whitening."""
    if config.whiten_rewards:
        rewards_BT = whiten(rewards_BT, mask_BT, shift_mean=False)
    raw_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=config.gamma, lam=config.lam)
    advantages_BT = whiten(raw_BT, mask_BT) if config.whiten_advantages else raw_BT
    return Targets(advantages_BT, returns_BT), raw_BT


class UpdateStatistics:
    """Sums over an update's minibatches, from which its metrics are made."""

    def __init__(self) -> None:
        self._sums = np.zeros(4)
        self._tokens = 0
        self._norms: list[float] = []
        self._first_deviation: float | None = None

    def add(self, sums: torch.Tensor, deviation: torch.Tensor, tokens: int, norm: float) -> None:
        """Add a minibatch: its sums of policy loss, value loss, k3 and clipped tokens; max |ρ−1|; gradient norm."""
        self._sums += sums.double().cpu().numpy()
        self._tokens += tokens
        self._norms.append(norm)
        if self._first_deviation is None:
            self._first_deviation = deviation.item()

    def metrics(self) -> dict[str, float]:
        """Return the update's metrics: means over response tokens, and over optimizer steps for the norm."""
        assert self._first_deviation is not None
        policy_loss, value_loss, approx_kl, clip_frac = (self._sums / self._tokens).tolist()
        return {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "approx_kl": approx_kl,
            "clip_frac": clip_frac,
            "ratio_max_dev_first": self._first_deviation,
            "grad_norm": math.fsum(self._norms) / len(self._norms),
            "grad_norm_max": max(self._norms),
        }


def accumulate_gradients(
    state: PPOState,
    rollout: Rollout,
    scores: Scores,
    targets: Targets,
    minibatch: list[torch.Tensor],
    config: TrainConfig,
    clock: StageClock,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Add the gradient of a minibatch's loss to the parameters, one micro-batch after the other.

    Every micro-batch is divided by the tokens of the whole minibatch, so their gradients add up to its gradient
    however it is split.

    Returns:
        The minibatch's sums of policy loss, value loss, k3 and clipped tokens; max |ρ − 1|; its tokens.
    """
    ppo = config.ppo
    device = rollout.input_ids_BL.device
    tokens = int(rollout.response_mask_BT[torch.cat(minibatch).to(device)].sum())
    sums = torch.zeros(4, device=device)
    deviation = torch.zeros((), device=device)
    for rows in (rows.to(device) for rows in minibatch):
        mask_BT = rollout.response_mask_BT[rows]
        with clock.stage("forward"):
            logprobs_BT, _, values_BT = evaluate_rows(
                state.model, rollout, rows, config.sampling.temperature, config.dtype
            )
            log_ratio_BT = log_ratio(logprobs_BT, scores.logprobs_BT[rows], mask_BT)
            policy_loss = ppo_policy_loss(log_ratio_BT, targets.advantages_BT[rows], mask_BT, clip_range=ppo.clip_range)
            value_loss = clipped_value_loss(
                values_BT, scores.values_BT[rows], targets.returns_BT[rows], mask_BT, clip_range=ppo.value_clip_range
            )
        with clock.stage("backward"):
            ((policy_loss + ppo.value_coef * value_loss) / tokens).backward()
        with torch.no_grad():
            off_BT = (log_ratio_BT.exp() - 1.0).abs()
            k3 = masked_sum(kl_k3(-log_ratio_BT), mask_BT)
            clipped = masked_sum((off_BT > ppo.clip_range).float(), mask_BT)
            sums += torch.stack([policy_loss, value_loss, k3, clipped])
            deviation = torch.maximum(deviation, off_BT.max())
    return sums, deviation, tokens


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
    statistics = UpdateStatistics()
    for epoch in range(config.ppo.epochs):
        plan = first_plan if epoch == 0 else plan_epoch(config.ppo, config.seed, step, epoch)
        for number, minibatch in enumerate(plan):
            with clock.minibatch(epoch=epoch, minibatch=number):
                sums, deviation, tokens = accumulate_gradients(
                    state, rollout, scores, targets, minibatch, config, clock
                )
                with clock.stage("optimizer"):
                    grads = gradients(parameters)
                    norm = total_norm(grads)
                    if not (math.isfinite(norm) and bool(sums.isfinite().all())):
                        raise NonFiniteError(step, first_nonfinite_of_update(state.model, sums))
                    statistics.add(sums, deviation, tokens, norm)
                    clip_gradients(grads, norm, config.ppo.max_grad_norm)
                    state.optimizer.step()
                    state.optimizer.zero_grad(set_to_none=True)
    require_finite(step, None, **dict(state.model.named_parameters()))
    return statistics.metrics()


def first_nonfinite_of_update(model: ActorCritic, sums: torch.Tensor) -> str:
    """Return the name of the first non-finite tensor: a loss, else a parameter's gradient."""
    for name, value in zip(("policy_loss", "value_loss", "approx_kl"), sums.tolist(), strict=False):
        if not math.isfinite(value):
            return name
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}"
    return "the total gradient norm"


def require_finite(step: int, mask_BT: torch.Tensor | None, **tensors: torch.Tensor) -> None:
    """Raise NonFiniteError with the name of the first tensor that is not finite where the mask is True."""
    for name, tensor in tensors.items():
        on_mask = tensor if mask_BT is None else torch.where(mask_BT, tensor, 0.0)
        if not on_mask.isfinite().all():
            raise NonFiniteError(step, name)


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
    """Do one PPO step: sample, score, estimate advantages, update.

    Args:
        state: changed in place; ``state.step`` counts up.
        prompt_ids: the step's prompts, ``batch_size`` of them.
        reward: scores the rollouts.
        config: the whole configuration.
        eos_id: ends a response.
        pad_id: fills the rest.
        clock: takes the time of the stages; by default a new one.

    Raises:
        ValueError: the number of prompts, or of scores, is not the batch size.
        NonFiniteError: something is NaN or infinite.
    """
    step, ppo, clock = state.step + 1, config.ppo, clock or StageClock(state.step + 1)
    if len(prompt_ids) != ppo.batch_size:
        raise ValueError(f"step {step} has {len(prompt_ids)} prompts; ppo.batch_size is {ppo.batch_size}")
    lr = learning_rate(ppo, step)
    set_learning_rate(state.optimizer, lr)

    # 1. Rollout: a completion for each prompt, its uniforms keyed by (seed, step, sample, position).
    with clock.stage("rollout"):
        require_finite(step, None, **dict(state.model.named_parameters()))
        length = config.sampling.max_new_tokens
        uniforms = CounterUniforms(config.seed, "rollout", step, np.arange(len(prompt_ids)), length)
        device = next(state.model.parameters()).device
        with autocast(device, config.dtype):
            rollout = sample(state.model.lm, prompt_ids, uniforms, config.sampling, eos_id=eos_id, pad_id=pad_id)
    mask_BT = rollout.response_mask_BT

    # 2. Reward of the whole text; a response that did not end costs something.
    with clock.stage("reward"):
        rewards_B = reward(rollout).detach().float().cpu()
        if rewards_B.shape != rollout.ended_B.shape:
            raise ValueError(f"the reward returned shape {tuple(rewards_B.shape)}; it must be one score a prompt")
        require_finite(step, None, reward=rewards_B)
        scores_B = penalize_missing_eos(rewards_B, rollout.ended_B.cpu(), ppo.missing_eos_penalty)

    # 3. Log-probs, values and the reference's log-probs, in the micro-batches of the first epoch.
    with clock.stage("reference_and_value"):
        plan = plan_epoch(ppo, config.seed, step, epoch=0)
        scores = score_rollout(state, rollout, plan, config.sampling.temperature, config.dtype)
        require_finite(
            step, mask_BT, logprobs=scores.logprobs_BT, values=scores.values_BT, ref_logprobs=scores.ref_logprobs_BT
        )

    # 4. Per-token rewards with the KL penalty, GAE, whitening.
    with clock.stage("advantages"):
        rewards_BT = token_rewards(
            scores_B.to(mask_BT.device), scores.logprobs_BT, scores.ref_logprobs_BT, mask_BT, kl_coef=state.kl_coef
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
            values=scores.values_BT.cpu().numpy(),
            advantages=raw_advantages_BT.cpu().numpy(),
            returns=targets.returns_BT.cpu().numpy(),
            kl_coef=state.kl_coef,
            kl_target=ppo.kl_target,
        )
        metrics["lr"] = lr
        if ppo.kl_control == "adaptive":
            n = len(prompt_ids)
            state.kl_coef = adapt_kl_coef(
                state.kl_coef, metrics["kl"], target=ppo.kl_target, n=n, horizon=ppo.kl_horizon
            )
        kl_B = torch.where(mask_BT, scores.logprobs_BT - scores.ref_logprobs_BT, 0.0).sum(dim=1).cpu()
    state.step = step
    return StepResult(metrics, rollout, rewards_B, kl_B, clock)


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
