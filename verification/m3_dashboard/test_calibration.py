"""The alerts against real trainings: healthy ones stay silent, and each planted fault raises its alert in time.

`make test` runs a part; ``-m slow`` runs 60 healthy trainings and every fault in every configuration, and writes
``docs/alert-calibration.md``.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from calibration_faults import FAULTS
from calibration_report import document, fingerprint, nearest_table
from calibration_runs import CONFIGURATIONS, LATE, STEPS, WITHIN, alerts_of, raised_at, run

from rlhf_core.alerting.rules import BY_NAME

pytestmark = pytest.mark.m3

DOCUMENT = Path(__file__).parents[2] / "docs" / "alert-calibration.md"
SEEDS = range(20)
FAULT_SEED = 100
QUICK = "llama, separate value"
BEGINNINGS = (1, LATE)


def above_info(result):
    return [f"{alert.name} at step {alert.raised_step}" for alert in alerts_of(result) if alert.severity != "info"]


# -- a part, for continuous integration --------------------------------------------------------------------------------


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_a_healthy_run_is_silent(configuration):
    assert above_info(run(configuration, 0, steps=9)) == []


@pytest.mark.parametrize("fault", [name for name, fault in FAULTS.items() if fault.asked])
def test_a_fault_raises_its_alert_within_ten_steps(fault):
    step = raised_at(QUICK, FAULT_SEED, fault, 2, FAULTS[fault].expected)
    assert step is not None
    assert 2 <= step <= 2 + WITHIN


def test_a_run_without_the_fault_does_not_raise_its_alert():
    expected = {name for fault in FAULTS.values() for name in fault.expected}
    assert not expected & {alert.name for alert in alerts_of(run(QUICK, 0, steps=9))}


def test_every_expected_alert_is_a_rule():
    assert {name for fault in FAULTS.values() for name in fault.expected} <= BY_NAME.keys()


def test_the_document_belongs_to_these_rules_thresholds_and_faults():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert f"`{fingerprint()}`" in text, "run pytest verification/m3_dashboard/test_calibration.py -m slow"
    assert all(f"| {fault.title} |" in text for fault in FAULTS.values())
    assert all(f"| `{name}` |" in text for name in BY_NAME if name != "stalled")
    assert "**none**" not in text
    healthy = re.findall(r"^\| .* \| (\d+) \| [^|]*→[^|]* \| (\d+) \|", text, re.MULTILINE)
    assert healthy == [("20", "0")] * len(CONFIGURATIONS)


def test_a_rule_that_judged_no_row_is_told_from_one_whose_metrics_are_not_logged():
    table = nearest_table({QUICK: [run(QUICK, 0, steps=9)]})
    shown = {line.split("`")[1]: line.split("|")[4].strip() for line in table.splitlines() if line.startswith("| `")}
    assert shown["reward_flat"] == "not judged"
    assert shown["throughput_drop"] == shown["groups_without_signal"] == "not logged"
    assert float(shown["kl_blow_up"]) > 0


# -- the whole ---------------------------------------------------------------------------------------------------------


def faulty(fault, configuration, begins):
    seed = FAULT_SEED + (begins > 1)
    return run(configuration, seed, fault, begins, begins + WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_every_healthy_run_is_silent(configuration, seed):
    assert above_info(run(configuration, seed)) == []


@pytest.mark.slow
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_the_healthy_runs_learn(configuration):
    rewards = [[row["reward_mean"] for row in run(configuration, seed).rows] for seed in SEEDS]
    rises = [np.mean(reward[-5:]) - np.mean(reward[:5]) for reward in rewards]
    assert np.mean(rises) > 3 * np.std(rises, ddof=1) / np.sqrt(len(rises))
    assert all(len(reward) == STEPS for reward in rewards)


@pytest.mark.slow
@pytest.mark.parametrize("begins", BEGINNINGS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_raises_its_alert_within_ten_steps(fault, configuration, begins):
    raised = {alert.name: alert.raised_step for alert in alerts_of(faulty(fault, configuration, begins))}
    in_time = [name for name in FAULTS[fault].expected if begins <= raised.get(name, 0) <= begins + WITHIN]
    assert in_time, raised


@pytest.mark.slow
def test_the_confusion_table_is_written():
    healthy = {name: [run(name, seed) for seed in SEEDS] for name in CONFIGURATIONS}
    runs = {
        (fault, name, at): faulty(fault, name, at) for fault in FAULTS for name in CONFIGURATIONS for at in BEGINNINGS
    }
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document(healthy, runs), encoding="utf-8")
