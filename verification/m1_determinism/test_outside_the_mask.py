"""What lies outside the response mask changes no bit of any loss, advantage or metric."""

import pytest
from m1_runs import BASE, JUNK, SPOILED, Run, RunPool, assert_identical

pytestmark = pytest.mark.m1


@pytest.mark.parametrize(("clean", "spoiled"), [(BASE, SPOILED)], ids=str)
@pytest.mark.parametrize("junk", JUNK)
def test_junk_outside_the_mask_changes_no_bit(runs: RunPool, clean: Run, spoiled: Run, junk: str) -> None:
    spoiled_run = runs[spoiled].with_name(f"{spoiled}-{junk}")
    assert_identical(runs[clean], spoiled_run)
