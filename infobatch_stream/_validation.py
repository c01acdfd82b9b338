"""Checks of arguments, used by several modules, with clear errors."""

import operator
import re
from typing import SupportsIndex

from infobatch_stream.errors import ConfigError

__all__ = ["bytes_of", "check_choice", "whole_number"]

_UNITS = {"": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30, "tb": 2**40}  # as streaming has them


def whole_number(name: str, value: SupportsIndex, low: int, high: int | None = None) -> int:
    """``value`` as an int (NumPy's are taken too); raises ConfigError unless it is one from ``low`` to ``high``."""
    number = None if isinstance(value, bool) or not hasattr(value, "__index__") else operator.index(value)
    if number is None or number < low or (high is not None and number > high):
        allowed = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ConfigError(f"{name}={value!r}: it must be a whole number {allowed}.")
    return number


def bytes_of(name: str, value: SupportsIndex | str) -> int:
    """The number of bytes in ``value``: a number, or text as "200gb" (powers of 1024). Raises ConfigError below 1."""
    if not isinstance(value, str):
        return whole_number(name, value, 1)
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(?:([kmgt])?b?)", value.strip().lower())
    size = int(float(match[1]) * _UNITS[f"{match[2]}b" if match[2] else ""]) if match else 0
    if size < 1:
        raise ConfigError(f"{name}={value!r}: it must be a number of bytes, as 10**11 or '100gb'.")
    return size


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}: choose one of {', '.join(map(repr, allowed))}.")
