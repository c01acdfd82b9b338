"""Charts as data: axes, and layers of what lies between them. `renderer` draws them.

Epochs go to the right; what is by epoch is float64[E], NaN where it is not known.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from infobatch_stream._formatting import number, percent
from infobatch_stream.store.history import EDGES

__all__ = [
    "Axis", "Band", "Bars", "Chart", "Dots", "Floats", "HeatMap", "Layer", "Line", "Mark", "Size", "Spark", "Steps",
    "histogram", "score_range", "spans", "steps",
]  # fmt: skip

Floats = NDArray[np.float64]
Size = tuple[int, int]

_DOUBLING: Final = 8  # of EDGES
_POINTS: Final = 150  # of one sample's line, at most


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
    """A line through x, y, float64[n] each, broken where one is NaN. kind: its style; index: of the sample it is of."""

    kind: str
    x: Floats
    y: Floats
    index: int | None = None

    @classmethod
    def by_epoch(cls, kind: str, values: Floats) -> "Line":
        """A line by epoch."""
        x, y = _level(values)
        return cls(f"line {kind}", x, y)

    @classmethod
    def of_sample(cls, kind: str, index: int, scores: Floats) -> "Line":
        """One sample's scores by epoch, in some of its points, the last of them always. kind: of its gallery."""
        step = math.ceil(scores.size / _POINTS)
        some = np.arange(scores.size - 1, -1, -step)[::-1]
        return cls(f"sample {kind}", some.astype(np.float64), scores[some], index)


@dataclass(frozen=True)
class Band:
    """The area between two lines; x, low, high: float64[n] each."""

    x: Floats
    low: Floats
    high: Floats

    @classmethod
    def by_epoch(cls, low: Floats, high: Floats) -> "Band":
        """Between two lines by epoch."""
        return cls(*_level(low, high))


def _level(*lines: Floats) -> list[Floats]:
    """x, and y of each of some lines by epoch: level for half an epoch at the ends of what is known, NaN between."""
    x: list[float] = []
    places: list[int] = []
    for start, end in spans(~np.isnan(lines).any(0)):
        x += [start - 0.5, *range(start, end), end - 0.5, np.nan]
        places += [start, *range(start, end), end - 1, end - 1]
    return [np.array(x), *(line[np.array(places, np.int64)] for line in lines)]


def spans(known: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Where ``known`` (bool[n]) is true without a break: (start, end), end not included."""
    changes = np.flatnonzero(np.diff(np.concatenate([[False], known, [False]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in changes.reshape(-1, 2)]


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


Layer = Steps | Line | Band | HeatMap | Bars | Dots | Mark


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
    line: Line
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
