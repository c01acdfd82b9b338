"""Charts -> SVG. Each kind of layer is drawn by a function that is registered for it."""

import math
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


def draw(chart: Chart, size: Size) -> Markup:
    """The chart as an SVG of ``size`` pixels."""
    width, height = size
    left, right, bottom = _LEFT, width - _RIGHT, height - _BOTTOM
    x = Scale(chart.x.low, chart.x.high, left, right, chart.x.log)
    y = Scale(chart.y.low, chart.y.high, bottom, _TOP, chart.y.log)
    x_ticks, y_ticks = _ticks(chart.x, x, width), _ticks(chart.y, y, width)
    lines = [element("path", class_="grid", d=f"M{left} {short(y.at(at))}H{right}") for at, _ in y_ticks]
    texts = [
        *(element("text", text, class_="y", x=left - 6, y=y.at(at) + 4.0) for at, text in y_ticks),
        *(element("text", text, class_="x", x=x.at(at), y=bottom + 15) for at, text in x_ticks),
        element("text", chart.y.name, class_="name", x=2, y=12),
        element("text", chart.x.name, class_="x name", x=(left + right) / 2, y=bottom + 32),
    ]
    has_links = any(isinstance(layer, charts.Mark) for layer in chart.layers)
    return element(
        "svg",
        element("g", *lines, aria_hidden="true"),
        *(_layer(layer, x, y) for layer in chart.layers),
        *(_hint(epoch, text, x, y) for epoch, text in enumerate(chart.hints) if text),
        element("g", element("path", class_="axis", d=f"M{left} {bottom}H{right}"), *texts, aria_hidden="true"),
        viewBox=f"0 0 {width} {height}",
        role="group" if has_links else "img",
        aria_label=chart.label,
    )


def _ticks(axis: Axis, scale: Scale, width: int) -> list[tuple[float, str]]:
    values = scale.ticks(axis.ticks[width <= _PHONE])
    if axis.whole:
        values = sorted({float(round(value)) for value in values if axis.low <= round(value) <= axis.high})
    return [(value, axis.text(value)) for value in values]


def _hint(epoch: int, text: str, x: Scale, y: Scale) -> Markup:
    left, right = x.at(epoch - 0.5), x.at(epoch + 0.5)
    title = element("title", text)
    return element("rect", title, class_="hint", x=left, y=y.end, width=right - left, height=y.start - y.end)


@singledispatch
def _layer(layer: Layer, x: Scale, y: Scale) -> Markup:
    raise TypeError(f"nothing draws a {type(layer).__name__}")


@_layer.register
def _steps(layer: charts.Steps, x: Scale, y: Scale) -> Markup:
    parts = []
    for start, end in spans(~np.isnan(layer.values)):
        left, *rights = map(short, x(np.arange(start, end + 1) - 0.5).tolist())
        heights = map(short, y(layer.values[start:end]).tolist())
        tops = "".join(f"V{height}H{right}" for height, right in zip(heights, rights, strict=True))
        parts.append(f"M{left} {short(y.start)}{tops}V{short(y.start)}Z")
    return element("path", class_=f"area {layer.kind}", d="".join(parts))


@_layer.register
def _line(layer: charts.Line, x: Scale, y: Scale) -> Markup:
    return element("path", class_=layer.kind, data_sample=layer.index, d=line_path(x(layer.x), y(layer.y)))


@_layer.register
def _band(layer: charts.Band, x: Scale, y: Scale) -> Markup:
    parts = []
    for start, end in spans(~np.isnan(layer.x)):
        across, low, high = (values[start:end] for values in (layer.x, layer.low, layer.high))
        around = np.concatenate([across, across[::-1]]), np.concatenate([high, low[::-1]])
        parts.append(f"{line_path(x(around[0]), y(around[1]))}Z")
    return element("path", class_="band", d="".join(parts))


