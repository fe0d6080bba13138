"""Ten mistakes with a named cause, to plant into the real trainer."""

import dataclasses

import torch
from m4_planting import plants, replace

from rlhf_core import policy, targets

PLANTED, plant = plants()


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
