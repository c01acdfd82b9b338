"""A page about a run: what its score store says of it, and the samples behind the scores. One HTML file."""

import base64
import datetime
import hashlib
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from infobatch_stream._files import whole_file
from infobatch_stream._formatting import DASH, duration, number, percent
from infobatch_stream.report.charts import Floats, Line, Spark
from infobatch_stream.report.dataset import open_shards_of
from infobatch_stream.report.figures import amounts, distribution, points, trainings, trajectories
from infobatch_stream.report.galleries import Gallery, choose
from infobatch_stream.report.previews import Preview, previews
from infobatch_stream.report.renderer import draw, draw_marker, draw_spark
from infobatch_stream.report.snapshot import Snapshot
from infobatch_stream.store.history import SHARES, Epoch

__all__ = ["build", "write"]

_SPARK: Final = (112, 26)  # pixels of the line on a card
_ROWS: Final = 400  # epochs in the table


def write(store: Path, out: Path, *, dataset: str | None = None, count: int = 32, cache: Path | None = None) -> int:
    """Write the report of ``store`` to the file ``out``, and return its bytes; see `build`."""
    with whole_file(out) as new:
        page = build(store, dataset=dataset, count=count, cache=cache)
        return new.write_bytes(page.encode("utf-8", "replace"))  # file names may be no UTF-8


def build(store: Path, *, dataset: str | None = None, count: int = 32, cache: Path | None = None) -> str:
    """The report of a score store, as HTML.

    Args:
        store: The folder of the store.
        dataset: The shards of its samples, to show some of them, as for `open_shards`.
        count: The most samples of a gallery.
        cache: Folder for shards that are elsewhere, as for `open_shards`.

    Returns:
        The page.

    Raises:
        StoreError: For a store that cannot be read, or is of other shards.
        ConfigError: For a ``dataset`` that is no shards.
        DataError: For shards that are damaged or out of reach.
        MissingExtraError: For a package that is not installed.
    """
    found = Snapshot.take(store)
    shards = open_shards_of(found.store, dataset, cache)
    galleries = choose(found.scores, found.epoch, found.training, found.losses, count)
    index = np.unique(np.concatenate([np.empty(0, np.int64), *(gallery.index for gallery in galleries)]))
    seen = {} if shards is None else previews(shards, index)
    lines = _lines(found, index)
    now = found.now()
    return _page(
        found=found,
        name=found.store.path.name,
        made=datetime.datetime.now(datetime.UTC),
        version=version("infobatch-stream"),
        facts=_facts(found, now),
        amounts=amounts(found),
        distribution=distribution(found),
        table=_table(found.epochs),
        trainings=trainings(found, now),
        trajectories=trajectories(found, galleries, lines) if lines else [],
        points=points(found, galleries),
        galleries=_shown(found, galleries, seen, lines),
        dataset=dataset,
    )


