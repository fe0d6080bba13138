"""Mistakes to plant into the real trainer: each replaces one function of it, and nothing else.

``PLANTED`` maps a name to a function that plants it with pytest's monkeypatch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_core import policy, ppo, rollout, scoring, targets, updates

Plant = Callable[[pytest.MonkeyPatch], None]
PLANTED: dict[str, Plant] = {}


def plant(function: Plant) -> Plant:
    PLANTED[function.__name__] = function
    return function


def replace(monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Any], Any], *modules: Any) -> None:
    """Put ``make(what is there)`` in place of a function of the trainer, by default of a step and its updates."""
    for module in modules or [module for module in (ppo, updates) if hasattr(module, name)]:
        monkeypatch.setattr(module, name, make(getattr(module, name)))


# -- ten mistakes with a named cause -----------------------------------------------------------------------------------


@plant
def labels_shifted_by_one_too_few(monkeypatch):
    """Whatever the head is limited to, the logits and values of the last T positions are taken."""
    replace(monkeypatch, "predicting", lambda right: lambda x, length: x[:, -length:], policy)
    monkeypatch.setattr(policy.ForwardArguments, "keep", lambda self, positions: {})


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
    replace(monkeypatch, "loss_count", lambda right: lambda mask_BT, loss_mean, longest: mask_BT.numel())


@plant
def value_not_masked(monkeypatch):
    def make(right):
        return lambda v, old, returns, mask, **kwargs: right(v, old, returns, torch.ones_like(mask), **kwargs)

    replace(monkeypatch, "clipped_value_losses", make)


@plant
def whitening_with_the_mean_left_in(monkeypatch):
    replace(
        monkeypatch, "whiten", lambda right: lambda x, mask, shift_mean=True: right(x, mask, shift_mean=False), targets
    )


@plant
def kl_sign(monkeypatch):
    replace(
        monkeypatch,
        "token_rewards",
        lambda right: lambda *args, kl_coef, **kwargs: right(*args, kl_coef=-kl_coef, **kwargs),
    )


@plant
def kl_coefficient_twice(monkeypatch):
    replace(
        monkeypatch,
        "token_rewards",
        lambda right: lambda *args, kl_coef, **kwargs: right(*args, kl_coef=2.0 * kl_coef, **kwargs),
    )


@plant
def missing_detach_of_the_advantages(monkeypatch):
    """The KL penalty inside A keeps its gradient: ∇A_t = −Σ_{l≥t} β ∇log π_l, with γ = λ = 1 and a β of 1."""

    def make(right):
        def wrong(log_ratio_BT, advantages_BT, mask_BT, **kwargs):
            later_BT = log_ratio_BT.flip(1).cumsum(1).flip(1)
            return right(log_ratio_BT, advantages_BT - later_BT + later_BT.detach(), mask_BT, **kwargs)

        return wrong

    replace(monkeypatch, "clipped_policy_losses", make)


@plant
def bootstrapping_past_the_end(monkeypatch):
    def make(right):
        def wrong(rewards_BT, values_BT, mask_BT, **kwargs):
            after_B = mask_BT.sum(dim=1).clamp(max=mask_BT.shape[1] - 1)
            behind_B = torch.where(mask_BT.all(dim=1), 0.0, values_BT.gather(1, after_B[:, None])[:, 0])
            return right(rewards_BT, values_BT, mask_BT, bootstrap=behind_B, **kwargs)

        return wrong

    replace(monkeypatch, "gae", make, targets)


@plant
def old_logprobs_at_another_temperature(monkeypatch):
    def make(right):
        def wrong(model, reference, rollout, plan, temperature, dtype):
            scores, cold = (right(model, reference, rollout, plan, tau, dtype) for tau in (temperature, 1.0))
            return dataclasses.replace(scores, logprobs_BT=cold.logprobs_BT)

        return wrong

    replace(monkeypatch, "score_rollout", make)


TEN = tuple(PLANTED)

# -- gradients ---------------------------------------------------------------------------------------------------------


@plant
def missing_detach_of_the_returns(monkeypatch):
    """R = A + V keeps half of V's gradient."""

    def make(right):
        return lambda v, old, returns, mask, **kwargs: right(v, old, returns + (v - v.detach()) / 2, mask, **kwargs)

    replace(monkeypatch, "clipped_value_losses", make)


