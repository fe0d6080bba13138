import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rlhf_core import terminal
from rlhf_core.terminal import printable, progress_bar


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain words, ünïcode, 電影 🎬", "plain words, ünïcode, 電影 🎬"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\nb\tc\r\x07", "a\\nb\\tc\\r\\x07"),
        ("\u202egnihton", "\\u202egnihton"),  # right-to-left override
        ("\x9b31m", "\\x9b31m"),  # the one-byte escape sequence
        ("\ud800", "\\ud800"),  # a surrogate without its partner
    ],
)
def test_control_characters_are_spelled_out(text, shown):
    assert printable(text) == shown


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_whatever_a_model_writes_is_printable_and_encodes(text):
    shown = printable(text)
    assert shown.isprintable()
    shown.encode("utf-8")


def figures_shown(monkeypatch, *, is_terminal: bool) -> str:
    out = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=out, force_terminal=is_terminal, width=120))
    with progress_bar("ppo", total=3, done=1) as bar:
        bar.advance("reward +0.5")
        bar.advance("reward +0.6", by=1)
    return out.getvalue()


def test_a_terminal_sees_title_count_time_left_and_figures(monkeypatch):
    shown = figures_shown(monkeypatch, is_terminal=True)
    for part in ("ppo", "3/3", "left", "reward +0.6"):
        assert part in shown


def test_what_is_no_terminal_sees_nothing(monkeypatch):
    assert figures_shown(monkeypatch, is_terminal=False).strip() == ""
