"""What the numeric tests of an implementation share: one way to check, to skip and to write down."""

import re

import pytest
import torch

from rlhf_core.testing.implementation import shown
from rlhf_core.testing.plugin import RESULTS


def title(request):
    """The test's name as the table has it, with its parameters."""
    words = re.sub(r"\[(.*)\]$", r" (\1)", request.node.name.removeprefix("test_"))
    return words.replace("_", " ")


def untouched(function):
    """Return the function, with an error for one that changes a tensor that it was given."""

    def call(*arguments):
        given = [(at, one, one.detach().clone()) for at, one in enumerate(arguments, 1) if torch.is_tensor(one)]
        result = function(*arguments)
        for at, now, before in given:
            if not bool(((now == before) | ((now != now) & (before != before))).all()):  # NaN differs from itself
                now.detach().copy_(before)  # other tests have the same tensor
                raise ValueError(f"it changed its argument {at} in place")
        return result

    return call


@pytest.fixture
def check(implementation, request):
    """Return check(function's name, error of a function, tolerance, convention): it records, skips or fails."""
    results = request.config.stash[RESULTS]
    cells = results.cells

    def run(name, error_of, tolerance, convention=None):
        function = getattr(implementation, name, None)
        if function is None:
            why = getattr(implementation, "missing", {}).get(name, "not offered")
            cells[title(request)] = f"– ({why})"
            pytest.skip(f"{results.column} has no {name}: {why}")

        def measured(measure):
            problem = None
            try:
                return measure(untouched(function))
            except Exception as raised:
                problem = raised
            cells[title(request)] = f"**{type(problem).__name__}**"
            text = f"{results.column}'s {name} failed: {type(problem).__name__}: {problem}"
            return pytest.fail(text, pytrace=False)

        error = measured(error_of)
        if error <= tolerance:
            cells[title(request)] = shown(error)
            return
        if convention is not None:
            what, error_by_convention, its_tolerance = convention
            under = measured(error_by_convention)
            if under <= its_tolerance:
                cells[title(request)] = f"{shown(under)} ({what})"
                return
        cells[title(request)] = f"**{shown(error)}**"
        text = f"{results.column}'s {name} is off by {error:.3g}, more than {tolerance:g}"
        pytest.fail(text, pytrace=False)

    return run
