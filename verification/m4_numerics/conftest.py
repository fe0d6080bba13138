"""What the numeric tests of an implementation share: one way to check, to skip and to write down."""

import re

import pytest

from rlhf_core.testing.implementation import shown
from rlhf_core.testing.plugin import RESULTS


def title(request):
    """The test's name as the table has it, with its parameters."""
    words = re.sub(r"\[(.*)\]$", r" (\1)", request.node.name.removeprefix("test_"))
    return words.replace("_", " ")


@pytest.fixture
def check(implementation, request):
    """Return check(function's name, error of a function, tolerance, convention): it records, skips or fails."""
    cells = request.config.stash[RESULTS].cells

    def run(name, error_of, tolerance, convention=None):
        function = getattr(implementation, name, None)
        if function is None:
            why = getattr(implementation, "missing", {}).get(name, "not offered")
            cells[title(request)] = f"– ({why})"
            pytest.skip(f"{implementation.name} has no {name}: {why}")
        error = error_of(function)
        if error <= tolerance:
            cells[title(request)] = shown(error)
            return
        if convention is not None:
            what, error_by_convention, its_tolerance = convention
            under = error_by_convention(function)
            if under <= its_tolerance:
                cells[title(request)] = f"{shown(under)} ({what})"
                return
        cells[title(request)] = f"**{shown(error)}**"
        pytest.fail(f"{implementation.name}'s {name} is off by {error:.3g}, more than {tolerance:g}")

    return run
