"""Mistakes in the other algorithms, to plant into the real trainer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from m4_planting import plants, replace

from rlhf_core import targets

PLANTED, plant = plants()


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
def groups_off_by_one(monkeypatch):
    for name in targets.GROUP_ESTIMATORS:
        _estimator(monkeypatch, name, lambda right: lambda returns_B, size: right(returns_B.roll(1), size).roll(-1))


@plant
def population_deviation_in_the_standard_score(monkeypatch):
    _estimator(
        monkeypatch,
        "group-standard-score",
        lambda right: lambda returns_B, k: right(returns_B, k) * (k / (k - 1)) ** 0.5,
    )


@plant
def epsilon_of_trl_in_the_standard_score(monkeypatch):
    monkeypatch.setattr("rlhf_core.advantages.STANDARD_SCORE_EPSILON", 1e-4)


@plant
def reward_to_go_without_its_discount(monkeypatch):
    def make(right):
        def wrong(rewards_BT, values_BT, mask_BT, config):
            if config.recipe.advantage == "reward-to-go":
                config = dataclasses.replace(config, gamma=1.0)
            return right(rewards_BT, values_BT, mask_BT, config)

        return wrong

    replace(monkeypatch, "make_targets", make)


@plant
def kl_loss_sign(monkeypatch):
    replace(monkeypatch, "kl_losses", lambda right: lambda *args: -right(*args))


@plant
def kl_loss_of_the_ratio_the_other_way_round(monkeypatch):
    replace(monkeypatch, "kl_losses", lambda right: lambda estimator, x, log_ratio: right(estimator, -x, log_ratio))


@plant
def kl_loss_with_the_first_coefficient(monkeypatch):
    """The coefficient is adapted, logged and used in rewards; the loss keeps the configured one."""

    def make(right):
        def wrong(state, rollout, scores, found, rows, outputs, config):
            first = dataclasses.replace(state, kl_coef=config.ppo.kl_coef)
            return right(first, rollout, scores, found, rows, outputs, config)

        return wrong

    replace(monkeypatch, "micro_batch_losses", make)


@plant
def length_normalised_by_the_longest_of_the_batch(monkeypatch):
    replace(
        monkeypatch,
        "loss_count",
        lambda right: lambda mask, mean, longest: right(mask, mean, int(mask.sum(dim=1).max())),
    )
