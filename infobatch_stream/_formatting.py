"""Numbers and texts as they are written for people."""

import math
from typing import Final

__all__ = ["DASH", "duration", "number", "percent", "visible", "without_specks"]

DASH: Final = "\N{EN DASH}"
"""For what is not known."""

_LEAST: Final = 2.0**-126  # the smallest float32 that has all of its digits
_SUPERSCRIPTS: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> str:
    """A number for people, of three digits: 12,300, 0.0123, 1.2·10⁻⁵; a dash for NaN."""
    if math.isnan(value):
        return DASH
    value = without_specks(float(f"{value:.3g}"))
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:g}"
    if 1e3 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    digits, power = f"{value:.1e}".split("e")
    times = "" if digits == "1.0" else f"{digits.removesuffix('.0')}·"
    return f"{times}10{str(int(power)).translate(_SUPERSCRIPTS)}"


def without_specks(value: float) -> float:
    """``value``, or 0 for what is nearer to it than a float32 can tell: a quantile of -0.0 is kept as -4.6e-41."""
    return 0.0 if abs(value) < _LEAST else value


def percent(share: float) -> str:
    """A share for people, of three digits."""
    return DASH if math.isnan(share) else f"{100 * share:.3g} %"


def duration(seconds: float) -> str:
    """A time for people: "1 h 5 min"; "not known" for NaN."""
    if math.isnan(seconds):
        return "not known"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    days, hours = minutes // 1440, minutes // 60
    if days:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"


def visible(text: str) -> str:
    """``text``, in which nothing that a file holds, or is called, can move the cursor or colour a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
