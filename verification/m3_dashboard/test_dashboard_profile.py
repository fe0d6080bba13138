"""The view of a profile, without a browser."""

import pytest
from dashboard_page import chart_count, html, page
from dashboard_runs import lines, make_run, timing_row

from dashboard import profile_view
from dashboard.store import Store

pytestmark = pytest.mark.m3


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
