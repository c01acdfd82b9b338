"""SVG as text: elements, scales and paths. Whatever is put into it is escaped."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import ArrayLike, NDArray

__all__ = ["Scale", "element", "join", "line_path", "short"]

_MULTIPLES: Final = (1, 2, 5)


def element(name: str, *children: str, **attributes: object) -> Markup:
    """``<name attributes>children</name>``. ``class_`` is class, ``_`` is ``-``; those that are None are left out."""
    pairs = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _plain(value))
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, pairs, join(children))


def join(parts: Iterable[str]) -> Markup:
    """The parts in a row, escaped unless they are Markup."""
    return Markup("").join(map(escape, parts))


def _plain(value: object) -> object:
    return short(value) if isinstance(value, float) else value


def short(pixels: float) -> str:
    """A coordinate with one decimal at most."""
    text = f"{pixels:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def line_path(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """The data of a path through the points (float64[n] each, pixels); broken where one is NaN."""
    parts = []
    pen = "M"
    for across, down in zip(x.tolist(), y.tolist(), strict=True):
        if math.isnan(across) or math.isnan(down):
            pen = "M"
            continue
        parts.append(f"{pen}{short(across)} {short(down)}")
        pen = "L"
    return "".join(parts)


@dataclass(frozen=True)
class Scale:
    """Values from low to high, low < high, to pixels from start to end. log: by their logarithms, 0 < low."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values: ArrayLike) -> NDArray[np.float64]:
        """Pixels, like ``values``; those beyond the ends are put there, NaN stays."""
        inside = np.clip(np.asarray(values, np.float64), self.low, self.high)
        low, high = self.low, self.high
        if self.log:
            inside, low, high = np.log(inside), math.log(low), math.log(high)
        return np.asarray(self.start + (inside - low) / (high - low) * (self.end - self.start))

    def at(self, value: float) -> float:
        """Pixels of one value."""
        return float(self(value))

    def ticks(self, most: int) -> list[float]:
        """Round values in it, at most ``most`` (2 or more)."""
        if not self.log or self.high < 10 * self.low:
            return self._even(most)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for multiples in (_MULTIPLES, (1, 3), (1,)):
            values = [by * 10.0**power for power in powers for by in multiples]
            inside = [value for value in values if self.low <= value <= self.high]
            if len(inside) <= most:
                break
        return inside[:: -(-len(inside) // most)]

    def _even(self, most: int) -> list[float]:
        power = math.floor(math.log10((self.high - self.low) / most))
        for step in (by * 10.0**p for p in (power, power + 1, power + 2) for by in _MULTIPLES):
            # The ends, which are often round, may be a rounding error away from it.
            numbers = range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
            if len(numbers) <= most:
                break
        return [step * number for number in numbers]
