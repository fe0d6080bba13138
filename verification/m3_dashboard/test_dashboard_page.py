"""The page without a browser: Streamlit runs the script and says what it would show."""

import dataclasses
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from dashboard_page import CHARTS, PAGE, chart_count, html, page, ran
from dashboard_runs import append, lines, make_run, metrics_row, sample_row, timing_row
from dashboard_server import ROOT, environment
from streamlit.testing.v1 import AppTest

from dashboard import metrics_view, state
from rlhf_core.alerting.rules import RULES, STALLED

pytestmark = pytest.mark.m3


def test_a_folder_without_runs_says_how_to_begin(runs):
    app = page()
    assert "No runs yet" in html(app)
    assert str(runs) in app.text[0].value
    assert [code.value for code in app.code] == ["rlhf train --name first", "rlhf dashboard FOLDER"]


def test_the_newest_run_is_judged_when_none_is_chosen(runs):
    make_run(runs, "a", 12)
    app = page()
    assert "Healthy" in html(app)
    assert "step 12 of 12" in html(app)
    assert chart_count(app) == CHARTS
    assert "Is it learning?" in html(app)


def test_a_run_that_has_not_begun_its_steps_is_not_called_healthy(runs):
    make_run(runs, "a", 0, planned=9)
    app = page()
    assert "No step yet" in html(app)
    assert "Healthy" not in html(app)


def test_alerts_come_before_the_metrics_and_lead_to_their_step(runs):
    run = make_run(runs, "a", 8, planned=30)
    append(run / "metrics.jsonl", metrics_row(9, kl=None), *(metrics_row(step) for step in range(10, 13)))
    append(run / "timings.jsonl", *(timing_row(step) for step in range(9, 13)))
    append(run / "samples.jsonl", *(sample_row(9, sample, completion=f"number {sample}") for sample in range(3)))
    app = page(run="a")
    words = html(app)
    assert "1 critical" in words
    assert words.index("nonfinite") < words.index("Is it learning?")
    link = next(button for button in app.button if button.label == "Step 9")
    link.click()
    ran(app)
    assert (app.session_state["view"], app.session_state["step"]) == ("Completions", 9)
    assert app.dataframe[0].value["completion"].tolist() == ["number 0", "number 1", "number 2"]
    metrics = app.dataframe[len(app.dataframe) - 1].value.set_index("metric")["value"]
    assert np.isnan(metrics["⚠ kl, nats: not finite"])
    assert metrics["clip_frac"] == metrics_row(9)["clip_frac"], "numbers, which a table sorts as such"


def test_a_link_is_followed_by_the_next_refresh_when_one_cut_short_what_its_press_began(monkeypatch):
    """Only what the press chose is left of it then."""
    shown = state.Choice((), (), "Metrics", "step", 0.0, log=False, last=None, everything=False, step=None, live=True)
    monkeypatch.setattr(state.st, "session_state", {})
    assert not state.moved(shown)
    state.go("Completions", 9)
    assert state.moved(shown)
    assert not state.moved(dataclasses.replace(shown, view="Completions", step=9))


def test_a_question_is_answered_by_the_alerts_on_its_metrics_in_any_run(runs):
    """Every value lies in its healthy range; what is wrong with the second run shows all the same."""
    make_run(runs, "a", 12)
    assert "4 of 4 in range" in html(page(run="a"))
    make_run(runs, "b", 3, planned=30)
    append(runs / "b" / "metrics.jsonl", *(metrics_row(step, kl=60.0) for step in range(4, 13)))
    append(runs / "b" / "timings.jsonl", *(timing_row(step) for step in range(4, 13)))
    for chosen in ("b", ["a", "b"]):
        words = html(page(run=chosen))
        close = words[words.index("Is the policy still close?") :]
        assert close[: close.index("</div>")].count(" alert") == 1, close[:300]
    learning = words[words.index("Is it learning?") :]
    assert "in range" in learning[: learning.index("</div>")]


def question(words: str, asked: str) -> str:
    """What the page says beside a question."""
    rest = words[words.index(f"<span>{asked}</span>") :]
    return rest[: rest.index("</div>")]


