"""Charts as data: axes, and layers of what lies between them. `renderer` draws them.

Epochs go to the right; what is by epoch is float64[E], NaN where it is not known.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from infobatch_stream._formatting import number, percent
from infobatch_stream.store.history import EDGES

__all__ = [
    "Axis", "Band", "Bars", "Chart", "Dots", "Floats", "HeatMap", "Layer", "Line", "Mark", "Size", "Spark", "Steps",
    "Trajectory", "histogram", "score_range", "steps",
]  # fmt: skip

Floats = NDArray[np.float64]
Size = tuple[int, int]

_DOUBLING: Final = 8  # of EDGES


@dataclass(frozen=True)
class Axis:
    """An axis from low to high, low < high. text: how a value is written; whole: of ticks that are whole numbers.

    ticks: the most of them, on a screen and on a phone.
    """

    name: str
    low: float
    high: float
    log: bool = False
    text: Callable[[float], str] = number
    ticks: tuple[int, int] = (6, 6)
    whole: bool = False

    @classmethod
    def counting(cls, name: str, low: int, high: int, ticks: tuple[int, int] = (8, 8)) -> "Axis":
        """An axis of the whole numbers from low to high, each with half of the space to the next on either side."""
        return cls(name, low - 0.5, high + 0.5, text="{:.0f}".format, ticks=ticks, whole=True)

    @classmethod
    def epochs(cls, count: int, ticks: tuple[int, int] = (8, 8)) -> "Axis":
        """The axis of ``count`` epochs."""
        return cls.counting("epoch", 0, max(count, 1) - 1, ticks)


@dataclass(frozen=True)
class Steps:
    """An area with a step for each epoch. kind: the class of its style."""

    kind: str
    values: Floats


@dataclass(frozen=True)
class Line:
    """A line by epoch, level for half an epoch at its ends. kind: the class of its style."""

    kind: str
    values: Floats


@dataclass(frozen=True)
class Band:
    """The area between two lines by epoch."""

    low: Floats
    high: Floats


@dataclass(frozen=True)
class Trajectory:
    """One sample's scores by epoch. kind: that of its gallery."""

    kind: str
    index: int
    values: Floats


@dataclass(frozen=True)
class HeatMap:
    """How the scores lie after each epoch. counts: int64[E, 256], between EDGES, 0 where they are not known."""

    counts: NDArray[np.int64]


@dataclass(frozen=True)
class Bars:
    """A histogram. edges: float64[n + 1]; counts: int64[n], out of ``total`` samples; names: of the bars."""

    edges: Floats
    counts: NDArray[np.int64]
    names: Sequence[str]
    total: int

    @classmethod
    def of_whole(cls, counts: NDArray[np.int64], total: int, most: int = 100) -> "Bars":
        """Of the numbers 0..n-1, that occur so often, int64[n]; grouped so that there are at most ``most`` bars."""
        width = -(-counts.size // most)
        starts = np.arange(0, counts.size, width)
        names = [f"{start}" if width == 1 else f"{start} to {min(start + width, counts.size) - 1}" for start in starts]
        edges = width * np.arange(starts.size + 1.0) - 0.5
        return cls(edges, np.add.reduceat(counts, starts), names, total)

    @classmethod
    def between(cls, edges: Floats, counts: NDArray[np.int64], total: int) -> "Bars":
        """Of numbers between ``edges``, which the bars are named after."""
        return cls(edges, counts, [f"{number(low)} to {number(high)}" for low, high in pairwise(edges.tolist())], total)

    @property
    def shares(self) -> Floats:
        """Of ``total``."""
        return self.counts / self.total


@dataclass(frozen=True)
class Dots:
    """Points without names: float64[n] each."""

    x: Floats
    y: Floats


@dataclass(frozen=True)
class Mark:
    """A sample of a gallery, as a link to it. kind: of its gallery; text: what to call it."""

    index: int
    x: float
    y: float
    kind: str
    text: str


Layer = Steps | Line | Band | Trajectory | HeatMap | Bars | Dots | Mark


@dataclass(frozen=True)
class Chart:
    """Layers between two axes, the first at the back.

    label: what it shows, for who cannot see it. hints: a text for each epoch, shown under a pointer; "" for none.
    """

    label: str
    x: Axis
    y: Axis
    layers: Sequence[Layer]
    hints: Sequence[str] = ()


@dataclass(frozen=True)
class Spark:
    """One sample's scores by epoch, as small as a word. low, high: the ends of its logarithmic scale."""

    label: str
    values: Floats
    low: float
    high: float


def steps(label: str, layers: Sequence[Steps], y_name: str, text: Callable[[float], str], top: float = 0.0) -> Chart:
    """Areas by epoch, from 0 to ``top``, or else to the highest value. text: how a value is written."""
    known = np.concatenate([layer.values[~np.isnan(layer.values)] for layer in layers])
    count = max(layer.values.size for layer in layers)
    hints = [f"epoch {at}: " + ", ".join(text(layer.values[at]) for layer in reversed(layers)) for at in range(count)]
    y = Axis(y_name, 0.0, top or float(known.max(initial=0)) or 1.0, text=text)
    return Chart(label, Axis.epochs(count), y, layers, hints)


def histogram(label: str, bars: Bars, x_name: str, *, log: bool = False) -> Chart:
    """A histogram of shares of samples: by whole numbers, or on a logarithmic scale."""
    low, high = float(bars.edges[0]), float(bars.edges[-1])
    x = Axis(x_name, low, high, log=True) if log else Axis.counting(x_name, round(low + 0.5), round(high - 0.5))
    return Chart(label, x, Axis("share of samples", 0.0, float(bars.shares.max()) or 1.0, text=percent), [bars])


def score_range(quantiles: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """The edges of scores that a chart shows, for the 1 % (column 0) and the largest (column 1): float[n, 2].

    They are powers of two, so that all bins of a doubling are in it.
    """
    known = quantiles[np.isfinite(quantiles).all(1)]
    low, high = (float(known[:, 0].min()), float(known[:, 1].max())) if len(known) else (0.1, 1.0)
    doublings = EDGES[::_DOUBLING]
    first = min(max(int(np.searchsorted(doublings, low, "right")) - 1, 0), len(doublings) - 2)
    last = min(max(int(np.searchsorted(doublings, high, "left")), first + 1), len(doublings) - 1)
    return float(doublings[first]), float(doublings[last])
