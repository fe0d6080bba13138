"""The named properties hold for the real trainer, and a planted mistake breaks exactly those that it should."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
from m4_planted import PLANTED, TEN

from rlhf_core.testing.claims import algorithms, rewards, runs, tokens
from rlhf_core.testing.kit_trainer import kit_trainer
from rlhf_core.testing.oracle import oracle_trainer
from rlhf_core.testing.properties import PROPERTIES, broken, examine

pytestmark = pytest.mark.m4

BROKEN_BY = tomllib.loads((Path(__file__).parent / "broken_by.toml").read_text(encoding="utf-8"))
"""Each planted mistake with the properties that it breaks, what others rest on first: the first is its cause."""


@pytest.mark.parametrize("name", PROPERTIES)
def test_the_trainer_has_the_property(name):
    PROPERTIES[name].check(kit_trainer)


def test_every_check_of_a_trainer_is_a_property():
    modules = (tokens, rewards, runs, algorithms)
    checks = {
        name
        for module in modules
        for name, check in vars(module).items()
        if getattr(check, "__module__", None) == module.__name__ and not name.startswith("_")
    }
    assert checks == set(PROPERTIES)


def test_the_oracle_has_every_property():
    assert broken(oracle_trainer) == {}


def test_every_property_is_broken_by_a_planted_mistake():
    assert {name for names in BROKEN_BY.values() for name in names} == set(PROPERTIES)


def test_every_mistake_is_listed_and_the_ten_with_a_named_cause_come_first():
    assert list(BROKEN_BY) == list(PLANTED)
    assert len(TEN) == 10
    assert list(PLANTED)[:10] == list(TEN)


CAUSES = {
    "labels_shifted_by_one_too_few": "labels_are_shifted_by_one",
    "score_on_the_first_token": "score_on_last_token",
    "padding_in_the_mean": "policy_mean",
    "value_not_masked": "no_value_behind_the_end",
    "whitening_with_the_mean_left_in": "whitened_mean",
    "kl_sign": "kl_direction",
    "kl_coefficient_twice": "kl_size",
    "missing_detach_of_the_advantages": "advantages_are_constants",
    "bootstrapping_past_the_end": "no_bootstrap",
    "old_logprobs_at_another_temperature": "first_ratio",
}


def assert_names_what_broke(mistake, monkeypatch):
    PLANTED[mistake](monkeypatch)
    found = broken(kit_trainer)
    report = "\n".join(f"{name}: {PROPERTIES[name].claim}\n    {why}" for name, why in found.items())
    assert list(found) == BROKEN_BY[mistake], f"{mistake} breaks\n{report}"


@pytest.mark.parametrize("mistake", TEN)
def test_a_mistake_with_a_named_cause_breaks_the_property_of_that_name_first(mistake, monkeypatch):
    assert BROKEN_BY[mistake][0] == CAUSES[mistake]
    assert_names_what_broke(mistake, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [name for name in PLANTED if name not in TEN])
def test_another_mistake_is_named_by_what_it_breaks(mistake, monkeypatch):
    assert_names_what_broke(mistake, monkeypatch)


ALGORITHMS = [name for name, item in PROPERTIES.items() if item.check.__module__ == algorithms.__name__]


def test_what_a_trainer_cannot_do_is_left_out_and_named():
    def ppo_only(case):
        if case.ppo["algorithm"] != "ppo" or {"advantage", "kl_place", "loss_mean"} & case.ppo.keys():
            raise NotImplementedError("PPO alone")
        return oracle_trainer(case)

    verdict = examine(ppo_only)
    assert verdict.broken == {}
    assert verdict.left_out == dict.fromkeys(ALGORITHMS, "PPO alone")


def test_a_choice_that_a_trainer_lacks_hides_no_other():
    def wrong_sums(case):
        if case.ppo["loss_mean"] == "token":
            raise NotImplementedError
        return oracle_trainer(case.change(settings={"loss_mean": "token"} if case.ppo["loss_mean"] == "sum" else {}))

    with pytest.raises(AssertionError, match="off by"):
        PROPERTIES["loss_means"].check(wrong_sums)


def logging(change):
    """The oracle with other metrics, for as many steps as it is asked."""

    def trainer(case):
        outcome = oracle_trainer(case)
        return dataclasses.replace(outcome, metrics=change(outcome.metrics))

    return trainer


@pytest.mark.parametrize(("name", "first"), [("rollout_log", "kl, kl_k3"), ("update_log", "policy_loss, value_loss")])
def test_a_trainer_that_logs_nothing_is_not_asked_for_it(name, first):
    with pytest.raises(NotImplementedError, match=f"^not logged: {first}"):
        PROPERTIES[name].check(logging(lambda metrics: {}))


def test_of_a_log_with_gaps_what_is_there_is_asked():
    with pytest.raises(NotImplementedError, match="^not logged: kl_k3, kl_coef, entropy"):
        PROPERTIES["rollout_log"].check(logging(lambda metrics: {"kl": metrics["kl"]}))
    with pytest.raises(AssertionError, match=r"^kl is -0\.\d+, not -0\.\d+$"):
        PROPERTIES["rollout_log"].check(logging(lambda metrics: {"kl": metrics["kl"] / 2}))


@pytest.mark.parametrize(
    "name", ["labels_are_shifted_by_one", "score_on_last_token", "reaches_back", "policy_mean", "reference", "whole"]
)
def test_a_trainer_in_float32_is_told_so(name):
    def rounding_trainer(case):
        outcome = oracle_trainer(case)
        tables = {at: getattr(outcome, at).float() for at in ("policy_SV", "values_S", "reference_SV")}
        return dataclasses.replace(outcome, **tables)

    with pytest.raises(AssertionError, match="the size of float32's rounding; train in float64"):
        PROPERTIES[name].check(rounding_trainer)


def test_a_trainer_that_refuses_everything_is_not_called_right():
    def refusing(case):
        raise NotImplementedError

    with pytest.raises(ValueError, match="nothing was asked"):
        broken(refusing)


def test_torchs_clipping_is_clipping(monkeypatch):
    """It divides by the norm plus 1e-6, which nobody has to call a mistake."""
    from rlhf_core import updates

    def clip_as_torch_does(grads, norm, max_norm):
        factor = min(1.0, max_norm / (norm + 1e-6))
        for grad in grads:
            grad.mul_(factor)

    monkeypatch.setattr(updates, "clip_gradients", clip_as_torch_does)
    PROPERTIES["clipped_norm"].check(kit_trainer)


def test_a_trainer_that_does_nothing_has_next_to_no_property():
    from rlhf_core.testing.case import Outcome

    def idle(case):
        return Outcome(case.policy_SV, case.values_S, case.reference_SV, case.ppo["kl_coef"])

    assert len(broken(idle)) > 30
