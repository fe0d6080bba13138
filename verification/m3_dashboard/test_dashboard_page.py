"""The page without a browser: Streamlit runs the script and says what it would show."""

import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from dashboard_page import PAGE, chart_count, html, page, ran
from dashboard_runs import HOSTILE, append, lines, make_run, metrics_row, sample_row, timing_row
from dashboard_server import ROOT, environment
from streamlit.testing.v1 import AppTest

from dashboard import metrics_view, profile_view
from dashboard.markup import labels
from dashboard.store import Store
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
    assert chart_count(app) == 16
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
    assert chart_count(app) > 16


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


def test_runs_whose_names_print_alike_are_told_apart():
    assert labels(["a", "\x1b", "\\x1b", "name"], "name") == {
        "a": "a", "\x1b": "\\x1b", "\\x1b": "\\x1b (2)", "name": "name (2)",
    }  # fmt: skip


def test_a_run_called_name_does_not_hide_the_names_of_the_options(runs):
    for name, rate in (("name", 1), ("name2", 2)):
        make_run(runs, name, 3, lr=rate)
    rows = page(run=["name", "name2"], view="Compare").dataframe[0].value.to_dict("records")
    assert rows == [{"name": "lr", "name (2)": "1", "name2": "2"}]


def test_comparison_shows_what_differs_and_where_the_logs_part(runs):
    a, b = make_run(runs, "a", 5, lr=1), make_run(runs, "b", 5, lr=2)
    for run, reward in ((a, 0.25), (b, 0.75)):
        append(run / "metrics.jsonl", metrics_row(6, reward_mean=reward))
    app = page(run=["a", "b"], view="Compare")
    assert app.dataframe[0].value.to_dict("records") == [{"name": "lr", "a": "1", "b": "2"}]
    assert "first difference at step 6: reward_mean is 0.25 and 0.75" in app.text[-1].value


def test_comparison_of_one_run_asks_for_another(runs):
    make_run(runs, "a", 3)
    assert "two or more runs" in page(view="Compare").text[0].value


def test_completions_are_sorted_by_reward_and_kl(runs):
    run = make_run(runs, "a", 3)
    rewards, kls = [0.5, -1.0, 2.0, None], [3.0, 9.0, 1.0, 2.0]
    append(run / "metrics.jsonl", metrics_row(4))
    append(
        run / "samples.jsonl",
        *(sample_row(4, at, reward=reward, kl=kl) for at, (reward, kl) in enumerate(zip(rewards, kls, strict=True))),
    )
    orders = {"sample": [0, 1, 2, 3], "reward ↓": [2, 0, 1, 3], "reward ↑": [1, 0, 2, 3], "KL ↓": [1, 0, 3, 2]}
    for order, expected in orders.items():
        app = page(view="Completions", step="4", order=order)
        assert app.dataframe[0].value["sample"].tolist() == expected


def test_the_completion_that_is_shown_is_named_and_its_texts_are_labelled(runs):
    make_run(runs, "a", 3)
    words = html(page(view="Completions"))
    assert "Sample 0 of step 3; select a row above to see another" in words
    assert words.index(">Prompt<") < words.index(">Completion<")


def test_the_table_of_completions_is_the_same_widget_at_every_step_of_a_live_run(runs):
    """So that a row that is selected stays so."""
    run = make_run(runs, "a", 3, planned=9)
    app = page(view="Completions")
    before = app.dataframe[0].proto.id
    append(run / "metrics.jsonl", metrics_row(4))
    append(run / "timings.jsonl", timing_row(4))
    append(run / "samples.jsonl", sample_row(4, completion="new"), sample_row(4, 1))
    ran(app)
    assert app.dataframe[0].value["completion"][0] == "new"
    assert app.dataframe[0].proto.id == before


def test_a_step_beyond_the_log_shows_the_nearest(runs):
    make_run(runs, "a", 3)
    app = page(view="Completions", step="999")
    assert "Completions are logged of steps 1 to 3" in html(app)
    assert "Completions of step 3" in html(app)


def test_hostile_completions_are_shown_as_text_and_nothing_else(runs):
    """They reach the browser in text, code, tables and charts' data only: never as HTML or markdown."""
    run = make_run(runs, "a", 1)
    million = "<b>" + "A" * (1 << 20)
    texts = [*HOSTILE, million]
    append(run / "metrics.jsonl", metrics_row(2))
    append(run / "samples.jsonl", *(sample_row(2, at, completion=text, prompt=text) for at, text in enumerate(texts)))
    app = page(view="Completions", step="2")
    shown = app.dataframe[0].value["completion"].tolist()
    assert shown[0] == HOSTILE[0]
    assert "\\x1b[2J" in shown[2]
    assert "\x1b" not in shown[2]
    assert "\\u202e" in shown[2]
    assert len(shown[4]) < 400
    assert "characters more" in shown[4]
    assert [code.language for code in app.code] == ["plaintext", "plaintext"] or not any(
        code.language for code in app.code
    )
    for text in texts:
        assert text[:20] not in html(app)
        assert not any(text[:20] in element.value for element in app.markdown)