def test_every_metric_that_is_not_finite_is_named_and_its_question_marked(runs):
    run = make_run(runs, "a", 8, planned=30)
    lost = (metrics_row(9, reward_mean=None, kl=None), metrics_row(10), metrics_row(11, entropy=None))
    append(run / "metrics.jsonl", *lost, metrics_row(12))
    append(run / "timings.jsonl", *(timing_row(step) for step in range(9, 13)))
    words = html(page(run="a"))
    head = words[words.index("nonfinite") :]
    assert "reward_mean, kl, entropy not finite</div>" in head or "kl, reward_mean, entropy not finite</div>" in head
    assert "threshold" not in head[: head.index("</div>")]
    for asked in ("Is it learning?", "Is it stable?", "Is the policy still close?"):
        assert "1 alert" in question(words, asked)
    assert alert_marks(page(run="a"), "reward_mean over step") == [9]


def test_a_metric_without_a_range_that_is_not_finite_is_not_said_to_be_in_range():
    latest = [{"reward_mean": None, "reward_var": 1.0}]
    said, _ = metrics_view.answer("Is it learning?", ["reward_mean", "reward_var"], latest, [])
    assert said == "outside its range: reward_mean"


@pytest.mark.parametrize(
    ("critical", "warning", "words"),
    [(0, 1, "1 warning"), (0, 2, "2 warnings"), (2, 3, "2 critical and 3 warnings"), (1, 0, "1 critical")],
)
def test_alerts_are_counted_in_words(critical, warning, words):
    assert metrics_view.counted(Counter(critical=critical, warning=warning)) == words


def test_an_example_of_each_rule_is_shown_and_marked(runs):
    make_run(runs, "a", 3)
    words = html(page(test_alerts="1"))
    assert words.count(">synthetic</span>") == len(RULES) + 1
    for rule in (*RULES, STALLED):
        assert rule.name.replace("_", " ") in words
    assert "synthetic</span>" not in html(page())


def test_examples_are_shown_without_any_run(runs):
    assert html(page(test_alerts="1")).count(">synthetic</span>") == len(RULES) + 1


def test_the_state_is_read_from_the_url(runs):
    for name in ("a", "b", "c"):
        make_run(runs, name, 30, seed=ord(name))
    app = page(run=["b", "c"], x="tokens", smooth="0.5", last="100", log="true", all="true", pause="true")
    assert app.multiselect[0].value == ["b", "c"]
    assert app.session_state["x"] == "tokens"
    assert app.session_state["smooth"] == 0.5
    assert (app.session_state["log"], app.session_state["all"], app.session_state["pause"]) == (True, True, True)
    assert chart_count(app) > CHARTS


@pytest.mark.parametrize("name", ["../../etc", "/etc", "nothing", "<script>", ""])
def test_a_run_that_is_not_listed_is_not_opened(runs, name):
    make_run(runs, "a", 3)
    app = page(run=name)
    assert app.multiselect[0].value == []
    assert "step 3 of 3" in html(app)


def test_a_run_that_is_asked_for_and_not_there_is_said_to_be_gone(runs):
    make_run(runs, "a", 3)
    app = page(run=["gone", "a"])
    assert "There is no run &#x27;gone&#x27;" in html(app)
    assert "There is no run &#x27;gone&#x27;" in html(ran(app)), "also after the next refresh"
    app.multiselect[0].set_value([])
    assert "There is no run" not in html(ran(app))
    assert "There is no run" not in html(page(run="a"))


def test_a_single_run_is_named_too(runs):
    make_run(runs, "mine", 3)
    assert "<small>run</small><span>mine</span>" in html(page())


def alert_marks(app: AppTest, metric: str) -> list[float]:
    """The places of the alerts in the chart of a metric."""
    charts = {chart.proto.alt: chart for chart in app.get("vega_lite_chart")}
    data = (
        charts[metric].proto.datasets[0].data.data if charts[metric].proto.datasets else charts[metric].proto.data.data
    )
    table = pa.ipc.open_stream(data).read_all().to_pylist()
    return [row["x"] for row in table if row["kind"] == "alert"]


