"""What every test of the project shares."""

import functools
from typing import Any

import hypothesis
import pytest
import torch

from rlhf_core.data import reviews

M1 = "verification/m1_determinism"
pytest_plugins = ["rlhf_core.testing.plugin"]

# The same examples on every machine, and no clock: a busy machine is not a failure.
hypothesis.settings.register_profile("kit", derandomize=True, deadline=None)
hypothesis.settings.load_profile("kit")
torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file in one process of ``make test``, and all of M1, whose runs are started once."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return M1 if file.startswith(M1) else file

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


_generate, _prompts = functools.cache(reviews.generate), functools.cache(reviews.prompts)


@pytest.fixture
def reviews_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the embedded sentences of a seed once for all runs of the session: most of a tiny run's time."""
    monkeypatch.setattr(reviews, "generate", _generate)
    monkeypatch.setattr(reviews, "prompts", _prompts)
