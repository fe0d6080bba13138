"""The updates of a step of policy optimisation: the loss of a minibatch, its gradient, the optimizer's step.

Schulman et al., "Proximal Policy Optimization Algorithms" (2017), eq. 7 and 9. Shape suffixes: B sequences, T response
positions.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rlhf_core.checks.gradient_probe import GradientProbe
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
from rlhf_core.memory_plan import keeps_little
from rlhf_core.optim import add_gradients, clip_gradients, gradients, total_norm
from rlhf_core.parallel import together, workers
from rlhf_core.policy import ActorCritic, Outputs, Reference
from rlhf_core.profiling import StageClock
from rlhf_core.rollout import Rollout
from rlhf_core.scoring import Plan, Scores, evaluate_rows
from rlhf_core.seeding import permutation
from rlhf_core.targets import Targets
from rlhf_core.update_statistics import LOSS_SUMS, MinibatchSums, UpdateStatistics
from rlhf_kernels import arenas
from rlhf_kernels.memory import reused


@dataclass
class PPOState:
    """What a step changes, and the frozen reference."""

    model: ActorCritic
    reference: Reference
    optimizer: torch.optim.Optimizer
    kl_coef: float
    step: int = 0
    """Steps done."""


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


def rounds(
    model: ActorCritic, rollout: Rollout, minibatch: list[torch.Tensor], at_once: int
) -> Iterator[list[tuple[torch.Tensor, Outputs]]]:
    """Yield what goes on at the same time: the passes of micro-batches, up to ``at_once`` of them.

    A value model of its own follows the policy, so that what is kept for the backward pass is kept for one of them at a
    time. Where that is little, they share the threads that a micro-batch alone would leave to the operators.
    """
    shape = model.lm.config.get_text_config()
    tokens = max(len(rows) for rows in minibatch) * rollout.input_ids_BL.shape[1]
    if len(minibatch) < at_once and keeps_little(tokens, shape.num_hidden_layers, shape.hidden_size):
        pieces = list(itertools.product(minibatch, model.passes))
        yield from (pieces[at : at + at_once] for at in range(0, len(pieces), at_once))
        return
    for at in range(0, len(minibatch), at_once):
        for outputs in model.passes:
            yield [(rows, outputs) for rows in minibatch[at : at + at_once]]


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
    it is split; they are added in the order of the micro-batches, however many threads there are. A probe gets to see
    the gradient with respect to log-probs and values.
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

    for pieces in rounds(state.model, rollout, minibatch, at_once):
        arenas.keep(len(pieces))  # those of sampling and scoring may be more, and are of no use meanwhile
        with clock.stage("forward"):
            micro_batches = together(forward, pieces, at_once)
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
        ValueError: no parameter has a gradient.
    """
    grads = gradients(parameters)
    if not grads:
        raise ValueError("no parameter has a gradient: something turned gradients off (torch.set_grad_enabled)")
    norm = total_norm(grads)
    if not (math.isfinite(norm) and bool(sums.sums.isfinite().all())):
        raise NonFiniteError(step, first_nonfinite_of_update(state.model, sums.sums))
    clip_gradients(grads, norm, max_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return norm


@reused()
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
            with clock.minibatch(epoch=epoch, minibatch=number), reused():
                first = probe if epoch == number == 0 else None
                sums = accumulate_gradients(state, rollout, scores, targets, minibatch, config, clock, first)
                with clock.stage("optimizer"):
                    statistics.add(sums, optimizer_step(state, sums, parameters, config.ppo.max_grad_norm, step))
    require_finite(step, None, **dict(state.model.named_parameters()))
    return statistics.metrics(value=state.model.has_value) | (probe.metrics() if probe else {})