@plant
def gradient_through_the_old_logprobs(monkeypatch):
    replace(monkeypatch, "log_ratio", lambda right: lambda new, old, mask: right(new, old - new.detach() + new, mask))


@plant
def gradient_not_zeroed(monkeypatch):
    monkeypatch.setattr(torch.optim.SGD, "zero_grad", lambda self, set_to_none=True: None)


@plant
def gradient_clipped_tensor_by_tensor(monkeypatch):
    def make(right):
        def wrong(grads, norm, max_norm):
            for grad in grads:
                right([grad], updates.total_norm([grad]), max_norm)

        return wrong

    replace(monkeypatch, "clip_gradients", make)


@plant
def gradient_not_clipped(monkeypatch):
    replace(monkeypatch, "clip_gradients", lambda right: lambda grads, norm, max_norm: None)


@plant
def each_micro_batch_divides_by_its_own_tokens(monkeypatch):
    def make(right):
        def wrong(state, rollout, scores, targets, minibatch, config, *rest):
            parts = [right(state, rollout, scores, targets, [rows], config, *rest) for rows in minibatch]
            tokens = sum(part.tokens for part in parts)
            sums = torch.stack([part.sums for part in parts]).sum(0)
            return updates.MinibatchSums(sums, torch.stack([part.deviation for part in parts]).max(), tokens, tokens)

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


@plant
def value_coefficient_ignored(monkeypatch):
    def make(right):
        def wrong(state, rollout, scores, targets, minibatch, config, *rest):
            config = dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, value_coef=1.0))
            return right(state, rollout, scores, targets, minibatch, config, *rest)

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

    replace(monkeypatch, "clipped_policy_losses", make)


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
            if values_BT is not None:
                values_BT = torch.cat([values_BT[:, 1:], values_BT[:, -1:]], dim=1)
            return logp_BT, entropies_BT, values_BT

        return wrong

    replace(monkeypatch, "evaluate_rows", make, updates, scoring)


@plant
def whitening_over_the_padding(monkeypatch):
    def make(right):
        return lambda x, mask, shift_mean=True: right(x, torch.ones_like(mask), shift_mean=shift_mean)

    replace(monkeypatch, "whiten", make, targets)


# -- rewards, advantages, returns --------------------------------------------------------------------------------------


@plant
def gamma_and_lambda_swapped(monkeypatch):
    replace(monkeypatch, "gae", lambda right: lambda *args, gamma, lam: right(*args, gamma=lam, lam=gamma), targets)


@plant
def returns_from_whitened_advantages(monkeypatch):
    def make(right):
        def wrong(rewards_BT, values_BT, mask_BT, config):
            found, raw_BT = right(rewards_BT, values_BT, mask_BT, config)
            returns_BT = torch.where(mask_BT, targets.whiten(raw_BT, mask_BT) + values_BT, 0.0)
            return dataclasses.replace(found, returns_BT=returns_BT), raw_BT

        return wrong

    replace(monkeypatch, "make_targets", make)


@plant
def returns_without_the_value(monkeypatch):
    def make(right):
        def wrong(*args, **kwargs):
            advantages_BT, _ = right(*args, **kwargs)
            return advantages_BT, advantages_BT

        return wrong

    replace(monkeypatch, "gae", make, targets)


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

    replace(monkeypatch, "whiten", make, targets)


@plant
def reward_whitening_takes_the_mean_out(monkeypatch):
    replace(
        monkeypatch, "whiten", lambda right: lambda x, mask, shift_mean=True: right(x, mask, shift_mean=True), targets
    )


@plant
def penalty_for_the_responses_that_ended(monkeypatch):
    replace(
        monkeypatch, "penalize_missing_eos", lambda right: lambda scores, ended, penalty: right(scores, ~ended, penalty)
    )


