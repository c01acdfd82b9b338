"""What a score store holds, and what pruning has done so far: the page of ``infobatch-stream inspect``."""

import math
from dataclasses import asdict
from typing import Any, Final

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from infobatch_stream._formatting import visible, without_specks
from infobatch_stream.report.snapshot import Snapshot
from infobatch_stream.store.history import EDGES, SHARES, Epoch

__all__ = ["facts", "page"]

_BARS: Final = " ▁▂▃▄▅▆▇█"
_WIDTH: Final = 64  # characters of a histogram
_EPOCHS: Final = 12  # that are listed
_WHEN: Final = (
    "kept, threshold: by the scores before the epoch. mean, median, 95 %: of the scores that it left, while "
    "loader.stats['mean_score'] is of those before it: the mean one row above."
)
_OLD: Final = 5  # ages that are listed


def facts(found: Snapshot) -> dict[str, Any]:
    """All that `page` shows, and the histogram, as plain values; NaN is None."""
    now = _plain(found.now())
    return {
        "path": str(found.store.path),
        "num_samples": found.store.num_samples,
        "fingerprint": found.store.fingerprint,
        "epoch": found.epoch,
        "in_use_by": found.user or None,
        "seeded": found.store.seeded and asdict(found.store.seeded),
        "never_seen": found.never_seen,
        "recorded_in_this_epoch": _recorded(found),
        "saved": _number(found.saved),
        "scores": {name: now[name] for name in ("mean", "quantiles", "histogram")},
        "histogram_edges": EDGES.tolist(),
        "last_trained": _ages(found),
        "epochs": [_plain(one) for one in found.epochs],
    }


def _recorded(found: Snapshot) -> int:
    """Losses since the last commit."""
    return int(np.count_nonzero(~np.isnan(found.store.pending)))


def _seeded(found: Snapshot) -> str:
    seeded = found.store.seeded
    return f"scores of {seeded.samples:,} samples: {seeded.source}" if seeded else ""


def _ages(found: Snapshot) -> dict[int, int] | None:
    """How many samples were trained on in each epoch last; None where that was not counted."""
    if found.training is None:
        return None
    counts = np.bincount(found.training.last + 1)[1:]
    return {epoch: count for epoch, count in enumerate(counts.tolist()) if count}


def _plain(epoch: Epoch) -> dict[str, Any]:
    return {
        "epoch": epoch.number,
        "entries": epoch.entries,
        "kept": epoch.kept,
        "pruned": epoch.entries - epoch.kept,
        "trained": epoch.trained,
        "threshold": _number(epoch.threshold),
        "seconds": _number(epoch.seconds),
        "mean": _number(epoch.mean),
        "quantiles": {f"{share:g}": _number(value) for share, value in zip(SHARES, epoch.quantiles, strict=True)},
        "histogram": epoch.histogram.tolist(),
    }


def _number(value: float) -> float | None:
    return without_specks(float(value)) if math.isfinite(value) else None


# On a terminal ---------------------------------------------------------------------------------------------------


def page(found: Snapshot) -> RenderableType:
    """A readable page."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    total, unseen, recorded = found.store.num_samples, found.never_seen, _recorded(found)
    ages = _ages(found)
    oldest = (f"{count:,} of epoch {epoch}" for epoch, count in list((ages or {}).items())[:_OLD])
    rows = {
        "dataset": f"{total:,} samples  [{found.store.fingerprint}]",
        "epochs": f"{found.epoch} committed" + (f", {recorded:,} losses recorded since" if recorded else ""),
        **({"began with": _seeded(found)} if found.store.seeded else {}),
        "in use": found.user or "no",
        "saved so far": "not known" if math.isnan(found.saved) else f"{found.saved:.1%} of the samples",
        "never seen": f"{unseen:,} ({unseen / total:.1%})" if unseen else "none",
        "oldest scores": "not known" if ages is None else ", ".join(oldest) or "none",
    }
    for name, value in rows.items():
        grid.add_row(name, Text(visible(value)))
    parts: list[RenderableType] = [Text(visible(str(found.store.path)), style="bold"), grid]
    if unseen < total:
        parts += [Text(), _distribution(found.now())]
    if found.epochs:
        parts += [Text(), _table(found.epochs), Text(_WHEN, style="dim")]
    return Group(*parts)


def _distribution(scores: Epoch) -> RenderableType:
    """A histogram, of the bins that have scores, and the quantiles."""
    filled = np.flatnonzero(scores.histogram)
    first, last = int(filled[0]), int(filled[-1]) + 1
    step = max(1, -(-(last - first) // _WIDTH))
    counts = np.add.reduceat(scores.histogram[first:last], np.arange(0, last - first, step))
    heights = np.ceil(counts / counts.max() * (len(_BARS) - 1)).astype(int)
    bars = "".join(_BARS[height] for height in heights)
    low, high = f"{EDGES[first]:.3g}", f"{EDGES[last]:.3g}"
    shown = {share: value for share, value in zip(SHARES, scores.quantiles, strict=True) if share in (0.05, 0.5, 0.95)}
    quantiles = ", ".join(f"{100 * share:g} % below {without_specks(value):.3g}" for share, value in shown.items())
    return Group(
        Text(f"scores: mean {without_specks(scores.mean):.4g}; {quantiles}"),
        Text(f"{bars}", style="cyan"),
        Text(low + high.rjust(max(1, len(bars) - len(low))) + "   (logarithmic)", style="dim"),
    )


def _table(known: list[Epoch]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("epoch", "kept", "share", "threshold", "mean", "median", "95 %", "seconds"):
        table.add_column(name, justify="right")
    for one in known[-_EPOCHS:]:
        median, high = (one.quantiles[SHARES.index(share)] for share in (0.5, 0.95))
        numbers = (one.threshold, one.mean, float(median), float(high))
        values = (f"{without_specks(value):.4g}" if math.isfinite(value) else "" for value in numbers)
        seconds = f"{one.seconds:,.1f}" if math.isfinite(one.seconds) else ""
        table.add_row(f"{one.number}", f"{one.kept:,}", f"{one.kept / one.entries:.1%}", *values, seconds)
    return table
