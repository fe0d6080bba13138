"""Mistakes to plant into the real trainer: each replaces one function of it, and nothing else.

``PLANTED`` maps a name to a function that plants it with pytest's monkeypatch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_core import policy, ppo, rollout

Plant = Callable[[pytest.MonkeyPatch], None]
PLANTED: dict[str, Plant] = {}


def plant(function: Plant) -> Plant:
    PLANTED[function.__name__] = function
    return function


def replace(monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Any], Any], module: Any = ppo) -> None:
    """Put ``make(what is there)`` in place of a function of the trainer."""
    monkeypatch.setattr(module, name, make(getattr(module, name)))


# -- the ten of the specification --------------------------------------------------------------------------------------


@plant
def labels_shifted_by_one_too_few(monkeypatch):
    replace(monkeypatch, "predicting", lambda right: lambda x, length: x[:, -length:], policy)


@plant
def score_on_the_first_token(monkeypatch):
    def make(right):
        def wrong(scores_B, *args, **kwargs):
            rewards_BT = right(torch.zeros_like(scores_B), *args, **kwargs)
            rewards_BT[:, 0] += scores_B
            return rewards_BT

        return wrong

    replace(monkeypatch, "token_rewards", make)


@plant
def padding_in_the_mean(monkeypatch):
    def make(right):
        return lambda *args, **kwargs: right(*args, **kwargs) * args[-1].double().mean()

    replace(monkeypatch, "ppo_policy_loss", make)


@plant
def value_not_masked(monkeypatch):
    def make(right):
        return lambda v, old, returns, mask, **kwargs: right(v, old, returns, torch.ones_like(mask), **kwargs)

    replace(monkeypatch, "clipped_value_loss", make)


@plant
def whitening_with_the_mean_left_in(monkeypatch):
    replace(monkeypatch, "whiten", lambda right: lambda x, mask, shift_mean=True: right(x, mask, shift_mean=False))


@plant
def kl_sign(monkeypatch):
    replace(monkeypatch, "token_rewards", lambda right: lambda *args, kl_coef: right(*args, kl_coef=-kl_coef))


@plant
def kl_coefficient_twice(monkeypatch):
    replace(monkeypatch, "token_rewards", lambda right: lambda *args, kl_coef: right(*args, kl_coef=2.0 * kl_coef))


@plant
def missing_detach_of_the_advantages(monkeypatch):
    """The KL penalty inside A keeps its gradient: ∇A_t = −Σ_{l≥t} β ∇log π_l, with γ = λ = 1 and a β of 1."""

    def make(right):
        def wrong(log_ratio_BT, advantages_BT, mask_BT, **kwargs):
            later_BT = log_ratio_BT.flip(1).cumsum(1).flip(1)
            return right(log_ratio_BT, advantages_BT - later_BT + later_BT.detach(), mask_BT, **kwargs)

        return wrong

    replace(monkeypatch, "ppo_policy_loss", make)


@plant
def bootstrapping_past_the_end(monkeypatch):
    def make(right):
        def wrong(rewards_BT, values_BT, mask_BT, **kwargs):
            after_B = mask_BT.sum(dim=1).clamp(max=mask_BT.shape[1] - 1)
            behind_B = torch.where(mask_BT.all(dim=1), 0.0, values_BT.gather(1, after_B[:, None])[:, 0])
            return right(rewards_BT, values_BT, mask_BT, bootstrap=behind_B, **kwargs)

        return wrong

    replace(monkeypatch, "gae", make)


@plant
def old_logprobs_at_another_temperature(monkeypatch):
    replace(
        monkeypatch,
        "score_rollout",
        lambda right: (
            lambda state, rollout, plan, temperature, dtype: dataclasses.replace(
                right(state, rollout, plan, temperature, dtype),
                logprobs_BT=right(state, rollout, plan, 1.0, dtype).logprobs_BT,
            )
        ),
    )


TEN = tuple(PLANTED)

# -- gradients ---------------------------------------------------------------------------------------------------------


@plant
def missing_detach_of_the_returns(monkeypatch):
    """R = A + V keeps half of V's gradient."""

    def make(right):
        return lambda v, old, returns, mask, **kwargs: right(v, old, returns + (v - v.detach()) / 2, mask, **kwargs)

    replace(monkeypatch, "clipped_value_loss", make)


