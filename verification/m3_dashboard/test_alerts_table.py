"""The table of the rules, and thresholds."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from alert_columns import THRESHOLDS, found, spoiled

from rlhf_core import alerts
from rlhf_core.alerting import judges, rules
from rlhf_core.alerting import series as windows
from rlhf_core.alerting.rules import BY_NAME, QUESTIONS, RULES, STALLED
from rlhf_core.alerting.thresholds import read_thresholds
from rlhf_core.alerts import Alert, check, synthetic_alerts

pytestmark = pytest.mark.m3


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
