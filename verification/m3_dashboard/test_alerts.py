import numpy as np
import pytest
from alert_columns import DATA, SPOILED, controlled, found, healthy, names_above_info, spoiled

from rlhf_core.alerting.rules import RULES

pytestmark = pytest.mark.m3


# -- healthy, and one thing spoiled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("rows", [1, 2, 5, 9, 60, 300])
def test_a_healthy_run_raises_no_alert_above_info(rows, seed):
    assert names_above_info(healthy(rows, seed)) == set()


@pytest.mark.parametrize("name", SPOILED)
def test_each_rule_finds_what_it_is_for_within_ten_steps_and_says_since_when(name):
    alert = found(spoiled(since=30, **SPOILED[name]))[name]
    assert alert.first_step >= 31 - 8  # a rule about eight rows together may begin with the rows before
    assert 31 <= alert.raised_step <= 40
    assert alert.standing
    assert alert.step == 60
    assert alert.cause
    assert alert.remedy
    assert alert.evidence


def test_the_rules_that_have_no_column_here_are_tested_below():
    assert {rule.name for rule in RULES} - SPOILED.keys() == {
        "steps_out_of_order", "groups_without_signal", "reward_flat",
    }  # fmt: skip


@pytest.mark.parametrize("steps", [[1, 2, 3, 3, 4], [1, 2, 3, 2, 3]])
def test_steps_that_repeat_or_go_back_are_found(steps):
    alert = found({"step": np.array(steps), "entropy": np.ones(5)})["steps_out_of_order"]
    assert alert.first_step == steps[3]


def test_steps_that_leave_some_out_are_fine():
    assert found({"step": np.array([10, 20, 40, 400]), "entropy": np.ones(4)}) == {}


def test_groups_of_equal_rewards_are_found():
    columns = {"step": np.arange(8), "reward_zero_std_frac": np.full(8, 0.95)}
    assert set(found(columns)) == {"groups_without_signal"}


def test_a_flat_reward_is_worth_a_word_and_no_more():
    columns = spoiled(120, since=0, reward_mean=0.1 * DATA / 7)
    assert found(columns)["reward_flat"].severity == "info"
    assert "reward_flat" not in found(healthy(120))


def test_a_policy_whose_log_has_a_signed_kl_is_not_called_frozen():
    """verl and OpenRLHF log the mean of -log ratio."""
    columns = healthy(120)
    signs = np.where(np.arange(120) % 7 < 3, -1.0, 1.0)
    assert "policy_frozen" not in found(columns | {"approx_kl": columns["approx_kl"] * signs})


def test_a_policy_that_updates_once_a_rollout_is_not_called_frozen():
    assert "policy_frozen" not in found(spoiled(since=0, approx_kl=0.0))


def test_a_policy_that_has_collapsed_is_not_said_to_be_sampled_wrongly():
    """All but rare draws have x = −log π − entropy just below 0, so that z is near −√tokens in every step."""
    assert "not_drawn_from_policy" in found(spoiled(sampling_z=-7.2))
    assert "not_drawn_from_policy" not in found(spoiled(sampling_z=-7.2, entropy=1e-8))


KL_AROUND_6 = 6.0 + 0.3 * DATA[:60]


def with_controller(since=0, **controller):
    columns = healthy() | {"kl": KL_AROUND_6}
    right, other = controlled(KL_AROUND_6), controlled(KL_AROUND_6, **controller)
    turned = np.diff(np.log(other["kl_coef"]), prepend=np.log(0.1)) * (np.arange(60) > since)
    coefficient = np.exp(np.log(right["kl_coef"][since]) + np.cumsum(turned))
    return columns | right | {"kl_coef": np.where(np.arange(60) > since, coefficient, right["kl_coef"])}


def controller_alert(columns):
    return found({name: columns[name] for name in ("step", "kl", "kl_target_error", "kl_coef")}).get(
        "kl_controller_off"
    )


@pytest.mark.parametrize("since", [0, 30])
def test_a_controller_that_is_turned_round_is_found_within_four_steps(since):
    alert = controller_alert(with_controller(since, sign=-1))
    assert since + 2 <= alert.raised_step <= since + 4
    assert alert.severity == "critical"


def test_a_controller_that_holds_its_target_is_right_on_either_side_and_across_it():
    for kl in (KL_AROUND_6 - 5, KL_AROUND_6, KL_AROUND_6 + 30):
        rounded = {name: np.round(column, 8) for name, column in controlled(kl).items()}
        assert controller_alert({"step": np.arange(60), "kl": np.round(kl, 8)} | rounded) is None


def test_a_controller_is_not_judged_by_what_a_log_does_not_tell():
    fixed = {"kl_target_error": np.abs(KL_AROUND_6 - 6), "kl_coef": np.full(60, 0.1)}
    columns = {"step": np.arange(60), "kl": KL_AROUND_6}
    assert controller_alert(columns | fixed) is None
    turned = columns | controlled(KL_AROUND_6, sign=-1)
    assert controller_alert(turned | {"step": 10 * np.arange(60)}) is None  # ten changes between two rows
    tiny = np.round(turned["kl_coef"] * 1e-5, 8)  # whose changes are lost in rounding
    assert controller_alert(turned | {"kl_coef": tiny}) is None


def test_small_batches_cannot_show_that_length_is_paid_for():
    columns = spoiled(since=0, reward_length_corr=0.95)
    columns["response_tokens"] = 2 * columns["response_length_mean"]  # two sequences: always 1 or −1
    assert "reward_pays_for_length" not in found(columns)


def test_severity_rises_with_the_value():
    assert found(spoiled(entropy=0.3))["entropy_collapse"].severity == "warning"
    assert found(spoiled(entropy=0.04))["entropy_collapse"].severity == "critical"
    assert found(spoiled(grad_norm=30.0))["grad_norm_spike"].severity == "warning"
    assert found(spoiled(grad_norm=500.0))["grad_norm_spike"].severity == "critical"


def test_a_single_bad_step_is_forgiven_where_the_rule_asks_for_several():
    columns = spoiled(entropy=np.array([0.1]), since=59)
    assert "entropy_collapse" not in found(columns)
    assert "ratio_off_one" in found(spoiled(ratio_max_dev_first=np.array([0.1]), since=59))
