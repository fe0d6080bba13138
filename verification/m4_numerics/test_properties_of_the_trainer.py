"""The named properties hold for the real trainer, and a planted mistake breaks exactly those that it should."""

import tomllib
from pathlib import Path

import pytest
from m4_planted import PLANTED, TEN

from rlhf_core.testing.kit_trainer import kit_trainer
from rlhf_core.testing.oracle import oracle_trainer
from rlhf_core.testing.properties import PROPERTIES, broken

pytestmark = pytest.mark.m4

BROKEN_BY = tomllib.loads((Path(__file__).parent / "broken_by.toml").read_text(encoding="utf-8"))
"""Each planted mistake with the properties that it breaks, what others rest on first: the first is its cause."""


@pytest.mark.parametrize("name", PROPERTIES)
def test_the_trainer_has_the_property(name):
    PROPERTIES[name].check(kit_trainer)


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


def test_a_trainer_that_cannot_do_something_is_not_accused_of_it():
    def ppo_only(case):
        if case.ppo["algorithm"] != "ppo" or {"advantage", "kl_place", "loss_mean"} & case.ppo.keys():
            raise NotImplementedError
        return oracle_trainer(case)

    assert broken(ppo_only) == {}


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
