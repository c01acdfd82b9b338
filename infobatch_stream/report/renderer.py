"""Charts -> SVG. Each kind of layer is drawn by a function that is registered for it."""

import math
from dataclasses import dataclass
from functools import singledispatch
from typing import Final

import numpy as np
from markupsafe import Markup

from infobatch_stream._formatting import percent
from infobatch_stream.report import charts
from infobatch_stream.report.charts import Axis, Chart, Layer, Size, Spark, spans
from infobatch_stream.report.svg import Scale, element, join, line_path, short
from infobatch_stream.store.history import EDGES

__all__ = ["draw", "draw_marker", "draw_spark"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 26, 38  # pixels around the plot, for ticks and labels
_PHONE: Final = 500  # pixels of a chart's width, up to which it has fewer ticks
_ROW: Final = 4  # pixels of a row of a heat map, at least
_LEVELS: Final = 9  # of colour in a heat map


@dataclass(frozen=True)
class _Frame:
    """The plot within a chart: its scales, as values."""

    x: Scale
    y: Scale


def draw(chart: Chart, size: Size) -> Markup:
    """The chart as an SVG of ``size`` pixels."""
    width, height = size
    x, y = chart.x, chart.y
    across, up = (_LEFT, width - _RIGHT), (height - _BOTTOM, _TOP)
    frame = _Frame(Scale(x.low, x.high, *across, x.log), Scale(y.low, y.high, *up, y.log))
    left, right, bottom = frame.x.start, frame.x.end, frame.y.start
    x_ticks, y_ticks = _ticks(x, frame.x, width), _ticks(y, frame.y, width)
    lines = [element("path", class_="grid", d=f"M{left} {short(frame.y.at(at))}H{right}") for at, _ in y_ticks]
    texts = [
        *(element("text", text, class_="y", x=left - 6, y=frame.y.at(at) + 4.0) for at, text in y_ticks),
        *(element("text", text, class_="x", x=frame.x.at(at), y=bottom + 15) for at, text in x_ticks),
        element("text", y.name, class_="name", x=2, y=12),
        element("text", x.name, class_="x name", x=(left + right) / 2, y=bottom + 32),
    ]
    has_links = any(isinstance(layer, charts.Mark) for layer in chart.layers)
    axis = element("path", class_="axis", d=f"M{left} {bottom}H{right}")
    return element(
        "svg",
        element("g", *lines, aria_hidden="true"),
        *(_layer(layer, frame) for layer in chart.layers),
        _hints(chart, frame),
        element("g", axis, *texts, aria_hidden="true"),
        viewBox=f"0 0 {width} {height}",
        role="group" if has_links else "img",
        aria_label=chart.label,
    )


def _ticks(axis: Axis, scale: Scale, width: int) -> list[tuple[float, str]]:
    values = scale.ticks(axis.ticks[width <= _PHONE])
    if axis.whole:
        values = sorted({float(round(value)) for value in values if axis.low <= round(value) <= axis.high})
    return [(value, axis.text(value)) for value in values]


def _hints(chart: Chart, frame: _Frame) -> Markup:
    width = frame.x.at(0.5) - frame.x.at(-0.5)
    return join(
        element(
            "rect", element("title", text), class_="hint",
            x=frame.x.at(epoch - 0.5), y=float(frame.y.end), width=width, height=float(frame.y.start - frame.y.end),
        )
        for epoch, text in enumerate(chart.hints)
        if text
    )  # fmt: skip


@singledispatch
def _layer(layer: Layer, frame: _Frame) -> Markup:
    raise TypeError(f"nothing draws a {type(layer).__name__}")


@_layer.register
def _steps(layer: charts.Steps, frame: _Frame) -> Markup:
    parts = []
    for start, end in spans(~np.isnan(layer.values)):
        x, y = frame.x(np.arange(start, end + 1) - 0.5).tolist(), frame.y(layer.values[start:end]).tolist()
        tops = "".join(f"V{short(up)}H{short(right)}" for up, right in zip(y, x[1:], strict=True))
        parts.append(f"M{short(x[0])} {short(frame.y.start)}{tops}V{short(frame.y.start)}Z")
    return element("path", class_=f"area {layer.kind}", d="".join(parts))


@_layer.register
def _line(layer: charts.Line, frame: _Frame) -> Markup:
    path = line_path(frame.x(layer.x), frame.y(layer.y))
    return element("path", class_=layer.kind, data_sample=layer.index, d=path)


@_layer.register
def _band(layer: charts.Band, frame: _Frame) -> Markup:
    parts = []
    for start, end in spans(~np.isnan(layer.x)):
        x, low, high = (values[start:end] for values in (layer.x, layer.low, layer.high))
        around = frame.x(np.concatenate([x, x[::-1]])), frame.y(np.concatenate([high, low[::-1]]))
        parts.append(f"{line_path(*around)}Z")
    return element("path", class_="band", d="".join(parts))


def draw_spark(spark: Spark, size: Size) -> Markup:
    """The line as an SVG of ``size`` pixels, without axes."""
    width, height = size
    x, y = (
        Scale(0.0, max(float(spark.line.x[-1]), 1.0), 0.0, width),
        Scale(spark.low, spark.high, height, 0.0, log=True),
    )
    return element(
        "svg",
        element("path", d=line_path(x(spark.line.x), y(spark.line.y))),
        class_="spark",
        viewBox=f"0 -2 {width} {height + 4}",
        preserveAspectRatio="none",
        role="img",
        aria_label=spark.label,
    )


@_layer.register
def _bars(layer: charts.Bars, frame: _Frame) -> Markup:
    x, y = frame.x(layer.edges).tolist(), frame.y(layer.shares).tolist()
    shown = []
    for bar, (count, share) in enumerate(zip(layer.counts.tolist(), layer.shares.tolist(), strict=True)):
        if count:
            height, width = max(frame.y.start - y[bar], 1.0), x[bar + 1] - x[bar]
            title = element("title", f"{layer.names[bar]}: {count:,} samples, {percent(share)}")
            shown.append(
                element("rect", title, class_="area kept", x=x[bar], y=frame.y.start - height,
                        width=width - min(1.0, width / 4), height=height)
            )  # fmt: skip
    return join(shown)


@_layer.register
def _heat_map(layer: charts.HeatMap, frame: _Frame) -> Markup:
    """A path for each level of colour: of the samples per width on the scale, since bins are not equally wide."""
    first, last = (int(np.searchsorted(EDGES, edge)) for edge in (frame.y.low, frame.y.high))
    enough = _ROW * (last - first) / (frame.y.start - frame.y.end)
    tall = next((bins for bins in (1, 2, 4) if bins >= enough), 8)  # in a row
    wide = -(-2 * len(layer.counts) // int(frame.x.end - frame.x.start))  # epochs in a column
    inside = layer.counts[:, first:last].copy()
    inside[:, 0] += layer.counts[:, :first].sum(1)
    inside[:, -1] += layer.counts[:, last:].sum(1)
    columns, rows = np.arange(0, len(inside), wide), np.arange(0, last - first, tall)
    counts = np.add.reduceat(np.add.reduceat(inside, columns, 0), rows, 1)
    edges = EDGES[first:][np.append(rows, last - first)]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1) / np.diff(np.log(edges))
    # The lowest row takes all that lies below, so it says nothing of how dark the others should be.
    darkest = float(shares[:, 1:].max(initial=0)) or float(shares.max()) or 1.0
    levels = np.ceil(np.sqrt(np.minimum(shares / darkest, 1)) * _LEVELS).astype(int)
    x = list(map(short, frame.x(np.append(columns, len(inside)) - 0.5).tolist()))
    y = list(map(short, frame.y(edges).tolist()))
    parts: dict[int, list[str]] = {}
    for column, found in enumerate(levels):
        for level in np.unique(found[found > 0]).tolist():
            for start, end in spans(found == level):
                box = f"M{x[column]} {y[start]}H{x[column + 1]}V{y[end]}H{x[column]}Z"
                parts.setdefault(level, []).append(box)
    return join(element("path", class_=f"heat-{level}", d="".join(found)) for level, found in sorted(parts.items()))


@_layer.register
def _dots(layer: charts.Dots, frame: _Frame) -> Markup:
    places = zip(frame.x(layer.x).tolist(), frame.y(layer.y).tolist(), strict=True)
    known = (place for place in places if not any(map(math.isnan, place)))
    return element("path", class_="cloud", d="".join(f"M{short(x)} {short(y)}h0" for x, y in known))


@_layer.register
def _mark(layer: charts.Mark, frame: _Frame) -> Markup:
    x, y = frame.x.at(layer.x), frame.y.at(layer.y)
    if math.isnan(x) or math.isnan(y):
        return Markup()
    y = min(y, frame.y.start - 6)  # not over the labels of the axis
    return element(
        "a", element("title", layer.text), element("circle", class_="target", cx=x, cy=y, r=8),
        draw_marker(layer.kind, x, y),
        href=f"#sample-{layer.index}", data_sample=layer.index, aria_label=layer.text,
    )  # fmt: skip


def draw_marker(kind: str, x: float, y: float, size: float = 5) -> Markup:
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