def test_hostile_names_of_runs_and_metrics_do_nothing(runs):
    run = make_run(runs, "<img src=x onerror=alert(1)>", 3)
    (run / "metrics.jsonl").write_bytes(lines({**metrics_row(step), "<script>x</script>": 1.0} for step in range(1, 9)))
    other = make_run(runs, "![a](http://evil.invalid)", 3)
    (other / "config.json").write_text('{"<script>": "</td><script>"}')
    app = page(run=[run.name, other.name], all="true")
    assert "<script>" not in html(app)
    assert "<img" not in html(app)
    page(run=[run.name, other.name], view="Compare")


def test_a_log_without_the_log_probs_of_tokens_says_so(runs):
    run = make_run(runs, "a", 1)
    old = {name: value for name, value in sample_row(1).items() if name not in ("tokens", "logprobs", "ref_logprobs")}
    (run / "samples.jsonl").write_bytes(lines([old]))
    assert "no log-probs of single tokens" in html(page(view="Completions"))


@pytest.mark.parametrize(
    "damage",
    [
        {"tokens": 3},
        {"logprobs": ["x"]},
        {"logprobs": [None] * 4},
        {"tokens": []},
        {"token_ids": None},
        {"reward": "high"},
    ],
    ids=str,
)
def test_a_damaged_sample_does_not_break_the_page(runs, damage):
    run = make_run(runs, "a", 1)
    (run / "samples.jsonl").write_bytes(lines([sample_row(1) | damage, {"step": 1, "prompt": 3}]))
    assert len(page(view="Completions").dataframe[0].value) == 1


def test_the_profile_shows_stages_of_the_timings_when_there_is_no_profile(runs):
    make_run(runs, "a", 3)
    app = page(view="Profile")
    assert "From timings.jsonl" in html(app)
    assert chart_count(app) == 1
    assert [code.value for code in app.code] == ["rlhf train --profile"]


def test_the_profile_shows_stages_operators_and_files(runs):
    run = make_run(runs, "a", 2)
    (run / "profiles").mkdir()
    (run / "profiles" / "summary.csv").write_text(
        "stage,calls,total_ms,mean_ms,p50_ms,p95_ms,share,tokens,tokens_per_s,cpu_peak_bytes,cuda_peak_bytes\n"
        "step,2,1000,500,500,500,1,80,80,3145728,0\n"
        "rollout,2,200,100,100,100,0.2,80,400,1000,0\nupdate,2,600,300,300,300,0.6,80,133,2000,0\n"
        "update/forward,8,400,50,50,50,0.4,80,200,2000,0\n"
    )
    (run / "profiles" / "op_stats.csv").write_text(
        "operator,calls,self_cpu_ms,total_cpu_ms\naten::add,5,1.5,2\naten::mm,9,70.25,80\n"
    )
    (run / "profiles" / "chrome_trace.json").write_text("{}")
    app = page(view="Profile")
    assert "From profiles/summary.csv" in html(app)
    summary = app.dataframe[0].value
    assert summary["stage"].tolist() == ["step", "rollout", "update", "update/forward"]
    assert summary["cpu_peak_MiB"][0] == 3
    assert "cuda_peak_MiB" not in summary, "nothing but zeros"
    bars = profile_view.stages_of(summary.astype(str).to_dict("records"))
    assert [(bar["milliseconds"], bar["share"]) for bar in bars] == [(300, 0.6), (200, 0.4), (100, 0.2)]
    assert [bar["share"] for bar in bars] == summary["share"].sort_values(ascending=False).tolist()[1:]
    assert app.dataframe[1].value["operator"].tolist() == ["aten::mm", "aten::add"]
    urls = [link.proto.url for link in app.get("link_button")]
    assert urls[0] == "/api/metrics.csv?run=a"
    assert [url.rpartition("=")[2] for url in urls[1:]] == ["summary.csv", "op_stats.csv", "chrome_trace.json"]
    assert "ui.perfetto.dev" in app.text[-1].value


def test_shares_of_the_timings_are_of_the_step_too(runs):
    make_run(runs, "a", 3)  # 0.5 s a step, of which the stages have all: so a stage of nothing is taken away
    timings = [timing_row(step) for step in range(1, 4)]
    for row in timings:
        del row["stages_s"]["rollout"]
    (runs / "a" / "timings.jsonl").write_bytes(lines(timings))
    bars = profile_view.logged_stages(Store(runs).run("a"))
    assert [(bar["stage"].strip(), round(bar["share"], 6)) for bar in bars] == [("update", 0.6), ("optimizer", 0.1)]


def test_stages_without_a_step_are_shares_of_their_sum():
    assert [bar["share"] for bar in profile_view.bars_of({"a": 3.0, "b": 1.0, "a/c": 1.0}, None)] == [0.75, 0.25, 0.25]


@pytest.mark.parametrize("content", ["", "stage\n", "\x00", "a,b\n1\n2,3,4\n", "stage,total_ms,calls\nx,nan,1\n"])
def test_a_damaged_profile_does_not_break_the_page(runs, content):
    run = make_run(runs, "a", 1)
    (run / "profiles").mkdir()
    for name in ("summary.csv", "op_stats.csv"):
        (run / "profiles" / name).write_text(content)
    page(view="Profile")


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
    assert len(before) == 16


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
        assert chart_count(page(run=["one", "gaps"], **query)) == 16
