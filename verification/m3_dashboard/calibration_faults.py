"""One fault each, planted into the trainer's own functions from some step on.

A fault takes the world of a run (``calibration_runs.World``) and changes it; what it patches is given back when the
run ends.
"""

import copy
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import torch

from rlhf_core import ppo, targets, updates
from rlhf_core.rollout import Rollout


def learning_rate_x100(world: Any) -> None:
    right = ppo.learning_rate
    world.patch.setattr(ppo, "learning_rate", lambda config, step: 100 * right(config, step))


def learning_rate_x10(world: Any) -> None:
    right = ppo.learning_rate
    world.patch.setattr(ppo, "learning_rate", lambda config, step: 10 * right(config, step))


def kl_coef_zero(world: Any) -> None:
    world.state.kl_coef = 0.0


def kl_penalty_left_out(world: Any) -> None:
    right = ppo.token_rewards
    world.patch.setattr(ppo, "token_rewards", lambda *a, kl_coef, **k: right(*a, kl_coef=0.0, **k))


def kl_penalty_with_the_wrong_sign(world: Any) -> None:
    right = ppo.token_rewards
    world.patch.setattr(ppo, "token_rewards", lambda *a, kl_coef, **k: right(*a, kl_coef=-kl_coef, **k))


def _hotter(config: Any, factor: float) -> Any:
    return dataclasses.replace(config, temperature=factor * config.temperature)


def sampling_temperature_x1_2(world: Any) -> None:
    right = ppo.sample
    world.patch.setattr(
        ppo, "sample", lambda lm, ids, uniforms, config, **k: right(lm, ids, uniforms, _hotter(config, 1.2), **k)
    )


def sampling_temperature_x0_8(world: Any) -> None:
    right = ppo.sample
    world.patch.setattr(
        ppo, "sample", lambda lm, ids, uniforms, config, **k: right(lm, ids, uniforms, _hotter(config, 0.8), **k)
    )


def _silently(world: Any, factor: float) -> None:
    """Draw at another temperature, and report the log-probs of the right one."""
    from rlhf_core import rollout

    right = rollout.sample_tokens

    def sample_tokens(logits: torch.Tensor, uniforms: torch.Tensor, *, temperature: float, **options: Any) -> Any:
        drawn = right(logits, uniforms, temperature=factor * temperature, **options)
        logp = torch.log_softmax(logits.float() / temperature, dim=-1)
        return drawn._replace(logprobs=logp.gather(-1, drawn.ids[:, None]).squeeze(-1))

    world.patch.setattr(rollout, "sample_tokens", sample_tokens)


def sampling_temperature_x1_2_unreported(world: Any) -> None:
    _silently(world, 1.2)


def sampling_temperature_x0_8_unreported(world: Any) -> None:
    _silently(world, 0.8)


def dropout_left_on(world: Any) -> None:
    for module in world.state.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    right = updates.evaluate_rows

    def evaluate_rows(model: Any, *args: Any) -> Any:
        model.train()
        try:
            return right(model, *args)
        finally:
            model.eval()

    world.patch.setattr(updates, "evaluate_rows", evaluate_rows)


def _all_count(rollout: Rollout) -> Rollout:
    return dataclasses.replace(rollout, response_mask_BT=torch.ones_like(rollout.response_mask_BT))


def padding_counted_in_the_loss(world: Any) -> None:
    right = updates.accumulate_gradients
    world.patch.setattr(
        updates, "accumulate_gradients", lambda state, rollout, *args: right(state, _all_count(rollout), *args)
    )


def padding_counted_everywhere(world: Any) -> None:
    right = ppo.sample
    world.patch.setattr(ppo, "sample", lambda *args, **options: _all_count(right(*args, **options)))


def advantages_not_detached(world: Any) -> None:
    """A = R − V with the live V: the policy's loss moves the value function too."""
    live = threading.local()  # a micro-batch has a thread
    evaluate_rows, policy_loss = updates.evaluate_rows, updates.clipped_policy_losses

    def stashing(*args: Any) -> Any:
        *same, outputs = args
        live.values = evaluate_rows(*same)[2]  # in the policy's own pass too
        return evaluate_rows(*same, outputs)

    def attached(log_ratio: Any, advantages: Any, mask: Any, *, clip_range: float) -> Any:
        return policy_loss(log_ratio, advantages - (live.values - live.values.detach()), mask, clip_range=clip_range)

    world.patch.setattr(updates, "evaluate_rows", stashing)
    world.patch.setattr(updates, "clipped_policy_losses", attached)


def advantages_with_the_wrong_sign(world: Any) -> None:
    right = updates.clipped_policy_losses
    world.patch.setattr(updates, "clipped_policy_losses", lambda x, a, mask, **options: right(x, -a, mask, **options))


def _lengths(rollout: Rollout) -> torch.Tensor:
    return rollout.response_mask_BT.sum(dim=1).float().cpu()


def reward_pays_for_length(world: Any) -> None:
    world.reward = lambda rollout: 0.2 * _lengths(rollout)


