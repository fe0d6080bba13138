import ast
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from alert_columns import controlled, healthy, spoiled
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core import alerts
from rlhf_core.alerting import judges, rules
from rlhf_core.alerting import series as windows
from rlhf_core.alerting.rules import BY_NAME, QUESTIONS, RULES, STALLED
from rlhf_core.alerting.series import WINDOW, Series, median_by_row, run_lengths
from rlhf_core.alerting.thresholds import default_thresholds, read_thresholds
from rlhf_core.alerting.watch import in_words
from rlhf_core.alerts import Alert, Monitor, check, synthetic_alerts, worst_first

pytestmark = pytest.mark.m3

THRESHOLDS = default_thresholds()
DATA = np.sin(np.arange(1000.0)) * 1000 % 7  # some numbers without order


def found(columns, **options):
    return {alert.name: alert for alert in check(columns, THRESHOLDS, **options)}


def names_above_info(columns):
    return {alert.name for alert in check(columns, THRESHOLDS) if alert.severity != "info"}


# -- healthy, and one thing spoiled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("rows", [1, 2, 5, 9, 60, 300])
def test_a_healthy_run_raises_no_alert_above_info(rows, seed):
    assert names_above_info(healthy(rows, seed)) == set()


RISING = np.linspace(1.3, 5.0, 40)

SPOILED = {
    "nonfinite": {"policy_loss": np.nan},
    "ratio_off_one": {"ratio_max_dev_first": 0.01},
    "gradient_off_closed_form": {"first_gradient_error": 0.3},
    "targets_off_definition": {"target_error": 0.02},
    "sampler_trainer_mismatch": {"rollout_logprob_diff_p99": 0.2},
    "not_drawn_from_policy": {"sampling_z": 4.0},
    "tokens_after_end": {"tokens_after_eos": 3.0},
    "kl_controller_off": {"kl_coef": 0.1 * 1.001 ** np.arange(30)},
    "kl_blow_up": {"kl": 40.0},
    "kl_jump": {"kl": 60.0},
    "kl_collapse": {"kl": 0.0},
    "kl_negative": {"kl": -1.0},
    "kl_coef_zero": {"kl_coef": 0.0},
    "step_too_large": {"approx_kl": 0.8},
    "clip_frac_high": {"clip_frac": 0.6},
    "clip_frac_zero": {"clip_frac": 0.0},
    "policy_frozen": {"approx_kl": 0.0},
    "lr_zero": {"lr": 0.0},
    "grad_norm_spike": {"grad_norm": 30.0},
    "no_gradient": {"grad_norm": 0.0},
    "entropy_collapse": {"entropy": 0.2},
    "entropy_blow_up": {"entropy": 6.0},
    "value_loss_jump": {"value_loss": 5.0},
    "value_dominates": {"value_gradient_share": 0.999},
    "reward_variance_gone": {"reward_var": 0.0},
    "advantages_gone": {"adv_var": 0.0},
    "reward_falling": {"reward_mean": -1.0 + 0.1 * DATA / 7},
    "reward_pays_for_length": {"reward_length_corr": 0.9},
    "reward_hacking_length": {"reward_mean": RISING, "response_length_mean": 8 * RISING},
    "reward_hacking_kl": {"reward_mean": RISING, "kl": 25.0},
    "value_explains_nothing": {"explained_variance": -1.0},
    "value_biased": {"return_mean": 5.0},
    "all_truncated": {"eos_rate": 0.0},
    "length_collapse": {"response_length_mean": 1.0},
    "throughput_drop": {"tokens_per_second": 100.0},
    "memory_growth": {"peak_mem_bytes": 3e9},
}


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


# -- windows -----------------------------------------------------------------------------------------------------------


def series(values, offset=0):
    return Series({"step": np.arange(len(values)), "x": np.asarray(values, float)}, offset, {"x": np.array(values[:5])})


