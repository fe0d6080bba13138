"""Mistakes in rewards, advantages, returns and whitening, to plant into the real trainer."""

import dataclasses

import torch
from m4_planting import plants, replace

from rlhf_core import scoring, targets, updates

PLANTED, plant = plants()


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
def score_shared_by_all_tokens(monkeypatch):
    def make(right):
        def wrong(scores_B, logprobs_BT, ref_BT, mask_BT, **kwargs):
            rewards_BT = right(torch.zeros_like(scores_B), logprobs_BT, ref_BT, mask_BT, **kwargs)
            return rewards_BT + mask_BT * (scores_B / mask_BT.sum(dim=1))[:, None]

        return wrong

    replace(monkeypatch, "token_rewards", make)


@plant
def penalty_for_the_responses_that_ended(monkeypatch):
    replace(
        monkeypatch, "penalize_missing_eos", lambda right: lambda scores, ended, penalty: right(scores, ~ended, penalty)
    )


@plant
def kl_against_the_policy_of_the_rollout(monkeypatch):
    replace(
        monkeypatch,
        "token_rewards",
        lambda right: lambda scores, logp, ref, mask, **kwargs: right(scores, logp, logp, mask, **kwargs),
    )


@plant
def kl_in_the_reward_is_k1_whatever_is_asked(monkeypatch):
    replace(
        monkeypatch,
        "token_rewards",
        lambda right: lambda *args, estimator, **kwargs: right(*args, estimator="k1", **kwargs),
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
def gamma_and_lambda_swapped(monkeypatch):
    replace(monkeypatch, "gae", lambda right: lambda *args, gamma, lam: right(*args, gamma=lam, lam=gamma), targets)


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
def whitening_over_the_padding(monkeypatch):
    def make(right):
        return lambda x, mask, shift_mean=True: right(x, torch.ones_like(mask), shift_mean=shift_mean)

    replace(monkeypatch, "whiten", make, targets)


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
def reward_whitening_takes_the_mean_out(monkeypatch):
    replace(
        monkeypatch, "whiten", lambda right: lambda x, mask, shift_mean=True: right(x, mask, shift_mean=True), targets
    )