@plant
def gradient_through_the_old_logprobs(monkeypatch):
    replace(monkeypatch, "log_ratio", lambda right: lambda new, old, mask: right(new, old - new.detach() + new, mask))


@plant
def gradient_not_zeroed(monkeypatch):
    monkeypatch.setattr(torch.optim.SGD, "zero_grad", lambda self, set_to_none=True: None)


@plant
def gradient_clipped_by_micro_batch(monkeypatch):
    def make(right):
        def wrong(state, rollout, scores, targets, minibatch, config):
            parts = []
            for rows in minibatch:
                parts.append(right(state, rollout, scores, targets, [rows], config))
                grads = ppo.gradients(state.model.parameters())
                ppo.clip_gradients(grads, ppo.total_norm(grads), config.ppo.max_grad_norm)
            sums, deviations, tokens = zip(*parts, strict=True)
            return torch.stack(sums).sum(0), torch.stack(deviations).max(), sum(tokens)

        return wrong

    replace(monkeypatch, "accumulate_gradients", make)


@plant
def gradient_not_clipped(monkeypatch):
    replace(monkeypatch, "clip_gradients", lambda right: lambda grads, norm, max_norm: None)


@plant
def each_micro_batch_divides_by_its_own_tokens(monkeypatch):
    def make(right):
        def wrong(state, rollout, scores, targets, minibatch, config):
            parts = [right(state, rollout, scores, targets, [rows], config) for rows in minibatch]
            sums, deviations, tokens = zip(*parts, strict=True)
            return torch.stack(sums).sum(0), torch.stack(deviations).max(), sum(tokens)

        return wrong

    replace(monkeypatch, "accumulate_gradients", make)


@plant
def dropout_on(monkeypatch):
    def make(right):
        def wrong(state, *args):
            state.model.train()
            return right(state, *args)

        return wrong

    replace(monkeypatch, "accumulate_gradients", make)


# -- the mask and the mean ---------------------------------------------------------------------------------------------


@plant
def mask_without_the_end_of_sequence_token(monkeypatch):
    def make(right):
        def wrong(*args, eos_id, **kwargs):
            drawn = right(*args, eos_id=eos_id, **kwargs)
            mask_BT = drawn.response_mask_BT & (
                (drawn.response_ids_BT != eos_id) | (drawn.response_mask_BT.sum(1) == 1)[:, None]
            )
            return dataclasses.replace(drawn, response_mask_BT=mask_BT)

        return wrong

    replace(monkeypatch, "sample", make)


@plant
def mean_of_each_sequence_first(monkeypatch):
    def make(right):
        def wrong(log_ratio_BT, advantages_BT, mask_BT, **kwargs):
            counts_B1 = mask_BT.sum(dim=1, keepdim=True)
            weights_BT = mask_BT.sum() / len(mask_BT) / counts_B1
            return right(log_ratio_BT, advantages_BT * weights_BT, mask_BT, **kwargs)

        return wrong

    replace(monkeypatch, "ppo_policy_loss", make)


@plant
def score_on_the_last_column(monkeypatch):
    def make(right):
        def wrong(scores_B, logprobs_BT, ref_BT, mask_BT, **kwargs):
            rewards_BT = right(torch.zeros_like(scores_B), logprobs_BT, ref_BT, mask_BT, **kwargs)
            rewards_BT[:, -1] += scores_B
            return rewards_BT

        return wrong

    replace(monkeypatch, "token_rewards", make)


@plant
def score_of_another_row(monkeypatch):
    replace(monkeypatch, "penalize_missing_eos", lambda right: lambda *args: right(*args).roll(1))


@plant
def padding_read_as_prompt(monkeypatch):
    def make(right):
        def wrong(prompts, pad_id):
            ids, mask = right(prompts, pad_id)
            return ids, torch.ones_like(mask)

        return wrong

    replace(monkeypatch, "left_pad", make, rollout)