def _page(**content: object) -> str:
    """The template with ``content``, which is escaped; style and script are in the page, and nothing else can run."""
    pages = Environment(
        loader=PackageLoader("infobatch_stream.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assert pages.loader is not None
    inline = {name: pages.loader.get_source(pages, f"report.{name}")[0] for name in ("css", "js")}
    return pages.get_template("report.html.j2").render(
        content,
        draw=draw,
        draw_marker=draw_marker,
        draw_spark=lambda spark: draw_spark(spark, _SPARK),
        inline={name: Markup(text) for name, text in inline.items()},  # noqa: S704 - files of ours
        hashes={
            name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in inline.items()
        },
    )


def _facts(found: Snapshot, now: Epoch) -> list[tuple[str, str, str]]:
    """The numbers at the top of the page: name, value, a word on it."""
    trained, entries = (sum(getattr(one, name) for one in found.epochs) for name in ("trained", "entries"))
    took, whole = (float(np.nansum(one)) for one in found.seconds())
    never, size = found.never_seen, found.scores.size
    missing = found.epoch - len(found.epochs)
    facts = [
        ("Samples", f"{size:,}", f"{never:,} of them without a score" if never else "all have a score"),
        ("Epochs", f"{found.epoch:,}", f"what became of {missing:,} is not known" if missing else "all are known"),
    ]
    if seeded := found.store.seeded:
        facts.append(("Began with scores", f"{seeded.samples:,}", seeded.source))
    if entries:
        facts.append(("Samples saved so far", percent(found.saved), f"{trained:,} of {entries:,} were trained on"))
    if whole:
        note = f"estimated: {duration(took)} instead of {duration(whole)}"
        facts.append(("Time saved so far", percent(1 - took / whole), note))
    if never < size:
        median = number(float(now.quantiles[SHARES.index(0.5)]))
        facts.append(("Mean score", number(now.mean), f"half of the scores are below {median}"))
    return facts


def _table(known: list[Epoch]) -> list[list[str]]:
    """A row per epoch: number, kept, share, threshold, mean, quantiles, seconds."""
    shares = [SHARES.index(share) for share in (0.05, 0.5, 0.95)]
    return [
        [
            f"{one.number}",
            f"{one.kept:,}",
            percent(one.kept / one.entries) if one.entries else DASH,
            number(one.threshold),
            number(one.mean),
            *(number(float(one.quantiles[place])) for place in shares),
            duration(one.seconds) if math.isfinite(one.seconds) else DASH,
        ]
        for one in known[-_ROWS:]
    ]


def _lines(found: Snapshot, index: NDArray[np.int64]) -> dict[int, Floats]:
    """The scores of samples by epoch, float64[E], where the losses were kept; else nothing."""
    if found.losses is None or not index.size:
        return {}
    scores = np.full((found.epoch, index.size), np.nan)
    scores[: found.losses.epochs] = found.losses.of(index)
    for epoch in range(1, len(scores)):
        unseen = np.isnan(scores[epoch])
        scores[epoch, unseen] = scores[epoch - 1, unseen]
    return dict(zip(index.tolist(), scores.T, strict=True))


@dataclass(frozen=True)
class _Card:
    """A sample in a gallery. anchor: whether links to the sample lead here."""

    index: int
    anchor: bool
    score: str
    training: str
    preview: Preview | None
    spark: Spark | None


def _shown(
    found: Snapshot, galleries: list[Gallery], previews: dict[int, Preview], lines: dict[int, Floats]
) -> list[tuple[Gallery, list[tuple[str, list[_Card]]]]]:
    """The galleries with their cards by label ("" where none is known), the labels that occur most first."""
    anchored: set[int] = set()
    shown = []
    for gallery in galleries:
        groups: dict[str, list[_Card]] = {}
        low, high = _scale([lines[index] for index in gallery.index.tolist() if index in lines])
        for index in gallery.index.tolist():
            preview, spark = previews.get(index), None
            if index in lines:
                spark = Spark(f"Scores of sample {index} by epoch", Line.of_sample("", index, lines[index]), low, high)
            score = number(float(found.scores[index]))
            card = _Card(index, index not in anchored, score, _training(found, index), preview, spark)
            anchored.add(index)
            groups.setdefault(preview.label if preview else "", []).append(card)
        order = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
        shown.append((gallery, order))
    return shown


def _scale(lines: list[Floats]) -> tuple[float, float]:
    """From the lowest to the highest score above 0 in any of the lines, low < high."""
    known = np.concatenate([np.empty(0), *lines])
    known = known[np.isfinite(known) & (known > 0)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.1, 1.0)
    return (low, high) if low < high else (low / 2, high * 2)


def _training(found: Snapshot, index: int) -> str:
    if found.training is None:
        return ""
    times, last = int(found.training.times[index]), int(found.training.last[index])
    return f"trained {times:,} times, last in epoch {last}" if last >= 0 else "not trained on in the epochs counted"
