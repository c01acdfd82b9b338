"""The charts of a report: numbers -> SVG. Epochs go to the right; what is by epoch is NaN where that is not known."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from infobatch_stream._formatting import number, percent
from infobatch_stream.report.svg import Frame, Scale, element, join, line_path, short, spans
from infobatch_stream.store.history import EDGES

__all__ = [
    "Bars",
    "Mark",
    "bars",
    "fan",
    "heat_map",
    "marker",
    "scatter",
    "score_range",
    "spark",
    "steps",
]

Floats = NDArray[np.float64]
Size = tuple[int, int]

_DOUBLING: Final = 8  # of EDGES
_LEVELS: Final = 9  # of colour in a heat map
_TALLEST: Final = 4  # pixels of a row of it, at least
_POINTS: Final = 150  # of one sample's line, at most


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


def _epoch_ticks(frame: Frame, most: int) -> list[tuple[float, str]]:
    whole = sorted({round(value) for value in frame.x.ticks(most) if frame.x.low <= round(value) <= frame.x.high})
    return [(float(value), f"{value}") for value in whole]


def _figures(values: Sequence[float]) -> list[tuple[float, str]]:
    return [(value, number(value)) for value in values]


def _by_epoch(size: Size, epochs: int, y: tuple[float, float], *, log: bool = False) -> Frame:
    return Frame.of(size, (-0.5, max(epochs, 1) - 0.5), y, "y" if log else "")


def _held(frame: Frame, values: Floats) -> Markup:
    """The data of a path through ``values``, by epoch, level for half an epoch at the ends."""
    parts = []
    for start, end in spans(~np.isnan(values)):
        x = np.concatenate([[start - 0.5], np.arange(start, end), [end - 0.5]])
        y = np.concatenate([values[start : start + 1], values[start:end], values[end - 1 : end]])
        parts.append(line_path(frame.x(x), frame.y(y)))
    return join(parts)


def _between(frame: Frame, low: Floats, high: Floats) -> Markup:
    """The data of a path around what lies between two lines by epoch."""
    parts = []
    for start, end in spans(~np.isnan(low) & ~np.isnan(high)):
        x = np.concatenate([[start - 0.5], np.arange(start, end), [end - 0.5]])
        x = frame.x(np.concatenate([x, x[::-1]]))
        up, down = (np.concatenate([one[start : start + 1], one[start:end], one[end - 1 : end]]) for one in (high, low))
        parts.append(line_path(x, frame.y(np.concatenate([up, down[::-1]]))) + "Z")
    return join(parts)


def _hints(frame: Frame, texts: Sequence[str]) -> Markup:
    """A text for each epoch, which is shown under a pointer."""
    width = frame.x.at(0.5) - frame.x.at(-0.5)
    return join(
        element(
            "rect", element("title", text), class_="hint",
            x=frame.x.at(epoch - 0.5), y=float(frame.y.end), width=width, height=float(frame.y.start - frame.y.end),
        )
        for epoch, text in enumerate(texts)
        if text
    )  # fmt: skip


def steps(
    size: Size,
    layers: Sequence[tuple[str, Floats]],
    *,
    label: str,
    y_name: str,
    text: Callable[[float], str],
    top: float | None = None,
) -> Markup:
    """Areas with a step for each epoch, the first at the back. layers: CSS class and values, float64[E].

    text: how a value is written. top: the end of the scale, by default that of the values.
    """
    known = np.concatenate([values[~np.isnan(values)] for _, values in layers])
    top = top or float(known.max(initial=0)) or 1.0
    epochs = max(values.size for _, values in layers)
    frame = _by_epoch(size, epochs, (0.0, top))
    areas = []
    for name, values in layers:
        parts = []
        for start, end in spans(~np.isnan(values)):
            x, y = frame.x(np.arange(start, end + 1) - 0.5).tolist(), frame.y(values[start:end]).tolist()
            tops = "".join(f"V{short(up)}H{short(right)}" for up, right in zip(y, x[1:], strict=True))
            parts.append(f"M{short(x[0])} {short(frame.y.start)}{tops}V{short(frame.y.start)}Z")
        areas.append(element("path", class_=f"area {name}", d="".join(parts)))
    hints = [
        f"epoch {epoch}: " + ", ".join(text(values[epoch]) for _, values in reversed(layers)) for epoch in range(epochs)
    ]
    return frame.drawn(
        *areas, _hints(frame, hints), label=label, x_name="epoch", y_name=y_name,
        x_ticks=_epoch_ticks(frame, 8), y_ticks=[(value, text(value)) for value in frame.y.ticks(6)],
    )  # fmt: skip


@dataclass(frozen=True)
class Bars:
    """A histogram. edges: float64[n + 1]; counts: int64[n]; names: of the bars; log: the scale of the edges."""

    edges: Floats
    counts: NDArray[np.int64]
    names: Sequence[str]
    log: bool = False

    @classmethod
    def of_whole(cls, counts: NDArray[np.int64], most: int = 100) -> "Bars":
        """Of the numbers 0..n-1, that occur so often, int64[n]; grouped so that there are at most ``most`` bars."""
        width = -(-counts.size // most)
        starts = np.arange(0, counts.size, width)
        names = [f"{start}" if width == 1 else f"{start} to {min(start + width, counts.size) - 1}" for start in starts]
        edges = width * np.arange(starts.size + 1.0) - 0.5
        return cls(edges, np.add.reduceat(counts, starts), names)


def bars(size: Size, found: Bars, *, label: str, x_name: str, total: int) -> Markup:
    """A histogram; heights are shares of ``total`` samples."""
    shares = found.counts / total
    frame = Frame.of(
        size, (found.edges[0], found.edges[-1]), (0.0, float(shares.max()) or 1.0), "x" if found.log else ""
    )
    x, y = frame.x(found.edges).tolist(), frame.y(shares).tolist()
    shown = []
    for bar, count in enumerate(found.counts.tolist()):
        if count:
            height = max(frame.y.start - y[bar], 1.0)
            width = x[bar + 1] - x[bar]
            title = element("title", f"{found.names[bar]}: {count:,} samples, {percent(shares[bar])}")
            shown.append(
                element("rect", title, class_="area kept", x=x[bar], y=frame.y.start - height,
                        width=width - min(1.0, width / 4), height=height)
            )  # fmt: skip
    x_ticks = _figures(frame.x.ticks(6)) if found.log else _epoch_ticks(frame, 8)
    return frame.drawn(
        *shown, label=label, x_name=x_name, y_name="share of samples",
        x_ticks=x_ticks, y_ticks=[(share, percent(share)) for share in frame.y.ticks(6)],
    )  # fmt: skip


def heat_map(
    size: Size, histograms: NDArray[np.int64], lines: Sequence[tuple[str, Floats]], hints: Sequence[str],
    low: float, high: float,
) -> Markup:  # fmt: skip
    """How the scores lie after each epoch. histograms: int64[E, 256], between EDGES, 0 where they are not known.

    lines: CSS class and values by epoch. low, high: the scores that are shown, two of EDGES.
    """
    epochs = len(histograms)
    frame = _by_epoch(size, epochs, (low, high), log=True)
    cells = _cells(frame, histograms, low, high)
    curves = [element("path", class_=f"line {name}", d=_held(frame, values)) for name, values in lines]
    return frame.drawn(
        *cells, *curves, _hints(frame, hints), label=_heat_label(epochs), x_name="epoch", y_name="score",
        x_ticks=_epoch_ticks(frame, 12 if size[0] > 500 else 6), y_ticks=_figures(frame.y.ticks(7)),
    )  # fmt: skip


def _heat_label(epochs: int) -> str:
    return f"Heat map of the distribution of scores after each of {epochs} epochs; the table below has its numbers."


def _cells(frame: Frame, histograms: NDArray[np.int64], low: float, high: float) -> list[Markup]:
    """A path for each level of colour: of the samples per width on the scale, since bins are not equally wide."""
    first, last = (int(np.searchsorted(EDGES, edge)) for edge in (low, high))
    enough = _TALLEST * (last - first) / (frame.y.start - frame.y.end)
    tall = next((bins for bins in (1, 2, 4) if bins >= enough), _DOUBLING)  # in a row
    wide = -(-2 * len(histograms) // int(frame.x.end - frame.x.start))  # epochs in a column
    inside = histograms[:, first:last].copy()
    inside[:, 0] += histograms[:, :first].sum(1)
    inside[:, -1] += histograms[:, last:].sum(1)
    columns, rows = np.arange(0, len(inside), wide), np.arange(0, last - first, tall)
    counts = np.add.reduceat(np.add.reduceat(inside, columns, 0), rows, 1)
    edges = EDGES[first:][np.append(rows, last - first)]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1) / np.diff(np.log(edges))
    # The lowest row takes all that lies below, so it says nothing of how dark the others should be.
    darkest = float(shares[:, 1:].max(initial=0)) or float(shares.max()) or 1.0
    levels = np.ceil(np.sqrt(np.minimum(shares / darkest, 1)) * _LEVELS).astype(int)
    x = frame.x(np.append(columns, len(inside)) - 0.5).tolist()
    y = frame.y(edges).tolist()
    parts: dict[int, list[str]] = {}
    for column, found in enumerate(levels):
        for level in np.unique(found[found > 0]).tolist():
            for start, end in spans(found == level):
                box = (
                    f"M{short(x[column])} {short(y[start])}H{short(x[column + 1])}V{short(y[end])}H{short(x[column])}Z"
                )
                parts.setdefault(level, []).append(box)
    return [element("path", class_=f"heat-{level}", d="".join(found)) for level, found in sorted(parts.items())]


def fan(
    size: Size, bands: Sequence[tuple[Floats, Floats]], median: Floats, samples: Sequence[tuple[int, Floats]],
    kind: str, y: tuple[float, float], label: str,
) -> Markup:  # fmt: skip
    """Quantile bands by epoch (low, high), their median, and the scores of single samples: (index, float64[E])."""
    frame = _by_epoch(size, median.size, y, log=True)
    areas = [element("path", class_="band", d=_between(frame, low, high)) for low, high in bands]
    lines = []
    for index, values in samples:
        some = _thinned(values)
        path = line_path(frame.x(some), frame.y(values[some]))
        lines.append(element("path", class_=f"sample {kind}", data_sample=index, d=path))
    return frame.drawn(
        *areas, element("path", class_="line median", d=_held(frame, median)), *lines, label=label,
        x_name="epoch", y_name="score", x_ticks=_epoch_ticks(frame, 8), y_ticks=_figures(frame.y.ticks(6)),
    )  # fmt: skip


def _thinned(values: Floats) -> NDArray[np.int64]:
    """The epochs of a sample's line that are drawn: int64[k], the last of them always."""
    step = -(-values.size // _POINTS)
    return np.arange(values.size - 1, -1, -step)[::-1]


def spark(size: Size, values: Floats, y: tuple[float, float], label: str) -> Markup:
    """One sample's scores by epoch, as small as a word."""
    width, height = size
    some = _thinned(values)
    across, up = Scale(0.0, max(values.size - 1.0, 1.0), 0.0, width), Scale(*y, height, 0.0, log=True)
    path = element("path", d=line_path(across(some), up(values[some])))
    return element(
        "svg",
        path,
        class_="spark",
        viewBox=f"0 -2 {width} {height + 4}",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )


@dataclass(frozen=True)
class Mark:
    """A sample that is shown in a gallery: where it lies in a scatter, of which kind it is, what to call it."""

    index: int
    x: float
    y: float
    kind: str
    text: str


def marker(kind: str, x: float, y: float, size: float = 5) -> Markup:
    """The sign of a kind of sample: one can tell them apart without colours."""
    shapes = {
        "easiest": f"M{short(x)} {short(y - size)}l{short(size)} {short(1.7 * size)}h{short(-2 * size)}z",
        "unstable": f"M{short(x - size * 0.9)} {short(y - size * 0.9)}h{short(1.8 * size)}v{short(1.8 * size)}"
        f"h{short(-1.8 * size)}z",
        "unlearned": f"M{short(x)} {short(y - 1.3 * size)}l{short(1.2 * size)} {short(1.3 * size)}"
        f"l{short(-1.2 * size)} {short(1.3 * size)}l{short(-1.2 * size)} {short(-1.3 * size)}z",
    }
    if kind in shapes:
        return element("path", class_=f"mark {kind}", d=shapes[kind])
    return element("circle", class_=f"mark {kind}", cx=x, cy=y, r=size)


def scatter(
    size: Size, cloud: tuple[Floats, Floats], marks: Sequence[Mark], *, label: str, x_name: str, y_name: str,
    x: tuple[float, float], y: tuple[float, float], log: bool,
) -> Markup:  # fmt: skip
    """Some samples as dots, and those of the galleries as links to them. log: both scales, else that of y."""
    frame = Frame.of(size, x, y, "xy" if log else "y")
    places = zip(frame.x(cloud[0]).tolist(), frame.y(cloud[1]).tolist(), strict=True)
    dots = "".join(f"M{short(a)} {short(b)}h0" for a, b in places if not math.isnan(a) and not math.isnan(b))
    links = []
    for mark in marks:
        across, down = frame.x.at(mark.x), frame.y.at(mark.y)
        if math.isnan(across) or math.isnan(down):
            continue
        down = min(down, frame.y.start - 6)  # not over the labels of the axis
        inside = element("title", mark.text), element("circle", class_="target", cx=across, cy=down, r=8)
        links.append(
            element(
                "a", *inside, marker(mark.kind, across, down),
                href=f"#sample-{mark.index}", data_sample=mark.index, aria_label=mark.text,
            )
        )  # fmt: skip
    return frame.drawn(
        element("path", class_="cloud", d=dots), *links, label=label, role="group", x_name=x_name, y_name=y_name,
        x_ticks=_figures(frame.x.ticks(8 if size[0] > 500 else 5)) if log else _epoch_ticks(frame, 10),
        y_ticks=_figures(frame.y.ticks(7)),
    )  # fmt: skip
