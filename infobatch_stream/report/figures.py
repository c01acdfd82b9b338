"""The figures of a report: which charts there are of a store, and what is said of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from infobatch_stream._formatting import duration, number, percent
from infobatch_stream.report import charts
from infobatch_stream.report.charts import Axis, Band, Bars, Chart, Floats, Line, Size, Steps, histogram, score_range
from infobatch_stream.report.galleries import Gallery
from infobatch_stream.report.loss_history import Losses
from infobatch_stream.report.snapshot import Snapshot
from infobatch_stream.store.history import SHARES, Epoch, Training

__all__ = ["Figure", "amounts", "distribution", "points", "trainings", "trajectories"]

_SMALL: Final = (360, 220)  # pixels of a chart of which three are in a row
_MIDDLE: Final = (548, 270)
_WIDE: Final = (740, 380)
_NARROW: Final = (360, 300)  # of those that are too wide for a phone
_CLOUD: Final = 2000  # samples in a scatter, beside those of the galleries
_BLOCK: Final = 1 << 20
_HINTS: Final = 400  # epochs, beyond which they have none
_BARS: Final = 40  # of the histogram of scores
_JITTER: Final = 0.7  # of an epoch, over which points of as many are spread


@dataclass(frozen=True)
class Figure:
    """A chart, what is said of it, and its size on a screen, and on a phone, if it is another there."""

    title: str
    note: str
    chart: Chart
    wide: Size = _SMALL
    narrow: Size | None = None


def amounts(found: Snapshot) -> list[Figure]:
    """What was kept, and what that saved; nothing where no epoch is known."""
    if not found.epochs:
        return []
    kept, entries, trained = (found.by_epoch(name) for name in ("kept", "entries", "trained"))
    known = ~np.isnan(entries)
    so_far = np.full(found.epoch, np.nan)
    so_far[known] = 1 - np.cumsum(trained[known]) / np.cumsum(entries[known])
    share = kept / entries
    least, most = (percent(float(one)) for one in (np.nanmin(share), np.nanmax(share)))
    label = f"Share of the samples kept, by epoch: from {least} to {most}."
    label_so_far = f"Share of the samples saved so far, by epoch; in the end {percent(so_far[known][-1])}."
    figures = [
        Figure(
            "Kept in each epoch",
            "The share of the samples that the epoch kept; the others were pruned.",
            charts.steps(label, [Steps("kept", share)], "share of samples", percent, top=1.0),
        ),
        Figure(
            "Saved so far",
            "The share of all samples of the epochs up to here that was not trained on.",
            charts.steps(label_so_far, [Steps("saved", so_far)], "share of samples", percent),
        ),
    ]
    took, whole = found.seconds()
    if not np.isnan(whole).all():
        unit, name = _unit(float(np.nanmax(whole)))
        label = (
            f"Time of each epoch, {duration(float(np.nansum(took)))} in all; with all samples an estimated "
            f"{duration(float(np.nansum(whole)))}."
        )
        figures.append(
            Figure(
                "Time of each epoch",
                "Full colour: what it took. Pale: what it would have taken with all samples, estimated from its "
                "seconds per trained sample.",
                charts.steps(label, [Steps("saved", whole / unit), Steps("kept", took / unit)], name, number),
            )
        )
    return figures


def _unit(most: float) -> tuple[float, str]:
    """Seconds of the unit in which times up to ``most`` seconds are written, and its name."""
    return next((one for one in ((3600.0, "hours"), (60.0, "minutes")) if most >= 2 * one[0]), (1.0, "seconds"))


def distribution(found: Snapshot) -> Figure | None:
    """How the scores moved; None where no epoch left any."""
    histograms = found.histograms()
    if not histograms.any():
        return None
    hints = [""] * found.epoch
    for one in found.epochs[:_HINTS]:
        low, median, high = (number(float(one.quantiles[SHARES.index(share)])) for share in (0.05, 0.5, 0.95))
        hints[one.number] = (
            f"epoch {one.number}: 5 % below {low}, half below {median}, 95 % below {high}; mean {number(one.mean)}"
        )
    chart = Chart(
        f"Heat map of the distribution of scores after each of {found.epoch} epochs; the table below has its numbers.",
        Axis.epochs(found.epoch, ticks=(12, 6)),
        Axis("score", *_scores_shown(found), log=True, ticks=(7, 7)),
        [
            charts.HeatMap(histograms),
            *(Line.by_epoch("outer", found.quantile(share)) for share in (0.05, 0.95)),
            Line.by_epoch("median", found.quantile(0.5)),
            Line.by_epoch("mean", found.by_epoch("mean")),
        ],
        hints,
    )
    note = "Each column is an epoch; the stronger its colour, the more samples have such a score."
    return Figure("Scores after each epoch", note, chart, _WIDE, _NARROW)


def _scores_shown(found: Snapshot) -> tuple[float, float]:
    return score_range(np.stack([found.quantile(0.01), found.quantile(1.0)], 1))


def trainings(found: Snapshot, now: Epoch) -> list[Figure]:
    """How often, and how long ago, samples were trained on; and the scores that there are ``now``."""
    figures = []
    total = found.scores.size
    if found.training is not None:
        whole = found.epoch - found.training.since
        since = f", those from epoch {found.training.since} on" if found.training.since else ""
        often, ages, never = _counts(found.training, found.epoch)
        figures += [
            Figure(
                "How often a sample was trained on",
                f"Of the {whole} epochs that were counted{since}.",
                histogram(
                    f"Histogram of how often samples were trained on in {whole} epochs.",
                    Bars.of_whole(often, total),
                    "times trained on",
                ),
            ),
            Figure(
                "How old the scores are",
                "Epochs since the sample was last trained on; 0 is the latest epoch."
                + (f" Left out: {never:,} that never were." if never else ""),
                histogram(
                    "Histogram of how many epochs ago samples were last trained on.",
                    Bars.of_whole(ages, total),
                    "epochs ago",
                ),
            ),
        ]
    if now.histogram.any():
        low, high = score_range(np.array([now.quantiles[[1, -1]]]))
        label = f"Histogram of the scores now; half of them are below {number(float(now.quantiles[5]))}."
        figures.append(
            Figure(
                "Scores now",
                "The last recorded loss of each sample. Those beyond the ends are in the first and last bar.",
                histogram(label, _by_score(found.scores, low, high), "score", log=True),
            )
        )
    return figures


def _counts(training: Training, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """How many samples were trained on 0, 1, ... times, and last 0, 1, ... epochs ago; and how many never."""
    whole = epoch - training.since
    often, ages = np.zeros(whole + 1, np.int64), np.zeros(whole, np.int64)
    for start in range(0, training.times.size, _BLOCK):
        times, last = training.times[start : start + _BLOCK], training.last[start : start + _BLOCK]
        often += np.bincount(np.minimum(times, whole), minlength=whole + 1)
        ages += np.bincount(np.clip(epoch - 1 - last[last >= 0], 0, whole - 1), minlength=whole)
    return often, ages, training.times.size - int(ages.sum())


def _by_score(scores: NDArray[np.float32], low: float, high: float) -> Bars:
    edges = np.geomspace(low, high, _BARS + 1)
    edges[0], edges[-1] = low, high
    counts = np.zeros(_BARS, np.int64)
    for start in range(0, scores.size, _BLOCK):
        part = scores[start : start + _BLOCK]
        counts += np.histogram(np.clip(part[~np.isnan(part)], low, high), edges)[0]
    names = [f"{number(start)} to {number(end)}" for start, end in pairwise(edges.tolist())]
    return Bars(edges, counts, names, scores.size)


def trajectories(found: Snapshot, galleries: Sequence[Gallery], lines: dict[int, Floats]) -> list[Figure]:
    """The scores of the samples of each gallery by epoch, float64[E], before the bands of those of all samples."""
    bands = [Band.by_epoch(found.quantile(low), found.quantile(high)) for low, high in ((0.05, 0.95), (0.25, 0.75))]
    median = Line.by_epoch("median", found.quantile(0.5))
    x, y = Axis.epochs(found.epoch), Axis("score", *_scores_shown(found), log=True)
    figures = []
    for gallery in galleries:
        samples = [Line.of_sample(gallery.kind, index, lines[index]) for index in gallery.index.tolist()]
        label = f"Scores of {len(samples)} samples by epoch, those called {gallery.title.lower()}."
        chart = Chart(label, x, y, [*bands, median, *samples])
        figures.append(Figure(gallery.title, f"{len(samples)} samples", chart, _MIDDLE, _NARROW))
    return figures


def points(found: Snapshot, galleries: Sequence[Gallery]) -> Figure | None:
    """Samples drawn at random (the same each time), and those of the galleries, by what is known of them."""
    some = np.random.default_rng(0).choice(found.scores.size, min(_CLOUD, found.scores.size), replace=False)
    kinds = {index: gallery for gallery in reversed(galleries) for index in gallery.index.tolist()}
    index = np.concatenate([np.sort(some), np.array(sorted(kinds), np.int64)])
    scores = found.scores[index].astype(np.float64)
    cloud, shown = slice(some.size), slice(some.size, None)
    if found.losses is not None:
        x, y = _moments(found.losses, index)
        title, y_name = "Mean and spread of the losses", "standard deviation of the losses"
        note = "Each dot is a sample: the mean of its recorded losses, and their standard deviation."
        across = Axis("mean of the losses", *_extent(x[cloud], x[shown]), log=True, ticks=(8, 5))
    elif found.training is not None:
        # Spread by the golden ratio, or those that were trained on as often would hide each other.
        x = found.training.times[index] + _JITTER * ((index * 0.6180339887498949) % 1 - 0.5)
        y = scores
        title, y_name = "Score and training", "score"
        note = "Each dot is a sample: how often it was trained on, and its score now."
        across = Axis.counting("times trained on", 0, found.epoch - found.training.since, (10, 10))
    else:
        return None
    if not np.isfinite(y).any():
        return None
    marks = []
    for sample, x_at, y_at, score in zip(*(one[shown].tolist() for one in (index, x, y, scores)), strict=True):
        text = f"sample {sample}, {kinds[sample].title.lower()}, score {number(score)}"
        marks.append(charts.Mark(sample, x_at, y_at, kinds[sample].kind, text))
    label = f"{title}: {len(marks)} samples of the galleries, as links, among others."
    up = Axis(y_name, *_extent(y[cloud], y[shown]), log=True, ticks=(7, 7))
    all_of_them = some.size == found.scores.size
    drawn = (
        "All samples are here" if all_of_them else f"{some.size:,} of {found.scores.size:,} samples, drawn at random"
    )
    return Figure(
        title,
        f"{note} {drawn}. Those of the galleries have a sign, which leads to the sample; one "
        "of two galleries has that of the first.",
        Chart(label, across, up, [charts.Dots(x[cloud], y[cloud]), *marks]),
        _WIDE,
        _NARROW,
    )


def _moments(losses: Losses, index: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Mean and standard deviation of the recorded losses of samples; NaN for those with fewer than two."""
    times, mean, spread, _ = losses.moments_of(index)
    enough = times >= 2
    return np.where(enough, mean, np.nan), np.where(enough, spread, np.nan)


def _extent(values: Floats, marked: Floats) -> tuple[float, float]:
    """What a logarithmic scale shows: ``values`` from their 1 % on, and all of ``marked``; not what is 0 or less."""
    known, marked = (one[np.isfinite(one) & (one > 0)] for one in (values, marked))
    if not known.size:
        return 0.1, 1.0
    low = float(min(np.quantile(known, 0.01), marked.min(initial=np.inf)))
    high = float(max(known.max(), marked.max(initial=0)))
    return (low * 0.9, high * 1.1) if high > 1.1 * low else (low / 2, high * 2)