@plant
def reference_at_another_temperature(monkeypatch):
    def make(right):
        def wrong(model, reference, rollout, plan, temperature, dtype):
            scores, cold = (right(model, reference, rollout, plan, tau, dtype) for tau in (temperature, 1.0))
            return dataclasses.replace(scores, ref_logprobs_BT=cold.ref_logprobs_BT)

        return wrong

    replace(monkeypatch, "score_rollout", make)


@plant
def kl_controller_inverted(monkeypatch):
    def make(right):
        return lambda coef, kl, *, target, **kwargs: right(coef, target, target=kl, **kwargs)

    replace(monkeypatch, "adapt_kl_coef", make)


# -- the ratio and the epochs ------------------------------------------------------------------------------------------


@plant
def temperature_missing_in_the_trainer(monkeypatch):
    def make(right):
        return lambda model, rollout, rows, temperature, *rest: right(model, rollout, rows, 1.0, *rest)

    replace(monkeypatch, "evaluate_rows", make, updates, scoring)


@plant
def clipping_takes_the_larger_objective(monkeypatch):
    def make(right):
        def wrong(log_ratio_BT, advantages_BT, mask_BT, *, clip_range):
            ratio_BT = torch.where(mask_BT, log_ratio_BT, 0.0).exp()
            clipped_BT = ratio_BT.clamp(1 - clip_range, 1 + clip_range)
            losses_BT = torch.minimum(-ratio_BT * advantages_BT, -clipped_BT * advantages_BT)
            return torch.where(mask_BT, losses_BT, 0.0)

        return wrong

    replace(monkeypatch, "clipped_policy_losses", make)


@plant
def clipping_whatever_the_sign(monkeypatch):
    def make(right):
        def wrong(log_ratio_BT, advantages_BT, mask_BT, *, clip_range):
            ratio_BT = torch.where(mask_BT, log_ratio_BT, 0.0).exp()
            clipped_BT = ratio_BT.clamp(1 - clip_range, 1 + clip_range)
            return torch.where(mask_BT, -clipped_BT * advantages_BT, 0.0)

        return wrong

    replace(monkeypatch, "clipped_policy_losses", make)


@plant
def no_clipping(monkeypatch):
    replace(monkeypatch, "clipped_policy_losses", lambda right: lambda *args, clip_range: right(*args, clip_range=1e9))


@plant
def value_clipping_takes_the_smaller_error(monkeypatch):
    def make(right):
        def wrong(values_BT, old_BT, returns_BT, mask_BT, *, clip_range):
            clipped_BT = old_BT + (values_BT - old_BT).clamp(-clip_range, clip_range)
            errors_BT = torch.minimum((values_BT - returns_BT) ** 2, (clipped_BT - returns_BT) ** 2)
            return 0.5 * torch.where(mask_BT, errors_BT, 0.0)

        return wrong

    replace(monkeypatch, "clipped_value_losses", make)


@plant
def value_loss_without_its_half(monkeypatch):
    replace(monkeypatch, "clipped_value_losses", lambda right: lambda *args, **kwargs: 2 * right(*args, **kwargs))


@plant
def old_logprobs_taken_anew_in_each_epoch(monkeypatch):
    def make(right):
        def wrong(state, rollout, scores, targets, minibatch, config, *rest):
            fresh = ppo.score_rollout(
                state.model, state.reference, rollout, [minibatch], config.sampling.temperature, config.dtype
            )
            scores = dataclasses.replace(scores, logprobs_BT=fresh.logprobs_BT)
            return right(state, rollout, scores, targets, minibatch, config, *rest)

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
    replace(monkeypatch, "clipped_policy_losses", lambda right: lambda *args, **kwargs: -right(*args, **kwargs))


@plant
def logged_kl_by_token(monkeypatch):
    def make(right):
        def wrong(**arrays):
            metrics = right(**arrays)
            return metrics | {"kl": metrics["kl"] / metrics["response_length_mean"]}

        return wrong

    replace(monkeypatch, "rollout_metrics", make)