@plant
def value_of_the_next_state(monkeypatch):
    def make(right):
        def wrong(*args):
            logp_BT, entropies_BT, values_BT = right(*args)
            return logp_BT, entropies_BT, torch.cat([values_BT[:, 1:], values_BT[:, -1:]], dim=1)

        return wrong

    replace(monkeypatch, "evaluate_rows", make)


@plant
def whitening_over_the_padding(monkeypatch):
    def make(right):
        return lambda x, mask, shift_mean=True: right(x, torch.ones_like(mask), shift_mean=shift_mean)

    replace(monkeypatch, "whiten", make)


# -- rewards, advantages, returns --------------------------------------------------------------------------------------


@plant
def gamma_and_lambda_swapped(monkeypatch):
    replace(monkeypatch, "gae", lambda right: lambda *args, gamma, lam: right(*args, gamma=lam, lam=gamma))


@plant
def returns_from_whitened_advantages(monkeypatch):
    def make(right):
        def wrong(rewards_BT, values_BT, mask_BT, config):
            targets, raw_BT = right(rewards_BT, values_BT, mask_BT, config)
            returns_BT = torch.where(mask_BT, ppo.whiten(raw_BT, mask_BT) + values_BT, 0.0)
            return dataclasses.replace(targets, returns_BT=returns_BT), raw_BT

        return wrong

    replace(monkeypatch, "make_targets", make)


@plant
def returns_without_the_value(monkeypatch):
    def make(right):
        def wrong(*args, **kwargs):
            advantages_BT, _ = right(*args, **kwargs)
            return advantages_BT, advantages_BT

        return wrong

    replace(monkeypatch, "gae", make)


@plant
def sample_variance_in_whitening(monkeypatch):
    def make(right):
        def wrong(x, mask, shift_mean=True):
            n = int(mask.sum())
            return (
                right(x, mask, shift_mean=shift_mean) * ((n - 1) / n) ** 0.5
                if shift_mean
                else right(x, mask, shift_mean=False)
            )

        return wrong

    replace(monkeypatch, "whiten", make)


@plant
def reward_whitening_takes_the_mean_out(monkeypatch):
    replace(monkeypatch, "whiten", lambda right: lambda x, mask, shift_mean=True: right(x, mask, shift_mean=True))


@plant
def penalty_for_the_responses_that_ended(monkeypatch):
    replace(
        monkeypatch, "penalize_missing_eos", lambda right: lambda scores, ended, penalty: right(scores, ~ended, penalty)
    )


@plant
def reference_at_another_temperature(monkeypatch):
    replace(
        monkeypatch,
        "score_rollout",
        lambda right: (
            lambda state, rollout, plan, temperature, dtype: dataclasses.replace(
                right(state, rollout, plan, temperature, dtype),
                ref_logprobs_BT=right(state, rollout, plan, 1.0, dtype).ref_logprobs_BT,
            )
        ),
    )


@plant
def kl_controller_inverted(monkeypatch):
    def make(right):
        return lambda coef, kl, *, target, **kwargs: right(coef, target, target=kl, **kwargs)

    replace(monkeypatch, "adapt_kl_coef", make)


# -- the ratio and the epochs ------------------------------------------------------------------------------------------


@plant
def temperature_missing_in_the_trainer(monkeypatch):
    def make(right):
        return lambda model, rollout, rows, temperature, dtype: right(model, rollout, rows, 1.0, dtype)

    replace(monkeypatch, "evaluate_rows", make)


@plant
def clipping_takes_the_larger_objective(monkeypatch):
    def make(right):
        def wrong(log_ratio_BT, advantages_BT, mask_BT, *, clip_range):
            ratio_BT = torch.where(mask_BT, log_ratio_BT, 0.0).exp()
            clipped_BT = ratio_BT.clamp(1 - clip_range, 1 + clip_range)
            losses_BT = torch.minimum(-ratio_BT * advantages_BT, -clipped_BT * advantages_BT)
            return torch.where(mask_BT, losses_BT, 0.0).sum()

        return wrong

    replace(monkeypatch, "ppo_policy_loss", make)


