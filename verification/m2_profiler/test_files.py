"""What a damaged file is said to be."""

import json

import pytest

from rlhf_core.profiles.files import cut_short

pytestmark = pytest.mark.m2

EVENT = {"name": 'x"y\\ \u1234\n{[', "ts": -2.5e-07, "on": True, "args": {"none": None}, "list": [1, 12.5, []]}
DOCUMENT = json.dumps({"traceEvents": [EVENT, EVENT], "otherData": {"steps": [1, 2]}})


def test_a_document_cut_anywhere_is_cut_short():
    """Some cuts end with a brace, in a number, in an escape or right behind a comma."""
    assert [end for end in range(1, len(DOCUMENT)) if not cut_short(DOCUMENT[:end])] == []
    assert not cut_short(DOCUMENT)


@pytest.mark.parametrize(
    "text",
    [
        DOCUMENT[:40] + DOCUMENT[41:] + "}",
        DOCUMENT.replace(":", "", 1),
        DOCUMENT.replace(", ", " ", 1),
        DOCUMENT.replace("null", "nothing", 1),
        DOCUMENT.replace("-2.5e-07", "-.5e-07", 1),
        DOCUMENT.replace("\\u1234", "\\u12", 1),
        DOCUMENT + "}",
        DOCUMENT + " x",
        "[" * 100_000,
        "stage,calls",
    ],
)
def test_a_changed_document_is_not_said_to_be_cut_short(text):
    assert not cut_short(text)
