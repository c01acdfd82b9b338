"""The figures of a report: which charts there are of a store, and what is said of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from infobatch_stream._formatting import duration, number, percent
from infobatch_stream.report.charts import Bars, Mark, bars, fan, heat_map, scatter, score_range, steps
from infobatch_stream.report.galleries import Gallery
from infobatch_stream.report.loss_history import Losses
from infobatch_stream.report.snapshot import Snapshot
from infobatch_stream.store.history import Epoch, Training

__all__ = ["Figure", "amounts", "distribution", "points", "trainings", "trajectories"]

Floats = NDArray[np.float64]
Size = tuple[int, int]

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
    """A chart as it is on a screen, and on a phone, if it is another there."""

    title: str
    note: str
    wide: Markup
    narrow: Markup | None = None

    @classmethod
    def both(cls, title: str, note: str, sizes: tuple[Size, Size], draw: Callable[[Size], Markup]) -> "Figure":
        """The chart that ``draw`` makes, in two sizes."""
        return cls(title, note, *map(draw, sizes))


def amounts(found: Snapshot) -> list[Figure]:
    """What was kept, and what that saved; nothing where no epoch is known."""
    if not found.epochs:
        return []
    kept, entries, trained = (found.by_epoch(name) for name in ("kept", "entries", "trained"))
    known = ~np.isnan(entries)
    so_far = np.full(found.epoch, np.nan)
    so_far[known] = 1 - np.cumsum(trained[known]) / np.cumsum(entries[known])
    share = kept / entries
    figures = [
        Figure(
            "Kept in each epoch",
            "The share of the samples that the epoch kept; the others were pruned.",
            steps(_SMALL, [("kept", share)], top=1.0, text=percent, y_name="share of samples",
                  label=f"Share of the samples kept, by epoch: {_from_to(share, percent)}."),
        ),
        Figure(
            "Saved so far",
            "The share of all samples of the epochs up to here that was not trained on.",
            steps(_SMALL, [("saved", so_far)], text=percent, y_name="share of samples",
                  label=f"Share of the samples saved so far, by epoch; in the end {percent(so_far[known][-1])}."),
        ),
    ]  # fmt: skip
    took, whole = found.seconds()
    if not np.isnan(whole).all():
        unit, name = _unit(float(np.nanmax(whole)))
        figures.append(
            Figure(
                "Time of each epoch",
                "Full colour: what it took. Pale: what it would have taken with all samples, estimated from its "
                "seconds per trained sample.",
                steps(_SMALL, [("saved", whole / unit), ("kept", took / unit)], text=number, y_name=name,
                      label=f"Time of each epoch, {duration(float(np.nansum(took)))} in all; with all samples an "
                      f"estimated {duration(float(np.nansum(whole)))}."),
            )
        )  # fmt: skip
    return figures


def _unit(most: float) -> tuple[float, str]:
    """Seconds of the unit in which times up to ``most`` seconds are written, and its name."""
    return next((one for one in ((3600.0, "hours"), (60.0, "minutes")) if most >= 2 * one[0]), (1.0, "seconds"))


def _from_to(values: Floats, text: Callable[[float], str]) -> str:
    return f"from {text(float(np.nanmin(values)))} to {text(float(np.nanmax(values)))}"


def distribution(found: Snapshot) -> Figure | None:
    """How the scores moved; None where no epoch left any."""
    low, high = _scores_shown(found)
    histograms = found.histograms()
    if not histograms.any():
        return None
    lines = [
        ("outer", found.quantile(0.05)), ("outer", found.quantile(0.95)), ("median", found.quantile(0.5)),
        ("mean", found.by_epoch("mean")),
    ]  # fmt: skip
    hints = [""] * found.epoch
    for one in found.epochs[:_HINTS]:
        hints[one.number] = _hint(one)
    return Figure.both(
        "Scores after each epoch",
        "Each column is an epoch; the stronger its colour, the more samples have such a score.",
        (_WIDE, _NARROW),
        lambda size: heat_map(size, histograms, lines, hints, low, high),
    )


def _hint(one: Epoch) -> str:
    low, median, high = (number(float(one.quantiles[place])) for place in (2, 5, 8))
    return f"epoch {one.number}: 5 % below {low}, half below {median}, 95 % below {high}; mean {number(one.mean)}"


def _scores_shown(found: Snapshot) -> tuple[float, float]:
    return score_range(np.stack([found.quantile(0.01), found.quantile(1.0)], 1))


def trainings(found: Snapshot, now: Epoch) -> list[Figure]:
    """How often, and how long ago, samples were trained on; and the scores that there are ``now``."""
    figures = []
    total = found.scores.size
    if found.training is not None:
        whole = found.epoch - found.training.since
        often, ages, never = _counts(found.training, found.epoch)
        figures += [
            Figure(
                "How often a sample was trained on",
                f"Of the {whole} epochs that were counted{_since(found.training)}.",
                bars(_SMALL, Bars.of_whole(often), total=total, x_name="times trained on",
                     label=f"Histogram of how often samples were trained on in {whole} epochs."),
            ),
            Figure(
                "How old the scores are",
                "Epochs since the sample was last trained on; 0 is the latest epoch."
                + (f" Left out: {never:,} that never were." if never else ""),
                bars(_SMALL, Bars.of_whole(ages), total=total, x_name="epochs ago",
                     label="Histogram of how many epochs ago samples were last trained on."),
            ),
        ]  # fmt: skip
    if now.histogram.any():
        low, high = score_range(np.array([now.quantiles[[1, -1]]]))
        label = f"Histogram of the scores now; half of them are below {number(float(now.quantiles[5]))}."
        figures.append(
            Figure(
                "Scores now",
                "The last recorded loss of each sample. Those beyond the ends are in the first and last bar.",
                bars(_SMALL, _by_score(found.scores, low, high), total=total, x_name="score", label=label),
            )
        )
    return figures


def _since(training: Training) -> str:
    return f", those from epoch {training.since} on" if training.since else ""


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
    names = [f"{number(a)} to {number(b)}" for a, b in pairwise(edges.tolist())]
    return Bars(edges, counts, names, log=True)


def trajectories(found: Snapshot, galleries: Sequence[Gallery], lines: dict[int, Floats]) -> list[Figure]:
    """The scores of the samples of each gallery by epoch, float64[E], before the bands of those of all samples."""
    bands = [(found.quantile(0.05), found.quantile(0.95)), (found.quantile(0.25), found.quantile(0.75))]
    shown = _scores_shown(found)

    def drawing(gallery: Gallery) -> Callable[[Size], Markup]:
        samples = [(index, lines[index]) for index in gallery.index.tolist()]
        label = f"Scores of {len(samples)} samples by epoch, those called {gallery.title.lower()}."
        return lambda size: fan(size, bands, found.quantile(0.5), samples, gallery.kind, shown, label)

    return [
        Figure.both(gallery.title, f"{gallery.index.size} samples", (_MIDDLE, _NARROW), drawing(gallery))
        for gallery in galleries
    ]


def points(found: Snapshot, galleries: Sequence[Gallery]) -> Figure | None:
    """Samples drawn at random (the same each time), and those of the galleries, by what is known of them."""
    some = np.random.default_rng(0).choice(found.scores.size, min(_CLOUD, found.scores.size), replace=False)
    kinds = {index: gallery for gallery in reversed(galleries) for index in gallery.index.tolist()}
    index = np.concatenate([np.sort(some), np.array(sorted(kinds), np.int64)])
    scores = found.scores[index].astype(np.float64)
    times = None
    if found.losses is not None:
        x, y = _moments(found.losses, index)
        title, names = "Mean and spread of the losses", ("mean of the losses", "standard deviation of the losses")
        note = "Each dot is a sample: the mean of its recorded losses, and their standard deviation."
    elif found.training is not None:
        # Spread by the golden ratio, or those that were trained on as often would hide each other.
        x = found.training.times[index] + _JITTER * ((index * 0.6180339887498949) % 1 - 0.5)
        y, times = scores, found.epoch - found.training.since
        title, names = "Score and training", ("times trained on", "score")
        note = "Each dot is a sample: how often it was trained on, and its score now."
    else:
        return None
    if not np.isfinite(y).any():
        return None
    cloud, shown = slice(some.size), slice(some.size, None)
    marks = [
        Mark(sample, x_at, y_at, kinds[sample].kind, _called(sample, kinds[sample], score))
        for sample, x_at, y_at, score in zip(*(one[shown].tolist() for one in (index, x, y, scores)), strict=True)
    ]
    x_range = _extent(x[cloud], x[shown]) if times is None else (-0.5, times + 0.5)
    y_range = _extent(y[cloud], y[shown])
    label = f"{title}: {len(marks)} samples of the galleries, as links, among others."
    all_of_them = some.size == found.scores.size
    drawn = (
        "All samples are here" if all_of_them else f"{some.size:,} of {found.scores.size:,} samples, drawn at random"
    )
    return Figure.both(
        title,
        f"{note} {drawn}. Those of the galleries have a sign, which leads to the sample; one "
        "of two galleries has that of the first.",
        (_WIDE, _NARROW),
        lambda size: scatter(
            size, (x[cloud], y[cloud]), marks, label=label, x_name=names[0], y_name=names[1], x=x_range, y=y_range,
            log=times is None,
        ),
    )  # fmt: skip


def _called(index: int, gallery: Gallery, score: float) -> str:
    return f"sample {index}, {gallery.title.lower()}, score {number(score)}"


def _moments(losses: Losses, index: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Mean and standard deviation of the recorded losses of samples; NaN for those with fewer than two."""
    found = losses.of(index)[losses.since :].astype(np.float64)
    seen = ~np.isnan(found)
    times = seen.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(seen, found, 0).sum(0) / times
        spread = np.sqrt(np.where(seen, (found - mean) ** 2, 0).sum(0) / times)
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
