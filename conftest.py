"""What every test of the project shares."""

import functools

import hypothesis
import pytest
import torch

from rlhf_core.data import reviews

pytest_plugins = ["rlhf_core.testing.plugin"]

# The same examples on every machine, and no clock: a busy machine is not a failure.
hypothesis.settings.register_profile("kit", derandomize=True, deadline=None)
hypothesis.settings.load_profile("kit")
torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of a file in one process of ``make test``, and all of M1, whose runs are started once."""
    if config.getoption("dist", "no") == "loadgroup":
        for item in items:
            group = item.path.parent if item.path.parent.name == "m1_determinism" else item.path
            item.add_marker(pytest.mark.xdist_group(str(group)))


_generate, _prompts = functools.cache(reviews.generate), functools.cache(reviews.prompts)


@pytest.fixture
def reviews_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the embedded sentences of a seed once for all runs of the session: most of a tiny run's time."""
    monkeypatch.setattr(reviews, "generate", _generate)
    monkeypatch.setattr(reviews, "prompts", _prompts)
