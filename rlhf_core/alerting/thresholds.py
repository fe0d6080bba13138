"""Severities, warm-ups and thresholds of the alerts: the package's TOML, changed by a user's. Imports no torch."""

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from rlhf_core.alerting.alert import SEVERITIES, Thresholds


def default_thresholds() -> Thresholds:
    """Return what ``alerts.toml`` of the package says."""
    return tomllib.loads(resources.files("rlhf_core").joinpath("alerts.toml").read_text(encoding="utf-8"))


def read_thresholds(path: Path) -> Thresholds:
    """Return the defaults, changed by a TOML file with the same tables.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not TOML, names an unknown rule or setting, or gives one a value that it cannot have.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no thresholds {str(path)!r}; give a TOML file with tables such as [kl_blow_up]")
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid TOML: {error}; correct the file") from None
    defaults = default_thresholds()
    for rule, table in given.items():
        if rule not in defaults:
            raise ValueError(f"{path}: unknown rule {rule!r}; known are {', '.join(defaults)}")
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {rule} is {table!r}; it must be a table, as in [{rule}]")
        known = (*defaults[rule], "critical")
        for name, value in table.items():
            if name not in known:
                raise ValueError(f"{path}: unknown setting {rule}.{name}; known are {', '.join(known)}")
            _check(name, value, f"{path}: {rule}.{name}")
    return {rule: {**defaults[rule], **given.get(rule, {})} for rule in defaults}


def _check(name: str, value: Any, where: str) -> None:
    if name == "severity":
        if value not in SEVERITIES:
            raise ValueError(f"{where} is {value!r}; choose from {', '.join(SEVERITIES)}")
        return
    if type(value) not in (int, float) or not abs(value) < float("inf"):
        raise ValueError(f"{where} is {value!r}; it must be a finite number")
    if name in ("steps", "clears") and value < 1:
        raise ValueError(f"{where} is {value}; it must be 1 or more")