def test_a_baseline_is_the_median_and_spread_of_earlier_rows_alone():
    values = list(DATA[:100])
    median, spread = series(values).baseline("x")
    for row in range(100):
        before = values[max(0, row - row % 4 - WINDOW) : row - row % 4]
        if len(before) < 8:
            assert np.isnan(median[row])
        else:
            assert median[row] == pytest.approx(np.median(before))
            assert spread[row] == pytest.approx(1.4826 * np.median(np.abs(np.array(before) - np.median(before))))


def test_medians_leave_out_nan():
    x = np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, 5.0], [2.0, 1.0, 7.0]])
    assert median_by_row(x, 2).tolist()[::2] == [2.0, 2.0]
    assert np.isnan(median_by_row(x, 2)[1])


def test_run_lengths_count_on_from_before():
    flags = np.array([True, True, False, True, False, False, True])
    assert run_lengths(flags, 0).tolist() == [1, 2, 0, 1, 0, 0, 1]
    assert run_lengths(flags, 5).tolist() == [6, 7, 0, 1, 0, 0, 1]


# -- the table, and thresholds -----------------------------------------------------------------------------------------


def test_the_modules_are_pure():
    for module in (alerts, rules, judges, windows):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        imported = {
            name.name.partition(".")[0] if isinstance(node, ast.Import) else (node.module or "").partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in node.names
        }
        assert imported <= {"rlhf_core", "numpy", "collections", "dataclasses", "typing"}, module.__name__
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not {call for call in calls if call.startswith(("open", "print", "np.load", "np.random"))}
        assert not any(isinstance(node, ast.Global) for node in ast.walk(tree))


def test_every_rule_has_thresholds_and_words():
    assert set(THRESHOLDS) == set(BY_NAME)
    for rule in (*RULES, STALLED):
        assert rule.question in QUESTIONS
        for text in (rule.text, rule.cause, rule.remedy):
            assert text.endswith(".")
            assert len(text.split()) >= 4


def test_one_synthetic_alert_of_each_rule_is_marked():
    made_up = synthetic_alerts(THRESHOLDS)
    assert [alert.name for alert in made_up] == [rule.name for rule in (*RULES, STALLED)]
    assert all(alert.synthetic and alert.evidence.startswith("synthetic") for alert in made_up)


def test_an_alert_goes_through_json_and_back():
    for alert in check(spoiled(entropy=0.1, kl=np.nan), THRESHOLDS):
        assert Alert.from_json(json.loads(json.dumps(alert.to_json(), allow_nan=False))) == alert
    with pytest.raises(ValueError, match="'value'"):
        Alert.from_json({name: 1 for name in alert.to_json() if name != "value"})


def test_thresholds_of_a_user_change_what_they_name(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[entropy_collapse]\nseverity = "info"\nthreshold = 0.5\n[ratio_off_one]\ncritical = 5\n')
    mine = read_thresholds(path)
    assert mine["entropy_collapse"] == {**THRESHOLDS["entropy_collapse"], "severity": "info", "threshold": 0.5}
    assert mine["kl_blow_up"] == THRESHOLDS["kl_blow_up"]
    columns = spoiled(entropy=0.6)
    assert "entropy_collapse" not in found(columns)
    assert "entropy_collapse" in {alert.name for alert in check(columns, mine)}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[kl_blowup]\nthreshold = 1\n", "unknown rule 'kl_blowup'"),
        ("[kl_blow_up]\nthresold = 1\n", "unknown setting kl_blow_up.thresold"),
        ("kl_blow_up = 3\n", "kl_blow_up is 3; it must be a table"),
        ('[kl_blow_up]\nseverity = "fatal"\n', "'fatal'; choose from info, warning, critical"),
        ('[kl_blow_up]\nthreshold = "3"\n', "threshold is '3'; it must be a finite number"),
        ("[kl_blow_up]\nthreshold = inf\n", "finite number"),
        ("[kl_blow_up]\nthreshold = true\n", "finite number"),
        ("[kl_blow_up]\nsteps = 0\n", "steps is 0; it must be 1 or more"),
        ("[kl_blow_up\n", "not valid TOML"),
    ],
)
def test_bad_thresholds_are_refused_by_name(tmp_path, text, complaint):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_thresholds(path)


def test_missing_thresholds_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no thresholds"):
        read_thresholds(tmp_path / "none.toml")
