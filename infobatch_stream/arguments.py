"""Checks of arguments that several modules take, with errors for people."""

import operator
from typing import SupportsIndex

from infobatch_stream.errors import ConfigError

__all__ = ["check_choice", "whole_number"]


def whole_number(name: str, value: SupportsIndex, low: int, high: int | None = None) -> int:
    """``value`` as an int (NumPy's are taken too); raises ConfigError unless it is one from ``low`` to ``high``."""
    number = None if isinstance(value, bool) or not hasattr(value, "__index__") else operator.index(value)
    if number is None or number < low or (high is not None and number > high):
        allowed = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ConfigError(f"{name}={value!r}: it must be a whole number {allowed}.")
    return number


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}: choose one of {', '.join(map(repr, allowed))}.")
