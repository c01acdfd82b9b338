"""Scales, numbers and paths of the charts in a report."""

import math
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from benchmarks.report_page import make_store
from infobatch_stream._formatting import duration, number, percent
from infobatch_stream.report.charts import Axis, Bars, Chart, HeatMap, Steps, histogram, score_range, spans, steps
from infobatch_stream.report.figures import amounts
from infobatch_stream.report.renderer import draw
from infobatch_stream.report.snapshot import Snapshot
from infobatch_stream.report.svg import Scale, element, line_path, short
from infobatch_stream.store.history import EDGES, epochs

positive = st.floats(1e-6, 1e6)


def test_what_is_put_into_an_element_is_escaped():
    assert element("text", "a < b & c", class_='"><script>') == (
        '<text class="&#34;&gt;&lt;script&gt;">a &lt; b &amp; c</text>'
    )
    assert element("g", element("path", d="M0 0", stroke_width=1.25, fill=None)) == (
        '<g><path d="M0 0" stroke-width="1.2"></path></g>'
    )


@given(st.floats(-1e6, 1e6), positive, st.integers(2, 12))
def test_ticks_of_a_linear_scale_lie_in_it_and_are_evenly_spaced_and_not_too_many(low, width, most):
    high = low + width
    assume(high > low + 1e-9 * abs(low))
    ticks = Scale(low, high, 0, 100).ticks(most)
    assert len(ticks) <= most
    assert all(low - 1e-6 * width <= tick <= high + 1e-6 * width for tick in ticks)
    gaps = np.diff(ticks)
    assert gaps == pytest.approx(gaps.mean() if gaps.size else 0, rel=1e-6)


@given(positive, st.floats(1.2, 1e12), st.integers(4, 12))
def test_ticks_of_a_logarithmic_scale_lie_in_it_and_are_some_and_not_too_many(low, by, most):
    ticks = Scale(low, low * by, 0, 100, log=True).ticks(most)
    assert 1 <= len(ticks) <= most
    assert all(low * 0.999 <= tick <= low * by * 1.001 for tick in ticks)


def test_ticks_are_round():
    assert Scale(0, 1, 0, 1).ticks(6) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert Scale(0, 66.7, 0, 1).ticks(6) == [0, 20, 40, 60]
    assert Scale(0.03, 6, 0, 1, log=True).ticks(5) == pytest.approx([0.03, 0.1, 0.3, 1, 3])
    assert Scale(1e-6, 8, 0, 1, log=True).ticks(4) == pytest.approx([1e-6, 1e-4, 1e-2, 1])
    assert Scale(1.5, 7, 0, 1, log=True).ticks(7) == [2, 3, 4, 5, 6, 7]


def test_a_scale_puts_what_lies_beyond_it_at_its_ends():
    scale = Scale(1, 100, 0, 10, log=True)
    assert scale([0, -3, 10, 1e9, math.nan]).tolist() == pytest.approx([0, 0, 5, 10, math.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (0.001234, "0.00123"), (12.345, "12.3"), (999.6, "1,000"), (1234.0, "1,230"), (123456.0, "123,000"),
        (1e-6, "10⁻⁶"), (1.23e-7, "1.2·10⁻⁷"), (-4.5e10, "-4.5·10¹⁰"), (math.nan, "\N{EN DASH}"),
    ],
)  # fmt: skip
def test_numbers_are_written_short(value, text):
    assert number(value) == text


def test_times_are_written_in_units_that_fit():
    assert [duration(seconds) for seconds in (0.5, 39.81, 90, 3900, 130_000)] == [
        "0.5 s", "39.8 s", "2 min", "1 h 5 min", "1 d 12 h",
    ]  # fmt: skip
    assert duration(math.nan) == "not known"


def test_shares_and_coordinates_are_written_short():
    assert [percent(share) for share in (1, 0.30712, 0.0004)] == ["100 %", "30.7 %", "0.04 %"]
    assert [short(pixels) for pixels in (3.0, 2.54, -0.01)] == ["3", "2.5", "0"]


