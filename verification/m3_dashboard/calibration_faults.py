"""One fault each, planted into the trainer's own functions from some step on.

A fault takes the world of a run (``calibration_runs.World``) and changes it; what it patches is given back when the
run ends. ``EXPECTED`` names the alerts, any of which is a right answer.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from rlhf_core import ppo
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
    world.patch.setattr(ppo, "token_rewards", lambda *a, kl_coef: right(*a, kl_coef=0.0))


def kl_penalty_with_the_wrong_sign(world: Any) -> None:
    right = ppo.token_rewards
    world.patch.setattr(ppo, "token_rewards", lambda *a, kl_coef: right(*a, kl_coef=-kl_coef))


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
    right = ppo.evaluate_rows

    def evaluate_rows(model: Any, *args: Any) -> Any:
        model.train()
        try:
            return right(model, *args)
        finally:
            model.eval()

    world.patch.setattr(ppo, "evaluate_rows", evaluate_rows)


def _all_count(rollout: Rollout) -> Rollout:
    return dataclasses.replace(rollout, response_mask_BT=torch.ones_like(rollout.response_mask_BT))


def padding_counted_in_the_loss(world: Any) -> None:
    right = ppo.accumulate_gradients
    world.patch.setattr(
        ppo, "accumulate_gradients", lambda state, rollout, *args: right(state, _all_count(rollout), *args)
    )


def padding_counted_everywhere(world: Any) -> None:
    right = ppo.sample
    world.patch.setattr(ppo, "sample", lambda *args, **options: _all_count(right(*args, **options)))


def advantages_not_detached(world: Any) -> None:
    """A = R − V with the live V: the policy's loss moves the value function too."""
    live: list[torch.Tensor] = []
    evaluate_rows, policy_loss = ppo.evaluate_rows, ppo.ppo_policy_loss

    def stashing(*args: Any) -> Any:
        logprobs, entropies, values = evaluate_rows(*args)
        live[:] = [values]
        return logprobs, entropies, values

    def attached(log_ratio: Any, advantages: Any, mask: Any, *, clip_range: float) -> Any:
        return policy_loss(log_ratio, advantages - (live[0] - live[0].detach()), mask, clip_range=clip_range)

    world.patch.setattr(ppo, "evaluate_rows", stashing)
    world.patch.setattr(ppo, "ppo_policy_loss", attached)


def advantages_with_the_wrong_sign(world: Any) -> None:
    policy_loss = ppo.ppo_policy_loss
    world.patch.setattr(ppo, "ppo_policy_loss", lambda x, a, mask, **options: policy_loss(x, -a, mask, **options))


def _lengths(rollout: Rollout) -> torch.Tensor:
    return rollout.response_mask_BT.sum(dim=1).float().cpu()


def reward_pays_for_length(world: Any) -> None:
    world.reward = lambda rollout: 0.2 * _lengths(rollout)


def reward_pays_for_length_too(world: Any) -> None:
    right = world.reward
    world.reward = lambda rollout: right(rollout) + 0.3 * _lengths(rollout)


def value_loss_x100(world: Any) -> None:
    right = ppo.clipped_value_loss
    world.patch.setattr(ppo, "clipped_value_loss", lambda *args, **options: 100 * right(*args, **options))


def value_coef_x100(world: Any) -> None:
    config = world.config
    world.config = dataclasses.replace(
        config, ppo=dataclasses.replace(config.ppo, value_coef=100 * config.ppo.value_coef)
    )


def constant_reward(world: Any) -> None:
    world.reward = lambda rollout: torch.full((len(rollout.ended_B),), 0.5)


def nan_gradient(world: Any) -> None:
    right = ppo.gradients

    def gradients(parameters: Any) -> Any:
        found = right(parameters)
        found[0][...] = torch.nan
        return found

    world.patch.setattr(ppo, "gradients", gradients)


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
    eos = world.experiment.eos_id

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
    right = ppo.gae
    world.patch.setattr(ppo, "gae", lambda *args, gamma, lam: right(*args, gamma=0.5, lam=lam))


def rewards_of_other_rows(world: Any) -> None:
    right = ppo.penalize_missing_eos
    world.patch.setattr(ppo, "penalize_missing_eos", lambda *args: right(*args).roll(1))


def whitening_without_the_mask(world: Any) -> None:
    right = ppo.whiten
    world.patch.setattr(ppo, "whiten", lambda x, mask, **options: right(x, torch.ones_like(mask), **options))


FAULTS: dict[str, Callable[[Any], None]] = {
    fault.__name__: fault
    for fault in (
        learning_rate_x100, learning_rate_x10, kl_coef_zero, kl_penalty_left_out, kl_penalty_with_the_wrong_sign,
        sampling_temperature_x1_2, sampling_temperature_x0_8, sampling_temperature_x1_2_unreported,
        sampling_temperature_x0_8_unreported, dropout_left_on, padding_counted_in_the_loss, padding_counted_everywhere,
        advantages_not_detached, advantages_with_the_wrong_sign, reward_pays_for_length, reward_pays_for_length_too,
        value_loss_x100, value_coef_x100, constant_reward, nan_gradient, stale_rollouts, one_rollout_again_and_again,
        eos_never_sampled, eos_not_recognised, learning_rate_zero, optimizer_does_nothing,
        reference_follows_the_policy, wrong_gamma, rewards_of_other_rows, whitening_without_the_mask,
    )
}  # fmt: skip