def test_alerts_of_every_run_are_marked_those_of_step_0_too(runs):
    for name, bad in (("a", 0), ("b", 7)):
        run = runs / name
        run.mkdir()
        append(run / "metrics.jsonl", *({"step": step, "lr": None if step == bad else 1.0} for step in range(12)))
    assert alert_marks(page(run=["b", "a"]), "lr over step") == [7, 0]


def test_hostile_names_of_runs_and_metrics_do_nothing(runs):
    run = make_run(runs, "<img src=x onerror=alert(1)>", 3)
    (run / "metrics.jsonl").write_bytes(lines({**metrics_row(step), "<script>x</script>": 1.0} for step in range(1, 9)))
    other = make_run(runs, "![a](http://evil.invalid)", 3)
    (other / "config.json").write_text('{"<script>": "</td><script>"}')
    app = page(run=[run.name, other.name], all="true")
    assert "<script>" not in html(app)
    assert "<img" not in html(app)
    page(run=[run.name, other.name], view="Compare")


def test_a_log_that_grows_between_two_runs_of_the_page_shows_its_new_rows(runs):
    run = make_run(runs, "a", 3, planned=9)
    app = page()
    append(run / "metrics.jsonl", metrics_row(4))
    append(run / "timings.jsonl", timing_row(4))
    assert "step 4 of 9" in html(ran(app))


def test_a_chart_keeps_its_specification_while_its_rows_grow(runs):
    """Streamlit puts new rows into a chart in place as long as its specification is the same."""
    run = make_run(runs, "a", 3, planned=9)
    app = page()
    before = [chart.proto.spec for chart in app.get("vega_lite_chart")]
    append(run / "metrics.jsonl", metrics_row(4, kl=29.0), metrics_row(5, entropy=None))
    append(run / "timings.jsonl", timing_row(4), timing_row(5))
    after = ran(app).get("vega_lite_chart")
    assert [chart.proto.spec for chart in after] == before
    assert len(before) == CHARTS


def test_no_file_of_the_dashboard_hides_a_module_of_python():
    """Streamlit puts the folder of its script first on the path."""
    names = {path.stem for path in (ROOT / "dashboard").glob("*.py")}
    assert not names & sys.stdlib_module_names


def test_the_page_never_loads_torch(runs):
    make_run(runs, "a", 3)
    program = (
        "import sys\n"
        "from streamlit.testing.v1 import AppTest\n"
        "import dashboard.api, dashboard.guard\n"
        "for view in ('Metrics', 'Completions', 'Profile', 'Compare'):\n"
        f"    app = AppTest.from_file({PAGE!r}, default_timeout=60)\n"
        "    app.query_params['view'] = view\n"
        "    app.run()\n"
        "    assert not app.exception, app.exception\n"
        "print(sorted({'torch', 'transformers', 'scipy'} & set(sys.modules)))\n"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False
    )
    assert outcome.stdout.strip() == "[]", outcome.stderr


@pytest.mark.parametrize("view", ["Metrics", "Completions", "Profile", "Compare"])
def test_a_run_that_is_deleted_while_it_is_shown_leaves_the_others(runs, view):
    for name in ("a", "b"):
        make_run(runs, name, 3)
    app = page(run=["a", "b"], view=view)
    shutil.rmtree(runs / "a")
    ran(app)
    assert app.multiselect[0].value == ["b"]
    shutil.rmtree(runs / "b")
    assert "No runs yet" in html(ran(app))


def test_a_log_of_one_row_and_one_of_gaps_alone_are_drawn(runs):
    make_run(runs, "one", 1)
    gaps = make_run(runs, "gaps", 0, planned=9)
    append(gaps / "metrics.jsonl", *(metrics_row(step, kl=None, reward_mean=None) for step in range(1, 5)))
    append(gaps / "timings.jsonl", *(timing_row(step) for step in range(1, 5)))
    for query in ({}, {"log": "true"}, {"smooth": "0.9"}, {"x": "time_s", "last": "100"}):
        assert chart_count(page(run=["one", "gaps"], **query)) == CHARTS
