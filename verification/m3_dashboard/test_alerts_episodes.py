"""When alerts begin, pass and come again, and logs that grow."""

import itertools
import json

import numpy as np
import pytest
from alert_columns import SPOILED, THRESHOLDS, found, healthy, names_above_info, spoiled
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.alerting import series as windows
from rlhf_core.alerting.watch import in_words
from rlhf_core.alerts import Monitor, check, worst_first

pytestmark = pytest.mark.m3


# -- episodes ----------------------------------------------------------------------------------------------------------


def grad_norm(*parts):
    values = np.concatenate([np.full(count, level, dtype=float) for count, level in parts])
    return {"step": np.arange(1, len(values) + 1), "grad_norm": values}


def test_the_figures_of_an_alert_are_literal():
    alert = found(grad_norm((20, 1.0), (3, 50.0), (1, 40.0)))["grad_norm_spike"]
    assert (alert.first_step, alert.raised_step, alert.step) == (21, 21, 24)
    assert (alert.value, alert.threshold, alert.standing) == (40.0, 10.0, True)
    assert alert.metric == "grad_norm"
    assert "1 → 50" in alert.evidence


def test_an_alert_passes_after_enough_good_rows_and_may_come_again():
    [second, first] = check(grad_norm((20, 1.0), (2, 50.0), (40, 1.0), (1, 50.0)), THRESHOLDS)
    assert (first.first_step, first.step, first.standing) == (21, 22, False)
    assert (second.first_step, second.step, second.standing) == (63, 63, True)


def test_a_new_level_keeps_standing_although_it_has_become_usual():
    alert = found(grad_norm((20, 1.0), (500, 50.0)))["grad_norm_spike"]
    assert alert.standing
    assert alert.step == 520


def test_the_point_under_test_is_not_in_its_own_window():
    assert found(grad_norm((8, 1.0), (1, 10.1)))["grad_norm_spike"].threshold == 10.0


def test_of_many_episodes_the_first_and_the_latest_are_kept():
    columns = grad_norm((20, 1.0), *itertools.chain.from_iterable([((1, 50.0), (40, 1.0))] * 30))
    steps = sorted(alert.first_step for alert in check(columns, THRESHOLDS))
    assert steps == [21, *(21 + 41 * n for n in (26, 27, 28, 29))]


def test_what_moved_with_it_is_named_the_farthest_first():
    alert = found(spoiled(ratio_max_dev_first=0.2, entropy=3.0, grad_norm=90.0))["ratio_off_one"]
    assert alert.moved_with[0] == "grad_norm"
    assert "entropy" in alert.moved_with
    assert "kl_coef" not in alert.moved_with
    assert "grad_norm 0.9" in alert.evidence or "grad_norm 1" in alert.evidence


def test_the_metric_that_is_not_finite_is_named():
    columns = spoiled(policy_loss=np.array([np.nan]), since=59) | {"mine": np.full(60, np.inf)}
    alert = found(columns)["nonfinite"]
    assert alert.metric in ("policy_loss", "mine")
    assert alert.severity == "critical"
    assert "mine is not finite" in alert.evidence


def test_what_is_not_finite_has_no_value_and_no_threshold_and_all_of_it_is_named():
    columns = healthy()
    for name, row in (("kl", 30), ("reward_mean", 30), ("entropy", 31), ("lr", 50)):
        columns[name][row] = np.nan
    for cut in (60, 31, 45, 1):
        monitor = Monitor(THRESHOLDS)
        for start in range(0, 60, cut):
            monitor.extend({name: column[start : start + cut] for name, column in columns.items()})
        [alert] = [alert for alert in monitor.alerts() if alert.name == "nonfinite"]
        assert (alert.value, alert.threshold) == (None, None)
        named = [alert.metric, *alert.moved_with]
        assert (sorted(named[:2]), named[2:]) == (["kl", "reward_mean"], ["entropy", "lr"])
        assert all(f"{name} is not finite" in alert.evidence for name in named)
        assert "is not finite (" in in_words(alert)
        assert "against" not in in_words(alert)


def test_a_metric_that_fell_slowly_is_set_against_what_the_run_began_with():
    columns = healthy(60)
    columns["reward_mean"] = np.concatenate([np.full(6, 1.0), np.full(54, -1.0)])
    assert found(columns)["reward_falling"].evidence.startswith("reward_mean -1, 1 at the beginning")
    columns["reward_mean"] = np.concatenate([np.full(10, 1.0), np.full(50, -1.0)])
    assert found(columns)["reward_falling"].evidence.startswith("reward_mean 1 → -1")


@pytest.mark.parametrize("size", [1e308, -1e308, 1.7e308])
def test_numbers_near_the_largest_are_judged_without_a_warning(size):
    alternating = size * np.where(np.arange(60) % 2, 1.0, -1.0)
    for values in (np.full(60, size), alternating):
        columns = {"step": np.arange(1, 61)} | {name: values for name in healthy() if name != "step"}
        for some in (columns, healthy() | {"reward_mean": values}):
            for alert in check(some, THRESHOLDS):
                json.dumps(alert.to_json(), allow_nan=False)


