"""The view of completions, without a browser."""

import pytest
from dashboard_page import html, page, ran
from dashboard_runs import HOSTILE, append, lines, make_run, metrics_row, sample_row, timing_row

pytestmark = pytest.mark.m3


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
