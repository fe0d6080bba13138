"""Rewards from Python functions: found, limited in time, checked; every error names the function."""

import math
import re
import signal
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch

from rlhf_core.reward_functions import RewardError, call_function, load_function
from rlhf_core.reward_sources import parse_reward

BAD = [
    (lambda p, c: [1.0], "returned 1 scores for 2 completions"),
    (lambda p, c: 3.0, "returned a float; it must be a list"),
    (lambda p, c: None, "returned a NoneType"),
    (lambda p, c: {"a": 1, "b": 2}, "returned a dict"),
    (lambda p, c: [1.0, "2"], r"returned '2' \(str\) for completion 1"),
    (lambda p, c: [1.0, 10**400], r"returned 1000\S*\.\.\. for completion 1; it must be finite in float32"),
    (lambda p, c: [1.0, 10**9999], r"returned a int for completion 1; it must be finite in float32"),
    (lambda p, c: [-1e39, 1.0], r"returned -1e\+39 for completion 0; it must be finite in float32"),
    (lambda p, c: [1.0, 1j], r"returned 1j \(complex\) for completion 1; it must be a number"),
    (lambda p, c: [1.0, None], "returned None"),
    (lambda p, c: [[1.0], [2.0]], r"returned \[1\.0\] \(list\)"),
    (lambda p, c: [math.nan, 1.0], "returned nan for completion 0; it must be finite"),
    (lambda p, c: [1.0, -math.inf], "returned -inf for completion 1"),
    (lambda p, c: 1 / 0, r"raised ZeroDivisionError: division by zero at .*test_reward_functions\.py:\d+"),
    (lambda p, c: sys.exit(3), "raised SystemExit: 3"),
    (lambda p: [1.0, 2.0], "raised TypeError"),
]


@pytest.mark.parametrize(("function", "message"), BAD)
def test_a_bad_answer_is_named_with_the_function(function, message):
    with pytest.raises(RewardError, match=f"reward function mine:f {message}"):
        call_function("mine:f", function, ["p", "q"], ["c", "d"], 10)


@pytest.mark.parametrize(
    "scores", [[1, 2.5], (1, 2.5), np.array([1, 2.5]), torch.tensor([1, 2.5]), [np.float32(1), 2.5]]
)
def test_lists_tuples_arrays_and_tensors_of_numbers_are_answers(scores):
    assert call_function("mine:f", lambda p, c: scores, ["p", "q"], ["c", "d"], 10) == [1.0, 2.5]


@pytest.mark.parametrize("scores", [[True, False], np.array([True, False]), [torch.tensor(1), np.bool_(0)]])
def test_what_is_right_or_wrong_is_1_or_0(scores):
    assert call_function("mine:f", lambda p, c: scores, ["p", "q"], ["c", "d"], 10) == [1.0, 0.0]


def test_an_async_function_is_refused_and_leaves_nothing_that_waits():
    async def later(p, c):
        return [1.0]

    with pytest.raises(RewardError, match="mine:f is async; it must be a plain function"):
        call_function("mine:f", later, ["p"], ["c"], 10)


def test_the_function_gets_copies_of_both_lists():
    prompts, completions = ["p"], ["c"]

    def greedy(p, c):
        assert (p, c) == (["p"], ["c"])
        p.clear()
        c.clear()
        return [1.0]

    assert call_function("mine:f", greedy, prompts, completions, 10) == [1.0]
    assert (prompts, completions) == (["p"], ["c"])


def waits(p, c):
    threading.Event().wait(60)


def runs(p, c):
    while True:
        pass


def catches_everything(p, c):
    while True:
        try:
            threading.Event().wait(60)
        except Exception:
            continue


@pytest.mark.parametrize("function", [waits, runs, catches_everything])
def test_a_function_that_does_not_end_is_stopped_and_the_timer_is_gone(function):
    former = signal.getsignal(signal.SIGALRM)
    with pytest.raises(RewardError, match=r"mine:f took longer than 0\.05 s for 1 completions; .* --reward-timeout-s"):
        call_function("mine:f", function, ["p"], ["c"], 0.05)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is former


def test_an_alarm_that_comes_when_the_function_has_just_returned_ends_nothing(monkeypatch):
    setitimer, former = signal.setitimer, signal.getsignal(signal.SIGALRM)

    def alarmed_first(which, seconds, interval=0.0):
        if seconds == 0:
            signal.raise_signal(signal.SIGALRM)
        return setitimer(which, seconds, interval)

    monkeypatch.setattr(signal, "setitimer", alarmed_first)
    assert call_function("mine:f", lambda p, c: [2.5], ["p"], ["c"], 10) == [2.5]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is former


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module into the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = []

    def write(source, name="kit_test_rewards"):
        names.append(name)
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_a_function_of_the_working_directory_is_found(module):
    module("def f(prompts, completions): return [len(c) for c in completions]\nclass Box:\n    g = staticmethod(f)")
    assert load_function("kit_test_rewards:f")(["p"], ["abc"]) == [3]
    assert load_function("kit_test_rewards:Box.g")(["p"], ["abc"]) == [3]


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("", "kit_test_rewards:f", "reward 'kit_test_rewards:f': kit_test_rewards has no 'f'"),
        ("f = 3", "kit_test_rewards:f", "is a int; it must be a function of prompts and completions"),
        ("", "kit_absent:f", "no module 'kit_absent' in the working directory"),
        ("import kit_absent", "kit_test_rewards:f", "cannot be imported .No module named 'kit_absent'"),
        ("x = 1 / 0", "kit_test_rewards:f", r"cannot be imported \(ZeroDivisionError: .*kit_test_rewards\.py:1"),
        ("def f(:", "kit_test_rewards:f", r"cannot be imported \(SyntaxError.*kit_test_rewards\.py:1"),
    ],
)
def test_a_function_that_cannot_be_had_is_named(module, source, name, message):
    module(source)
    with pytest.raises(ValueError, match=message):
        load_function(name)


def test_what_a_reward_option_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge").mkdir()
    (tmp_path / "a=b").mkdir()
    for text, found in {
        "judge": ("judge", 1.0, "judge"),
        "judge=0.5": ("judge", 0.5, "judge"),
        "model:runs/judge=-2": ("judge", -2.0, "runs/judge"),
        "my.module:f": ("my.module:f", 1.0, None),
        "my_module:f=1e-3": ("my_module:f", 1e-3, None),
    }.items():
        source = parse_reward(text)
        assert (source.name, source.weight, source.folder) == found
    for text, message in {
        "judge=much": "the weight 'much' is no number",
        "judge=nan": "the weight must be finite",
        "nothing/here": "there is no such folder, and it is no module:function",
        "": "there is no such folder",
    }.items():
        with pytest.raises(ValueError, match=re.escape(f"--reward {text!r}: ") + message):
            parse_reward(text)


def test_what_a_function_or_its_module_changes_of_torch_is_put_back(module):
    module(
        "import torch\ntorch.set_grad_enabled(False)\ntorch.set_default_dtype(torch.float64)\ndef f(p, c): return [0.0]"
    )

    def changing(prompts, completions):
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        return [0.0]

    load_function("kit_test_rewards:f")
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    call_function("mine:f", changing, ["p"], ["c"], 10)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