def test_what_is_not_finite_never_passes():
    columns = healthy(1000)
    columns["kl"][3] = np.inf
    alert = found(columns)["nonfinite"]
    assert (alert.first_step, alert.step, alert.standing) == (4, 4, True)


def test_what_is_masked_was_not_logged():
    columns = spoiled(policy_loss=np.nan)
    columns["policy_loss"] = np.ma.masked_invalid(columns["policy_loss"])
    assert names_above_info(columns) == set()


def test_a_rule_without_its_metric_is_listed_and_not_guessed():
    monitor = Monitor(THRESHOLDS)
    monitor.extend({"step": np.arange(3), "entropy": np.ones(3), "kl": np.ones(3)})
    missing = monitor.not_checked()
    assert missing["clip_frac_high"] == ("clip_frac",)
    assert missing["kl_coef_zero"] == ("kl_coef",)
    assert "entropy_collapse" not in missing
    assert "nonfinite" not in missing


def test_a_run_is_stalled_when_its_last_row_is_old_for_its_steps():
    columns = healthy(30)  # steps of half a second
    assert "stalled" not in found(columns)
    assert "stalled" not in found(columns, age_of_last_row_s=59.0)
    alert = found(columns, age_of_last_row_s=61.0)["stalled"]
    assert (alert.severity, alert.threshold, alert.step) == ("warning", 60.0, 30)
    columns["step_time_s"] = np.full(30, 600.0)
    assert "stalled" not in found(columns, age_of_last_row_s=3600.0)
    assert "stalled" in found(columns, age_of_last_row_s=12_001.0)


def test_worst_first_puts_standing_alerts_before_passed_ones():
    alerts_found = check(spoiled(entropy=0.01, eos_rate=0.0, clip_frac=0.0), THRESHOLDS)
    order = [alert.severity for alert in alerts_found]
    assert order == sorted(order, key=["critical", "warning", "info"].index)
    assert worst_first(reversed(alerts_found)) == alerts_found


# -- a log that grows --------------------------------------------------------------------------------------------------


def sparse(columns, seed):
    """Leave metrics out of some rows, as trainers do that log at intervals."""
    rng = np.random.default_rng(seed)
    return {
        name: column if name == "step" else np.ma.masked_array(column, rng.random(len(column)) < 0.2)
        for name, column in columns.items()
    }


@settings(max_examples=20, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 150), max_size=12),
    name=st.sampled_from(sorted(SPOILED)),
    seed=st.integers(0, 3),
    holes=st.booleans(),
)
def test_alerts_do_not_depend_on_how_the_log_was_cut(cuts, name, seed, holes):
    columns = spoiled(150, seed, since=70, **{k: v for k, v in SPOILED[name].items() if np.isscalar(v)})
    columns = sparse(columns, seed) if holes else columns
    monitor, raised = Monitor(THRESHOLDS), []
    for start, end in itertools.pairwise([0, *sorted(cuts), 150]):
        raised += monitor.extend({key: column[start:end] for key, column in columns.items()})
    assert monitor.alerts() == check(columns, THRESHOLDS)
    assert {alert.name for alert in raised} == {alert.name for alert in monitor.alerts()}


def test_rows_one_by_one_give_what_the_whole_gives():
    columns = spoiled(entropy=0.1, ratio_max_dev_first=0.1)
    monitor = Monitor(THRESHOLDS)
    raised_at = {}
    for row in range(60):
        for alert in monitor.extend({name: column[row : row + 1] for name, column in columns.items()}):
            raised_at[alert.name] = row + 1
    assert raised_at["ratio_off_one"] == 31
    assert raised_at["entropy_collapse"] == 33
    assert monitor.alerts() == check(columns, THRESHOLDS)


def test_a_monitor_keeps_a_bounded_number_of_rows():
    monitor = Monitor(THRESHOLDS)
    columns = healthy(1000)
    for _ in range(3):
        monitor.extend(columns)
    kept = [column for track in monitor._tracks for column in track.tail.values()] + list(monitor._tail.values())
    assert max(len(column) for column in kept) <= 2 * windows.CONTEXT


def test_a_long_log_takes_seconds_and_not_minutes():
    columns = healthy(200_000)
    alerts_found = check(columns, THRESHOLDS)
    assert all(alert.severity in ("info", "warning") for alert in alerts_found)


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({}, "no 'step'"),
        ({"kl": np.ones(3)}, "no 'step'; they are kl"),
        ({"step": np.arange(3), "kl": np.ones(2)}, "'kl' has shape \\(2,\\)"),
        ({"step": np.arange(4).reshape(2, 2)}, "have to be \\[N\\]"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns, complaint):
    with pytest.raises(ValueError, match=complaint):
        check(columns, THRESHOLDS)


def test_no_rows_are_no_alerts():
    assert check({"step": np.array([])}, THRESHOLDS) == []
    assert check({"step": np.array([], dtype=int), "kl": np.array([])}, THRESHOLDS, age_of_last_row_s=1e9) == []