def test_a_line_is_broken_where_a_value_is_missing():
    assert line_path(np.arange(5.0), np.array([1, 2, np.nan, 4, 5])) == "M0 1L1 2M3 4L4 5"
    assert spans(np.array([True, True, False, True])) == [(0, 2), (3, 4)]


def test_a_range_of_scores_is_of_whole_doublings_and_has_one_at_least():
    assert score_range(np.array([[0.3, 0.31]])) == (0.25, 0.5)
    assert score_range(np.array([[0.5, 0.5], [1.0, 3.0], [np.nan, np.nan]])) == (0.5, 4)
    for low, high in ((0.0, 0.0), (-3.0, -1.0), (1e30, 1e31), (math.nan, math.nan)):
        first, last = score_range(np.array([[low, high]]))
        assert EDGES[0] <= first < last <= EDGES[-1]


def test_bars_of_many_numbers_are_grouped_and_count_all():
    found = Bars.of_whole(np.arange(250), 250, most=100)
    assert found.counts.sum() == np.arange(250).sum()
    assert found.names[0] == "0 to 2"
    assert found.names[-1] == "249 to 249"
    assert np.diff(found.edges).tolist() == [3] * len(found.counts)
    assert Bars.of_whole(np.ones(5, np.int64), 5).names == ["0", "1", "2", "3", "4"]


def test_heights_of_bars_are_shares_of_all_samples():
    svg = draw(histogram("l", Bars.of_whole(np.array([10, 30, 0]), 40), "x"), (360, 220))
    assert re.findall("<title>(.*?)</title>", svg) == ["0: 10 samples, 25 %", "1: 30 samples, 75 %"]
    heights = [float(found) for found in re.findall(r' height="(\S+)"', svg)]
    assert heights[1] / heights[0] == pytest.approx(3, rel=0.01)


def heat_map(counts, low, high):
    chart = Chart("l", Axis.epochs(len(counts)), Axis("score", low, high, log=True), [HeatMap(counts)])
    return draw(chart, (740, 380))


@pytest.mark.parametrize("epochs", [1, 3, 90, 1000])
def test_a_heat_map_shows_equal_densities_in_equal_colours_and_stays_small(epochs):
    flat = np.zeros((epochs, 256), np.int64)
    flat[:, 80:160] = np.round(1e6 * np.diff(np.log(EDGES.astype(float)))[80:160])
    svg = heat_map(flat, float(EDGES[80]), float(EDGES[160]))
    assert set(re.findall(r'class="(heat-\d)"', svg)) == {"heat-9"}
    uneven = np.random.default_rng(0).integers(0, 1000, (epochs, 256))
    assert len(heat_map(uneven, float(EDGES[0]), float(EDGES[-1]))) < 700_000


def test_steps_are_missing_where_an_epoch_is_and_say_what_each_is():
    svg = draw(steps("l", [Steps("kept", np.array([0.5, np.nan, 1.0]))], "y", percent), (360, 220))
    assert re.search(r'class="area kept" d="(.*?)"', svg).group(1).count("M") == 2
    assert re.findall("<title>(.*?)</title>", svg) == ["epoch 0: 50 %", "epoch 1: \N{EN DASH}", "epoch 2: 100 %"]


def test_figures_are_data_that_can_be_read_without_drawing_them(tmp_path):
    make_store(tmp_path / "scores.zarr", 200, 6)
    kept, saved, _ = amounts(Snapshot.take(tmp_path / "scores.zarr"))
    rows = epochs(tmp_path / "scores.zarr")
    assert kept.chart.layers[0].values.tolist() == [row.kept / row.entries for row in rows]
    share = 1 - sum(row.trained for row in rows) / sum(row.entries for row in rows)
    assert saved.chart.layers[0].values[-1] == pytest.approx(share)
    assert (kept.chart.x.name, kept.chart.y.name) == ("epoch", "share of samples")