@plant
def logged_entropy_over_the_padding(monkeypatch):
    def change(right):
        def wrong(**arrays):
            everywhere = arrays | {"mask": np.ones_like(arrays["mask"])}
            return right(**arrays) | {"entropy": right(**everywhere)["entropy"]}

        return wrong

    replace(monkeypatch, "rollout_metrics", change)


# -- the other algorithms ----------------------------------------------------------------------------------------------


def _estimator(monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Any], Any]) -> None:
    monkeypatch.setitem(targets.GROUP_ESTIMATORS, name, make(targets.GROUP_ESTIMATORS[name]))


@plant
def rloo_baseline_with_the_response_itself(monkeypatch):
    _estimator(monkeypatch, "leave-one-out", lambda right: targets.group_mean_advantages)


@plant
def groups_across_prompts(monkeypatch):
    for name in targets.GROUP_ESTIMATORS:

        def make(right):
            def wrong(returns_B, group_size):
                order = torch.arange(len(returns_B)).reshape(group_size, -1).T.flatten()
                return right(returns_B[order], group_size)[order.argsort()]

            return wrong

        _estimator(monkeypatch, name, make)


@plant
def population_deviation_in_the_standard_score(monkeypatch):
    _estimator(
        monkeypatch,
        "group-standard-score",
        lambda right: lambda returns_B, k: right(returns_B, k) * (k / (k - 1)) ** 0.5,
    )


@plant
def kl_loss_sign(monkeypatch):
    replace(monkeypatch, "kl_losses", lambda right: lambda *args: -right(*args))


@plant
def kl_loss_of_the_ratio_the_other_way_round(monkeypatch):
    replace(monkeypatch, "kl_losses", lambda right: lambda estimator, x, log_ratio: right(estimator, -x, log_ratio))


@plant
def length_normalised_by_the_longest_of_the_batch(monkeypatch):
    replace(monkeypatch, "loss_count", lambda right: lambda mask, mean, longest: right(mask, mean, longest - 1))


# -- and what else peers have got wrong --------------------------------------------------------------------------------


@plant
def gae_scanning_forward(monkeypatch):
    """A token's advantage gathers the errors before it, and not those behind."""

    def make(right):
        def wrong(rewards_BT, values_BT, mask_BT, *, gamma, lam):
            errors_BT = right(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=0.0)[0]
            advantages_BT = errors_BT.clone()
            for t in range(1, mask_BT.shape[1]):
                advantages_BT[:, t] += gamma * lam * advantages_BT[:, t - 1]
            advantages_BT = torch.where(mask_BT, advantages_BT, 0.0)
            return advantages_BT, torch.where(mask_BT, advantages_BT + values_BT, 0.0)

        return wrong

    replace(monkeypatch, "gae", make, targets)


@plant
def next_value_not_discounted(monkeypatch):
    """δ = r + V' − V: γ stands in γλ alone."""
    replace(
        monkeypatch,
        "gae",
        lambda right: lambda *args, gamma, lam: right(*args, gamma=1.0, lam=gamma * lam),
        targets,
    )


@plant
def kl_against_the_policy_of_the_rollout(monkeypatch):
    replace(
        monkeypatch,
        "token_rewards",
        lambda right: lambda scores, logp, ref, mask, **kwargs: right(scores, logp, logp, mask, **kwargs),
    )


@plant
def score_shared_by_all_tokens(monkeypatch):
    def make(right):
        def wrong(scores_B, logprobs_BT, ref_BT, mask_BT, **kwargs):
            rewards_BT = right(torch.zeros_like(scores_B), logprobs_BT, ref_BT, mask_BT, **kwargs)
            return rewards_BT + mask_BT * (scores_B / mask_BT.sum(dim=1))[:, None]

        return wrong

    replace(monkeypatch, "token_rewards", make)


@plant
def whitening_row_by_row(monkeypatch):
    def make(right):
        def wrong(x, mask, shift_mean=True):
            pairs = zip(x.split(1), mask.split(1), strict=True)
            return torch.cat([right(row, on, shift_mean=shift_mean) for row, on in pairs])

        return wrong

    replace(monkeypatch, "whiten", make, targets)


