"""Mistakes in the losses of tokens and in their gradients, to plant into the real trainer."""

import dataclasses

import torch
from m4_planting import plants, replace

from rlhf_core import scoring, updates

PLANTED, plant = plants()


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
def mean_of_each_sequence_first(monkeypatch):
    def make(right):
        def wrong(log_ratio_BT, advantages_BT, mask_BT, **kwargs):
            counts_B1 = mask_BT.sum(dim=1, keepdim=True)
            weights_BT = mask_BT.sum() / len(mask_BT) / counts_B1
            return right(log_ratio_BT, advantages_BT * weights_BT, mask_BT, **kwargs)

        return wrong

    replace(monkeypatch, "clipped_policy_losses", make)


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
def clip_range_of_a_fifth_whatever_is_asked(monkeypatch):
    replace(monkeypatch, "clipped_policy_losses", lambda right: lambda *args, clip_range: right(*args, clip_range=0.2))


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
def value_clipping_without_the_maximum(monkeypatch):
    """The error of the clipped value alone: a value that overshot its return stays where it is."""

    def make(right):
        def wrong(values_BT, old_BT, returns_BT, mask_BT, *, clip_range):
            clipped_BT = old_BT + (values_BT - old_BT).clamp(-clip_range, clip_range)
            return 0.5 * torch.where(mask_BT, (clipped_BT - returns_BT) ** 2, 0.0)

        return wrong

    replace(monkeypatch, "clipped_value_losses", make)


@plant
def value_clipped_around_the_return(monkeypatch):
    replace(
        monkeypatch,
        "clipped_value_losses",
        lambda right: lambda v, old, returns, mask, **kwargs: right(v, returns, returns, mask, **kwargs),
    )


@plant
def value_loss_without_its_half(monkeypatch):
    replace(monkeypatch, "clipped_value_losses", lambda right: lambda *args, **kwargs: 2 * right(*args, **kwargs))


@plant
def value_coefficient_ignored(monkeypatch):
    def make(right):
        def wrong(state, rollout, scores, targets, minibatch, config, *rest):
            config = dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, value_coef=1.0))
            return right(state, rollout, scores, targets, minibatch, config, *rest)

        return wrong

    replace(monkeypatch, "accumulate_gradients", make)


@plant
def ascent_instead_of_descent(monkeypatch):
    replace(monkeypatch, "clipped_policy_losses", lambda right: lambda *args, **kwargs: -right(*args, **kwargs))
