"""The checks of configurations: each raises ValueError that names the option as the command line does."""

import dataclasses
from collections.abc import Callable
from typing import Any

LARGEST_FLOAT32 = 3.4028234663852886e38


class WholeConfig:
    """What a configuration inherits that is no section of another one: its options have no prefix."""


def section(owner: object) -> str:
    """Return the prefix of a configuration's options, as in ``ppo.`` for ``PPOConfig``."""
    return "" if isinstance(owner, WholeConfig) else f"{type(owner).__name__.removesuffix('Config').lower()}."


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_field(owner: object, name: str, holds: Callable[[Any], bool], wanted: str) -> None:
    """Raise ValueError unless a field holds to what is ``wanted``, said as what it must do."""
    value = getattr(owner, name)
    require(holds(value), f"{section(owner)}{name} is {value}; it must {wanted}")


def is_finite(value: float) -> bool:
    """Return whether a value is a finite number in float32."""
    return abs(value) <= LARGEST_FLOAT32  # not so NaN


def require_finite(owner: Any) -> None:
    """Raise ValueError unless each float of a configuration is a finite number in float32."""
    for item in dataclasses.fields(owner):
        if isinstance(getattr(owner, item.name), float):
            require_field(owner, item.name, is_finite, "be a finite number in float32")


def require_positive(owner: object, *names: str) -> None:
    """Raise ValueError unless these fields are greater than 0."""
    for name in names:
        require_field(owner, name, lambda value: value > 0, "be greater than 0")


def require_not_negative(owner: object, *names: str) -> None:
    """Raise ValueError unless these fields are 0 or more."""
    for name in names:
        require_field(owner, name, lambda value: value >= 0, "be 0 or more")


def require_at_most(owner: object, most: int, *names: str) -> None:
    """Raise ValueError unless these fields are at most ``most``."""
    for name in names:
        require_field(owner, name, lambda value: value <= most, f"be at most {most}")


def require_divides(owner: object, part_name: str, whole_name: str) -> None:
    """Raise ValueError, with the sizes that can be had, unless one field divides another."""
    part, whole = getattr(owner, part_name), getattr(owner, whole_name)
    if whole % part:
        divisors = ", ".join(str(n) for n in range(1, min(whole, 4096) + 1) if whole % n == 0)
        raise ValueError(
            f"{section(owner)}{whole_name} {whole} is not divisible by {part_name} {part}; "
            f"choose {part_name} from {divisors}"
        )