def reward_pays_for_length_too(world: Any) -> None:
    right = world.reward
    world.reward = lambda rollout: right(rollout) + 0.3 * _lengths(rollout)


def value_loss_x100(world: Any) -> None:
    right = updates.clipped_value_losses
    world.patch.setattr(updates, "clipped_value_losses", lambda *args, **options: 100 * right(*args, **options))


def value_coef_x100(world: Any) -> None:
    config = world.config
    world.config = dataclasses.replace(
        config, ppo=dataclasses.replace(config.ppo, value_coef=100 * config.ppo.value_coef)
    )


def constant_reward(world: Any) -> None:
    world.reward = lambda rollout: torch.full((len(rollout.ended_B),), 0.5)


def nan_gradient(world: Any) -> None:
    right = updates.gradients

    def gradients(parameters: Any) -> Any:
        found = right(parameters)
        found[0][...] = torch.nan
        return found

    world.patch.setattr(updates, "gradients", gradients)


def stale_rollouts(world: Any) -> None:
    """Sample from the weights of three steps ago."""
    right, kept = ppo.sample, [copy.deepcopy(world.state.model.lm)]

    def sample(lm: Any, *args: Any, **options: Any) -> Any:
        kept.append(copy.deepcopy(lm))
        del kept[:-4]
        return right(kept[0], *args, **options)

    world.patch.setattr(ppo, "sample", sample)


def one_rollout_again_and_again(world: Any) -> None:
    right, kept = ppo.sample, []

    def sample(*args: Any, **options: Any) -> Any:
        if not kept:
            kept.append(right(*args, **options))
        return kept[0]

    world.patch.setattr(ppo, "sample", sample)


def eos_never_sampled(world: Any) -> None:
    """Policy and reference alike give the end of sequence no probability."""
    eos = world.eos_id

    def without_end(module: Any, args: Any, output: Any) -> Any:
        output.logits = output.logits.index_fill(-1, torch.tensor([eos]), -1e4)
        return output

    for lm in (world.state.model.lm, world.state.reference.lm):
        lm.register_forward_hook(without_end)


def eos_not_recognised(world: Any) -> None:
    right = ppo.sample
    world.patch.setattr(ppo, "sample", lambda *args, eos_id, pad_id: right(*args, eos_id=-1, pad_id=pad_id))


def learning_rate_zero(world: Any) -> None:
    world.patch.setattr(ppo, "learning_rate", lambda config, step: 0.0)


def optimizer_does_nothing(world: Any) -> None:
    world.state.optimizer.step = lambda *args, **options: None


def reference_follows_the_policy(world: Any) -> None:
    world.state.reference.lm = world.state.model.lm


def wrong_gamma(world: Any) -> None:
    right = targets.gae
    world.patch.setattr(targets, "gae", lambda *args, gamma, lam: right(*args, gamma=0.5, lam=lam))


def rewards_of_other_rows(world: Any) -> None:
    right = ppo.penalize_missing_eos
    world.patch.setattr(ppo, "penalize_missing_eos", lambda *args: right(*args).roll(1))


def whitening_without_the_mask(world: Any) -> None:
    right = targets.whiten
    world.patch.setattr(targets, "whiten", lambda x, mask, **options: right(x, torch.ones_like(mask), **options))


def reward_scaled_x100(world: Any) -> None:
    right = world.reward
    world.reward = lambda rollout: 100 * right(rollout)


def reward_turned_round(world: Any) -> None:
    right = world.reward
    world.reward = lambda rollout: -right(rollout)


def reward_of_another_batch(world: Any) -> None:
    """Every completion gets the reward of a random draw: nothing that it writes matters."""
    generator = torch.Generator().manual_seed(0)
    world.reward = lambda rollout: torch.randn(len(rollout.ended_B), generator=generator)


def nan_reward(world: Any) -> None:
    right = world.reward
    world.reward = lambda rollout: torch.where(torch.arange(len(rollout.ended_B)) == 3, torch.nan, right(rollout))


def top_k_5(world: Any) -> None:
    right = ppo.sample
    world.patch.setattr(
        ppo,
        "sample",
        lambda lm, ids, uniforms, config, **k: right(lm, ids, uniforms, dataclasses.replace(config, top_k=5), **k),
    )


def old_logprobs_of_the_reference(world: Any) -> None:
    right = ppo.score_rollout
    world.patch.setattr(
        ppo,
        "score_rollout",
        lambda *args: (lambda scores: dataclasses.replace(scores, logprobs_BT=scores.ref_logprobs_BT))(right(*args)),
    )


def rollout_from_the_reference(world: Any) -> None:
    right = ppo.sample
    world.patch.setattr(ppo, "sample", lambda lm, *args, **options: right(world.state.reference.lm, *args, **options))


def _entropy_bonus(world: Any, coef: float) -> None:
    live = threading.local()
    evaluate_rows, policy_loss = updates.evaluate_rows, updates.clipped_policy_losses

    def stashing(*args: Any) -> Any:
        found = evaluate_rows(*args)
        live.entropies = found[1]
        return found

    world.patch.setattr(updates, "evaluate_rows", stashing)
    world.patch.setattr(
        updates, "clipped_policy_losses", lambda *args, **options: policy_loss(*args, **options) - coef * live.entropies
    )