@plant
def whitening_minibatch_by_minibatch(monkeypatch):
    def make(right):
        def wrong(state, rollout, scores, found, minibatch, config, *rest):
            if config.ppo.recipe.whiten_advantages:
                rows = torch.cat(minibatch)
                white_BT = found.advantages_BT.clone()
                white_BT[rows] = targets.whiten(white_BT[rows], rollout.response_mask_BT[rows])
                found = dataclasses.replace(found, advantages_BT=white_BT)
            return right(state, rollout, scores, found, minibatch, config, *rest)

        return wrong

    replace(monkeypatch, "accumulate_gradients", make)


@plant
def loss_divided_by_the_number_of_micro_batches_too(monkeypatch):
    def make(right):
        def wrong(state, rollout, scores, found, minibatch, *rest):
            sums = right(state, rollout, scores, found, minibatch, *rest)
            for parameter in state.model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= len(minibatch)
            return sums

        return wrong

    replace(monkeypatch, "accumulate_gradients", make)


@plant
def a_minibatch_divides_by_the_tokens_of_the_batch(monkeypatch):
    def make(right):
        def wrong(state, rollout, *rest):
            monkeypatch.setattr(updates, "loss_count", lambda mask, mean, longest: int(rollout.response_mask_BT.sum()))
            return right(state, rollout, *rest)

        return wrong

    replace(monkeypatch, "accumulate_gradients", make)


@plant
def value_clipped_around_the_return(monkeypatch):
    replace(
        monkeypatch,
        "clipped_value_losses",
        lambda right: lambda v, old, returns, mask, **kwargs: right(v, returns, returns, mask, **kwargs),
    )


@plant
def clip_range_of_the_log_ratio(monkeypatch):
    """|log ρ| < ε in place of |ρ − 1| < ε."""

    def make(right):
        def wrong(log_ratio_BT, advantages_BT, mask_BT, *, clip_range):
            near_BT = log_ratio_BT.clamp(-clip_range, clip_range).exp()
            losses_BT = torch.maximum(-log_ratio_BT.exp() * advantages_BT, -near_BT * advantages_BT)
            return torch.where(mask_BT, losses_BT, 0.0)

        return wrong

    replace(monkeypatch, "clipped_policy_losses", make)


@plant
def epsilon_of_trl_in_the_standard_score(monkeypatch):
    monkeypatch.setattr("rlhf_core.advantages.STANDARD_SCORE_EPSILON", 1e-4)


@plant
def groups_off_by_one(monkeypatch):
    for name in targets.GROUP_ESTIMATORS:
        _estimator(monkeypatch, name, lambda right: lambda returns_B, size: right(returns_B.roll(1), size).roll(-1))


@plant
def entropy_logged_without_the_temperature(monkeypatch):
    def make(right):
        def wrong(model, reference, rollout, plan, temperature, dtype):
            scores, cold = (right(model, reference, rollout, plan, tau, dtype) for tau in (temperature, 1.0))
            return dataclasses.replace(scores, entropies_BT=cold.entropies_BT)

        return wrong

    replace(monkeypatch, "score_rollout", make)


@plant
def approximate_kl_the_other_way_round(monkeypatch):
    replace(monkeypatch, "kl_k3", lambda right: lambda log_ratio_BT: right(-log_ratio_BT))


@plant
def clip_fraction_over_the_padding(monkeypatch):
    def make(right):
        def wrong(state, rollout, scores, found, minibatch, *rest):
            sums = right(state, rollout, scores, found, minibatch, *rest)
            return dataclasses.replace(sums, tokens=rollout.response_mask_BT[torch.cat(minibatch)].numel())

        return wrong

    replace(monkeypatch, "accumulate_gradients", make)


@plant
def explained_variance_against_the_values(monkeypatch):
    def make(right):
        def wrong(**arrays):
            metrics, mask = right(**arrays), arrays["mask"]
            if arrays["values"] is not None and (spread := arrays["values"][mask].var()) > 0:
                error = (arrays["returns"] - arrays["values"])[mask].var()
                metrics |= {"explained_variance": 1.0 - float(error / spread)}
            return metrics

        return wrong

    replace(monkeypatch, "rollout_metrics", make)