@plant
def clipping_whatever_the_sign(monkeypatch):
    def make(right):
        def wrong(log_ratio_BT, advantages_BT, mask_BT, *, clip_range):
            ratio_BT = torch.where(mask_BT, log_ratio_BT, 0.0).exp()
            clipped_BT = ratio_BT.clamp(1 - clip_range, 1 + clip_range)
            return torch.where(mask_BT, -clipped_BT * advantages_BT, 0.0).sum()

        return wrong

    replace(monkeypatch, "ppo_policy_loss", make)


@plant
def no_clipping(monkeypatch):
    replace(monkeypatch, "ppo_policy_loss", lambda right: lambda *args, clip_range: right(*args, clip_range=1e9))


@plant
def value_clipping_takes_the_smaller_error(monkeypatch):
    def make(right):
        def wrong(values_BT, old_BT, returns_BT, mask_BT, *, clip_range):
            clipped_BT = old_BT + (values_BT - old_BT).clamp(-clip_range, clip_range)
            errors_BT = torch.minimum((values_BT - returns_BT) ** 2, (clipped_BT - returns_BT) ** 2)
            return 0.5 * torch.where(mask_BT, errors_BT, 0.0).sum()

        return wrong

    replace(monkeypatch, "clipped_value_loss", make)


@plant
def value_loss_without_its_half(monkeypatch):
    replace(monkeypatch, "clipped_value_loss", lambda right: lambda *args, **kwargs: 2 * right(*args, **kwargs))


@plant
def old_logprobs_taken_anew_in_each_epoch(monkeypatch):
    def make(right):
        def wrong(state, rollout, scores, targets, minibatch, config):
            fresh = ppo.score_rollout(state, rollout, [minibatch], config.sampling.temperature, config.dtype)
            scores = dataclasses.replace(scores, logprobs_BT=fresh.logprobs_BT)
            return right(state, rollout, scores, targets, minibatch, config)

        return wrong

    replace(monkeypatch, "accumulate_gradients", make)


@plant
def a_row_twice_and_another_not_at_all(monkeypatch):
    def make(right):
        return lambda *args, **kwargs: [
            [torch.where(rows == 0, 1, rows) for rows in minibatch] for minibatch in right(*args, **kwargs)
        ]

    replace(monkeypatch, "plan_epoch", make)


# -- the run and its log -----------------------------------------------------------------------------------------------


@plant
def reference_follows_the_policy(monkeypatch):
    def make(right):
        def wrong(state, *args):
            result = right(state, *args)
            state.reference.lm.load_state_dict(state.model.lm.state_dict())
            return result

        return wrong

    replace(monkeypatch, "update", make)


@plant
def schedule_off_by_one(monkeypatch):
    replace(monkeypatch, "learning_rate", lambda right: lambda config, step: right(config, step + 1))


@plant
def ascent_instead_of_descent(monkeypatch):
    replace(monkeypatch, "ppo_policy_loss", lambda right: lambda *args, **kwargs: -right(*args, **kwargs))


def _of_metrics(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    replace(monkeypatch, "rollout_metrics", lambda right: lambda **arrays: right(**change(arrays)))


@plant
def logged_kl_over_the_wrong_axis(monkeypatch):
    names = ("logprobs", "ref_logprobs", "mask", "sampler_logprobs", "entropies", "values", "advantages", "returns")

    def change(right):
        def wrong(**arrays):
            turned = arrays | {name: np.ascontiguousarray(arrays[name].T) for name in names}
            return right(**arrays) | {"kl": right(**turned)["kl"]}

        return wrong

    replace(monkeypatch, "rollout_metrics", change)


@plant
def logged_entropy_over_the_padding(monkeypatch):
    def change(right):
        def wrong(**arrays):
            everywhere = arrays | {"mask": np.ones_like(arrays["mask"])}
            return right(**arrays) | {"entropy": right(**everywhere)["entropy"]}

        return wrong

    replace(monkeypatch, "rollout_metrics", change)