def entropy_bonus(world: Any) -> None:
    _entropy_bonus(world, 0.05)


def entropy_penalty(world: Any) -> None:
    _entropy_bonus(world, -0.05)


def kl_controller_turned_round(world: Any) -> None:
    """β falls while the KL lies above its target; a run whose β is fixed has an adaptive one from here on."""
    right = ppo.adapt_kl_coef
    world.config = dataclasses.replace(
        world.config, ppo=dataclasses.replace(world.config.ppo, kl_control="adaptive", kl_horizon=2000)
    )
    world.patch.setattr(ppo, "adapt_kl_coef", lambda coef, *args, **options: coef**2 / right(coef, *args, **options))


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault, and the alerts any of which is a right answer."""

    plant: Callable[[Any], None]
    title: str
    expected: tuple[str, ...]
    asked: bool = False
    """Whether the calibration is asked for it by name; the others are near to them."""


_STEP = ("step_too_large", "clip_frac_high", "kl_blow_up")
_SAMPLER = ("sampler_trainer_mismatch", "not_drawn_from_policy")
_DRAWN = ("not_drawn_from_policy",)
_TARGETS = ("targets_off_definition",)
_GRADIENT = ("gradient_off_closed_form",)
_LENGTH = ("reward_pays_for_length", "reward_hacking_length")

FAULTS = {
    fault.plant.__name__: fault
    for fault in (
        Fault(learning_rate_x100, "learning rate ×100", _STEP, True),
        Fault(kl_coef_zero, "KL coefficient 0", ("kl_coef_zero",), True),
        Fault(kl_penalty_left_out, "KL coefficient 0 in the rewards, not in the log", _TARGETS, True),
        Fault(sampling_temperature_x1_2, "sampling temperature ×1.2", _SAMPLER, True),
        Fault(sampling_temperature_x0_8, "sampling temperature ×0.8", _SAMPLER, True),
        Fault(sampling_temperature_x1_2_unreported, "the same ×1.2, log-probs reported right", _DRAWN, True),
        Fault(sampling_temperature_x0_8_unreported, "the same ×0.8, log-probs reported right", _DRAWN, True),
        Fault(dropout_left_on, "dropout left on", ("ratio_off_one",), True),
        Fault(padding_counted_in_the_loss, "padding counted in the loss", _GRADIENT, True),
        Fault(advantages_not_detached, "advantages not detached", _GRADIENT, True),
        Fault(reward_pays_for_length, "reward that pays for length", _LENGTH, True),
        Fault(reward_pays_for_length_too, "reward that pays for length beside the task", _LENGTH, True),
        Fault(value_loss_x100, "value loss ×100", (*_GRADIENT, "value_dominates", "value_loss_jump"), True),
        Fault(value_coef_x100, "value coefficient ×100", ("value_dominates",), True),
        Fault(constant_reward, "constant reward", ("reward_variance_gone",), True),
        Fault(nan_gradient, "NaN gradient", ("nonfinite",), True),
        Fault(stale_rollouts, "rollouts from the weights of three steps ago", _SAMPLER, True),
        Fault(one_rollout_again_and_again, "one rollout again and again", _SAMPLER, True),
        Fault(eos_never_sampled, "EOS never sampled", ("all_truncated",), True),
        Fault(learning_rate_x10, "learning rate ×10", _STEP),
        Fault(learning_rate_zero, "learning rate 0", ("lr_zero",)),
        Fault(optimizer_does_nothing, "optimizer that does nothing", ("kl_collapse", "policy_frozen")),
        Fault(kl_penalty_with_the_wrong_sign, "KL penalty with the wrong sign", _TARGETS),
        Fault(rollout_from_the_reference, "rollouts drawn from the reference", _SAMPLER),
        Fault(top_k_5, "sampling with top-k 5", _DRAWN),
        Fault(eos_not_recognised, "EOS drawn but not recognised", ("tokens_after_end",)),
        Fault(padding_counted_everywhere, "response mask that covers padding", ("tokens_after_end",)),
        Fault(old_logprobs_of_the_reference, "old log-probs taken from the reference", ("ratio_off_one",)),
        Fault(advantages_with_the_wrong_sign, "advantages with the wrong sign", _GRADIENT),
        Fault(wrong_gamma, "γ of 0.5 in GAE", _TARGETS),
        Fault(whitening_without_the_mask, "whitening over padding", _TARGETS),
        Fault(rewards_of_other_rows, "scores that land on other sequences", _TARGETS),
        Fault(reference_follows_the_policy, "reference that follows the policy", ("kl_collapse",)),
        Fault(nan_reward, "NaN reward", ("nonfinite",)),
        Fault(entropy_bonus, "bonus for entropy that nobody asked for", _GRADIENT),
        Fault(entropy_penalty, "the same with the other sign", _GRADIENT),
        Fault(kl_controller_turned_round, "KL controller reversed", ("kl_controller_off",)),
    )
}  # fmt: skip