def draw_spark(spark: Spark, size: Size) -> Markup:
    """The line as an SVG of ``size`` pixels, without axes."""
    width, height = size
    x = Scale(0.0, max(float(spark.line.x[-1]), 1.0), 0.0, width)
    y = Scale(spark.low, spark.high, height, 0.0, log=True)
    return element(
        "svg", element("path", d=line_path(x(spark.line.x), y(spark.line.y))), class_="spark",
        viewBox=f"0 -2 {width} {height + 4}", preserveAspectRatio="none", role="img", aria_label=spark.label,
    )  # fmt: skip


@_layer.register
def _bars(layer: charts.Bars, x: Scale, y: Scale) -> Markup:
    edges, tops, shares = x(layer.edges).tolist(), y(layer.shares).tolist(), layer.shares.tolist()
    shown = []
    for bar in np.flatnonzero(layer.counts).tolist():
        height, width = max(y.start - tops[bar], 1.0), edges[bar + 1] - edges[bar]
        title = element("title", f"{layer.names[bar]}: {layer.counts[bar]:,} samples, {percent(shares[bar])}")
        box = {"x": edges[bar], "y": y.start - height, "width": width - min(1.0, width / 4), "height": height}
        shown.append(element("rect", title, class_="area kept", **box))
    return join(shown)


@_layer.register
def _heat_map(layer: charts.HeatMap, x: Scale, y: Scale) -> Markup:
    """A path for each level of colour: of the samples per width on the scale, since bins are not equally wide."""
    first, last = (int(np.searchsorted(EDGES, edge)) for edge in (y.low, y.high))
    enough = _ROW * (last - first) / (y.start - y.end)
    tall = next((bins for bins in (1, 2, 4) if bins >= enough), 8)  # in a row
    wide = math.ceil(2 * len(layer.counts) / (x.end - x.start))  # epochs in a column
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
    across = list(map(short, x(np.append(columns, len(inside)) - 0.5).tolist()))
    up = list(map(short, y(edges).tolist()))
    parts: dict[int, list[str]] = {}
    for column, found in enumerate(levels):
        for level in np.unique(found[found > 0]).tolist():
            for start, end in spans(found == level):
                box = f"M{across[column]} {up[start]}H{across[column + 1]}V{up[end]}H{across[column]}Z"
                parts.setdefault(level, []).append(box)
    return join(element("path", class_=f"heat-{level}", d="".join(found)) for level, found in sorted(parts.items()))


@_layer.register
def _dots(layer: charts.Dots, x: Scale, y: Scale) -> Markup:
    places = zip(x(layer.x).tolist(), y(layer.y).tolist(), strict=True)
    known = (place for place in places if not any(map(math.isnan, place)))
    return element("path", class_="cloud", d="".join(f"M{short(across)} {short(up)}h0" for across, up in known))


@_layer.register
def _mark(layer: charts.Mark, x: Scale, y: Scale) -> Markup:
    across, down = x.at(layer.x), y.at(layer.y)
    if math.isnan(across) or math.isnan(down):
        return Markup()
    down = min(down, y.start - 6)  # not over the labels of the axis
    return element(
        "a", element("title", layer.text), element("circle", class_="target", cx=across, cy=down, r=8),
        draw_marker(layer.kind, across, down),
        href=f"#sample-{layer.index}", data_sample=layer.index, aria_label=layer.text,
    )  # fmt: skip


def draw_marker(kind: str, x: float, y: float) -> Markup:
    """The sign of a kind of sample, about x, y: one can tell them apart without colours."""
    shapes = {
        "easiest": f"M{short(x)} {short(y - 5)}l5 8.5h-10z",
        "unstable": f"M{short(x - 4.5)} {short(y - 4.5)}h9v9h-9z",
        "unlearned": f"M{short(x)} {short(y - 6.5)}l6 6.5l-6 6.5l-6 -6.5z",
    }
    if kind in shapes:
        return element("path", class_=f"mark {kind}", d=shapes[kind])
    return element("circle", class_=f"mark {kind}", cx=x, cy=y, r=5)
