"""Configurations as files: written, read from TOML or JSON, and compared."""

import dataclasses
import json
import sys
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from rlhf_core.config import RunConfig, TrainConfig, for_data
from rlhf_core.config_checks import require

C = TypeVar("C", bound=RunConfig)


def to_json(config: RunConfig) -> str:
    """Return the configuration as JSON with sorted keys."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True, indent=2) + "\n"


def read_config_file(path: Path, base: C) -> C:
    """Return ``base`` with the fields that a TOML file, or a run's ``config.json``, sets.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not TOML or JSON, or it names an unknown option or gives one a value of the wrong type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {str(path)!r}; give a .toml file or a run's config.json")
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ValueError(f"{path} is not valid {kind}: {error}; correct the file") from None
    require(isinstance(tree, dict), f"{path} holds a {type(tree).__name__}; it must hold a table of options")
    replaced: C = _replace(base, tree, str(path), ())
    return replaced


def _replace(base: Any, tree: dict[str, Any], source: str, path: tuple[str, ...]) -> Any:
    known = {item.name: item for item in dataclasses.fields(base)}
    types_by_name = typing.get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for name, value in tree.items():
        dotted = ".".join((*path, name))
        require(name in known, f"{source}: unknown option {dotted!r}; known here: {', '.join(known)}")
        current = getattr(base, name)
        if dataclasses.is_dataclass(current):
            require(isinstance(value, dict), f"{source}: {dotted} is {value!r}; it must be a table")
            changes[name] = _replace(current, value, source, (*path, name))
        else:
            changes[name] = _checked(value, types_by_name[name], f"{source}: {dotted}")
    try:
        return dataclasses.replace(base, **changes)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _checked(value: Any, wanted: Any, where: str) -> Any:
    """Return ``value`` when it is of the field's type; an int serves as a float."""
    accepted = typing.get_args(wanted) if typing.get_origin(wanted) in (types.UnionType, typing.Union) else (wanted,)
    choices = [choice for kind in accepted if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
    if choices:
        named = ", ".join([*map(str, choices), *(["null"] if type(None) in accepted else [])])
        allowed = value in choices or (value is None and type(None) in accepted)
        require(allowed, f"{where} is {value!r}; choose from {named}")
        return value
    if typing.get_origin(wanted) is tuple:
        whole = isinstance(value, list | tuple) and all(type(one) is str for one in value)
        require(whole, f"{where} is {value!r}; it must be a list of strings")
        return tuple(value)
    if float in accepted and type(value) is int:
        require(abs(value) <= sys.float_info.max, f"{where} is {value}; it must be a finite number")
        return float(value)
    names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in accepted)
    require(type(value) in accepted, f"{where} is {value!r}; it must be {names}")
    return value


def differences(a: Any, b: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return the dotted name and both values of each field in which two configurations differ."""
    found: list[tuple[str, Any, Any]] = []
    for item in dataclasses.fields(a):
        left, right = getattr(a, item.name), getattr(b, item.name)
        if dataclasses.is_dataclass(left):
            found += differences(left, right, f"{prefix}{item.name}.")
        elif left != right:
            found.append((f"{prefix}{item.name}", left, right))
    return found


def defaults(data: str | None, file: Path | None) -> TrainConfig:
    """Return what the command line starts from: the defaults of the task, changed by a configuration file."""
    if file is not None and data is None:
        data = read_config_file(file, TrainConfig()).data
    base = TrainConfig() if data is None else for_data(data)
    return base if file is None else dataclasses.replace(read_config_file(file, base), data=data)
