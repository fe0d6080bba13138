"""How a mistake is planted into the real trainer: it replaces one function of it, and nothing else."""

from collections.abc import Callable
from typing import Any

import pytest

from rlhf_core import ppo, updates

Plant = Callable[[pytest.MonkeyPatch], None]


def plants() -> tuple[dict[str, Plant], Callable[[Plant], Plant]]:
    """Return a table of mistakes, by name, and the decorator that enters one."""
    planted: dict[str, Plant] = {}

    def plant(function: Plant) -> Plant:
        planted[function.__name__] = function
        return function

    return planted, plant


def replace(monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Any], Any], *modules: Any) -> None:
    """Put ``make(what is there)`` in place of a function of the trainer, by default of a step and its updates."""
    for module in modules or [module for module in (ppo, updates) if hasattr(module, name)]:
        monkeypatch.setattr(module, name, make(getattr(module, name)))
