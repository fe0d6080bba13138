"""The view that compares runs, without a browser."""

import pytest
from dashboard_page import page
from dashboard_runs import append, make_run, metrics_row

from dashboard.markup import labels

pytestmark = pytest.mark.m3


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
