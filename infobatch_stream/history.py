"""What became of every epoch: kept here for people, beside the scores, as ordinary Zarr arrays.

    scores.zarr/history/
        entries, kept, trained   int64[E]       of the plan; -1 for an epoch that is not known
        threshold, mean          float64[E]     the plan's threshold; the mean of the scores when the epoch was over
        seconds                  float64[E]     from its first batch to its end, in the process that led it
        quantiles                float32[E, 11] of the scores when the epoch was over, at SHARES
        histogram                int64[E, 256]  of the same scores, between EDGES
        samples/0, samples/1     uint16[2, N]   how often a sample was trained on; one more than the epoch it last was
        recorded                 float32[E, N]  with history=True: the losses of each epoch, NaN for what was pruned

Nothing here is needed to train: a row that cannot be written is a warning, one that cannot be read is missing. Zarr
replaces a file when it writes, so each of them is whole, or not there.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Self, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from infobatch_stream.errors import StoreError
from infobatch_stream.summary import Summary

__all__ = [
    "EDGES", "SHARES", "Epoch", "History", "Training", "carry", "epochs", "explained", "reading", "replay", "scores_at",
    "training",
]  # fmt: skip

SHARES: Final = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
"""Shares of the samples, of whose scores `Epoch.quantiles` are."""

_BINS: Final = 256
_LOWEST: Final = (127 - 20) << 3  # 2^-20 by the upper 12 bits of a float32: sign, exponent, three bits of the fraction
_NEGATIVE: Final = 1 << 15
_INFINITE: Final = 0x7F80

EDGES: Final[NDArray[np.float32]] = (np.arange(_LOWEST, _LOWEST + _BINS + 1, dtype=np.uint32) << np.uint32(20)).view(
    np.float32
)
"""float32[257]: the edges of the bins of `Epoch.histogram`, 8 to a doubling, from 2^-20 to 2^12.

What lies beyond them is counted in the first and the last bin.
"""

_EPOCHS: Final = 64  # in a chunk of rows, which is written anew at each commit
_MOST: Final = 0xFFFF
_SAMPLES: Final = 1 << 20  # samples in a chunk
_QUICK: Final = BloscCodec(typesize=2, cname="lz4", shuffle="bitshuffle")  # half the time of Zarr's own choice
_GROUP: Final = "history"


@dataclass(frozen=True)
class Epoch:
    """An epoch that is over.

    entries: samples that it drew from; kept: of these; trained: in the steps that were made. threshold: of its plan,
    NaN without one. seconds: it took. mean, quantiles (float32[11], at SHARES, to 1 %), histogram (int64[256], between
    EDGES): of the scores that it left.
    """

    number: int
    entries: int
    kept: int
    trained: int
    threshold: float
    seconds: float
    mean: float = float("nan")
    quantiles: NDArray[np.float32] = field(default_factory=lambda: np.full(len(SHARES), np.nan, np.float32))
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))

    def describing(self, scores: NDArray[np.float32]) -> Self:
        """This epoch, with mean, quantiles and histogram of ``scores``, float32[N], which it left."""
        summary = Summary(scores)
        counts, _ = summary.tally()
        changes = {"mean": summary.mean, "quantiles": _quantiles(counts), "histogram": _histogram(counts)}
        return type(self)(**({one.name: getattr(self, one.name) for one in fields(self)} | changes))


def _ascending(counts: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scores from the lowest up, each in the middle of an upper half of bits, and how often they occur."""
    order = np.concatenate([np.arange(_NEGATIVE + _INFINITE - 1, _NEGATIVE - 1, -1), np.arange(_INFINITE)])
    values = (order.astype(np.uint32) << np.uint32(16) | np.uint32(0x8000)).view(np.float32)
    return values, counts[order]


def _quantiles(counts: NDArray[np.int64]) -> NDArray[np.float32]:
    values, counts = _ascending(counts)
    ends = np.cumsum(counts)
    if not ends[-1]:
        return np.full(len(SHARES), np.nan, np.float32)
    ranks = np.minimum(np.floor(np.array(SHARES) * ends[-1]), ends[-1] - 1)
    return cast(NDArray[np.float32], values[ends.searchsorted(ranks, "right")])


def _histogram(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    eighths = counts[:_INFINITE].reshape(-1, 16).sum(1)  # by their upper 12 bits
    bins = eighths[_LOWEST : _LOWEST + _BINS].copy()
    bins[0] += eighths[:_LOWEST].sum() + counts[_NEGATIVE : _NEGATIVE + _INFINITE].sum()
    bins[-1] += eighths[_LOWEST + _BINS :].sum()
    return cast(NDArray[np.int64], bins)


_ROWS: Final[dict[str, tuple[str, Any, tuple[int, ...]]]] = {
    "entries": ("<i8", -1, ()),
    "kept": ("<i8", -1, ()),
    "trained": ("<i8", -1, ()),
    "threshold": ("<f8", np.nan, ()),
    "seconds": ("<f8", np.nan, ()),
    "mean": ("<f8", np.nan, ()),
    "quantiles": ("<f4", np.nan, (len(SHARES),)),
    "histogram": ("<i8", 0, (_BINS,)),
}


class History:
    """Writes what becomes of ``epoch`` beside the scores at ``path``: `before` its commit, and `after` it.

    By one process of a node. recorded: keep the losses of every sample too. What cannot be written is a warning: the
    scores are worth more.
    """

    def __init__(self, path: Path, epoch: Epoch, *, recorded: bool) -> None:
        self._path = path / _GROUP
        self._epoch = epoch
        self._recorded = recorded

    def before(self, scores: NDArray[np.float32], pending: NDArray[np.float32]) -> None:
        """Count what was trained on. Both float32[N]: the scores of the plan, and the losses of the epoch."""
        self._attempt(lambda group: self._before(group, scores, pending))

    def after(self, scores: NDArray[np.float32]) -> None:
        """Write the row of the epoch, which left ``scores``, float32[N]."""
        self._attempt(lambda group: self._after(group, scores))

    def _attempt(self, work: Callable[[Any], None]) -> None:
        try:
            work(zarr.open_group(self._path, mode="a"))
        except Exception as error:  # zarr and its codecs have many
            warnings.warn(
                f"the history of epoch {self._epoch.number} could not be written to {self._path} "
                f"({type(error).__name__}: {error}); the scores are not concerned.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _before(self, group: Any, scores: NDArray[np.float32], pending: NDArray[np.float32]) -> None:
        epoch, size = self._epoch.number, pending.size
        old, new = (self._samples(group, half % 2, size) for half in (epoch + 1, epoch))
        known = old.attrs.get("through") == epoch
        new.attrs.update(through=-1)  # until it is whole: a commit that is broken off is repeated
        for block in _blocks(size):
            counts = np.asarray(old[:, block]) if known else np.zeros((2, block.stop - block.start), np.uint16)
            seen = ~np.isnan(pending[block])
            counts[0] += seen & (counts[0] < _MOST)
            np.copyto(counts[1], min(epoch + 1, _MOST), where=seen)
            new[:, block] = counts
        new.attrs.update(through=epoch + 1, since=old.attrs["since"] if known else epoch)
        if self._recorded:
            self._record(group, scores, pending)

    def _record(self, group: Any, scores: NDArray[np.float32], pending: NDArray[np.float32]) -> None:
        epoch, size = self._epoch.number, pending.size
        rows = self._rows(group, "recorded", "<f4", np.nan, (size,), (1, _SAMPLES))
        if rows.shape[0] < epoch:  # the epochs before it were not kept: what they left stands for them
            _grow(rows, epoch)
            rows.attrs.update(since=epoch)
            for block in _blocks(size):
                rows[epoch - 1, block] = scores[block]
        _grow(rows, epoch + 1)
        for block in _blocks(size):
            rows[epoch, block] = pending[block]

    def _after(self, group: Any, scores: NDArray[np.float32]) -> None:
        row = self._epoch.describing(scores)
        for name, (kind, fill, shape) in reversed(_ROWS.items()):  # entries last: with it the row is there
            rows = self._rows(group, name, kind, fill, shape, (_EPOCHS, *shape))
            _grow(rows, row.number + 1)
            rows[row.number] = getattr(row, name)

    @staticmethod
    def _samples(group: Any, half: int, size: int) -> Any:
        if (name := f"samples/{half}") in group:
            return group[name]
        chunks = (1, min(size, _SAMPLES))
        return group.create_array(name, shape=(2, size), chunks=chunks, dtype="<u2", fill_value=0, compressors=_QUICK)

    @staticmethod
    def _rows(group: Any, name: str, kind: str, fill: Any, shape: tuple[int, ...], chunks: tuple[int, ...]) -> Any:
        if name in group:
            return group[name]
        chunks = (chunks[0], *map(min, shape, chunks[1:]))
        return group.create_array(name, shape=(0, *shape), chunks=chunks, dtype=kind, fill_value=fill)


def _blocks(num_samples: int) -> Iterator[slice]:
    for start in range(0, num_samples, _SAMPLES):
        yield slice(start, min(start + _SAMPLES, num_samples))


def _grow(rows: Any, count: int) -> None:
    if rows.shape[0] < count:
        rows.resize((count, *rows.shape[1:]))


def epochs(path: Path) -> list[Epoch]:
    """The epochs of the store at ``path`` that are known, in order.

    Raises StoreError for a history that is there and cannot be read.
    """
    with reading(path) as group:
        if group is None or "entries" not in group:
            return []
        rows = {name: np.asarray(group[name][:]) for name in _ROWS}
        known = [number for number, entries in enumerate(rows["entries"].tolist()) if entries >= 0]
        return [Epoch(number, **{name: _plain(row[number]) for name, row in rows.items()}) for number in known]


@contextmanager
def reading(path: Path) -> Iterator[Any]:
    """The Zarr group of the history of the store at ``path``, None without one. As `explained`."""
    with explained(path):
        there = (path / _GROUP / "zarr.json").exists()
        yield zarr.open_group(path / _GROUP, mode="r") if there else None


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """A fault in reading the history of the store at ``path`` is a StoreError."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:  # zarr and its codecs have many
        raise StoreError(
            f"{path / _GROUP} cannot be read ({type(error).__name__}: {error}). Nothing but reports depends on it: "
            "remove that folder, and the history begins anew."
        ) from error


def _plain(value: Any) -> Any:
    return value.item() if np.ndim(value) == 0 else value


@dataclass(frozen=True)
class Training:
    """When samples were trained on. times: uint16[N], since epoch ``since``; last: int32[N], the epoch, -1 = never."""

    times: NDArray[np.uint16]
    last: NDArray[np.int32]
    since: int


def training(path: Path, epoch: int) -> Training | None:
    """When samples of the store at ``path``, which stands at ``epoch``, were trained on, if that is known.

    Raises StoreError for a history that is there and cannot be read.
    """
    with reading(path) as group:
        for half in ("0", "1"):
            if group is not None and f"samples/{half}" in group:
                samples = group[f"samples/{half}"]
                if samples.attrs.get("through") != epoch:
                    continue
                found = np.asarray(samples[:])
                if group[f"samples/{half}"].attrs.get("through") == epoch:  # still: a run may write to it
                    return Training(found[0], found[1].astype(np.int32) - 1, samples.attrs["since"])
    return None


def scores_at(path: Path, num_samples: int, epoch: int) -> NDArray[np.float32]:
    """float32[N]: the scores that the first ``epoch`` epochs left, NaN = never seen.

    Raises StoreError when the losses of one of them were not kept.
    """
    scores = np.full(num_samples, np.nan, np.float32)
    with reading(path) as group:
        recorded: Any = group["recorded"] if group is not None and "recorded" in group else None
        first, last = (1, 0) if recorded is None else (recorded.attrs.get("since", 0), recorded.shape[0])
        if not first <= epoch <= last:
            kept = f"those of {first} to {last} epochs" if first <= last else "none"
            raise StoreError(
                f"{path} does not have the scores that {epoch} epochs left, but {kept}; they are kept with "
                "InfoBatchLoader(history=True)."
            )
        for block in _blocks(num_samples):
            part = scores[block]
            for number in range(epoch - 1, max(first - 1, 0) - 1, -1):  # the newest first: most often few are needed
                unseen = np.isnan(part)
                if not unseen.any():
                    break
                part[unseen] = np.asarray(recorded[number, block])[unseen]
    return scores


def replay(path: Path, num_samples: int) -> Iterator[NDArray[np.float32]]:
    """The scores that each epoch left, from the first on, float32[N]; nothing where they were not all kept.

    One array, which changes in place.
    """
    with reading(path) as group:
        recorded: Any = group["recorded"] if group is not None and "recorded" in group else None
        if recorded is None or recorded.attrs.get("since", 0):
            return
        scores = np.full(num_samples, np.nan, np.float32)
        for number in range(recorded.shape[0]):
            for block in _blocks(num_samples):
                losses = np.asarray(recorded[number, block])
                np.copyto(scores[block], losses, where=~np.isnan(losses))
            yield scores


def carry(old: Path, new: Path, epoch: int) -> None:
    """Give the store at ``new`` the history of that at ``old``, of the epochs before ``epoch``.

    By hard links, which do no harm: Zarr replaces files. One that cannot be taken over is a warning, and left behind.
    """
    if not (old / _GROUP).is_dir():
        return
    try:
        shutil.copytree(old / _GROUP, new / _GROUP, copy_function=_link)
        group: Any = zarr.open_group(new / _GROUP, mode="a")
        for name in (*_ROWS, "recorded"):
            if name in group and group[name].shape[0] > epoch:
                group[name].resize((epoch, *group[name].shape[1:]))
    except Exception as error:  # zarr and its codecs have many
        shutil.rmtree(new / _GROUP, ignore_errors=True)
        warnings.warn(
            f"the history in {old / _GROUP} cannot be read ({type(error).__name__}: {error}), so it begins anew; the "
            "scores are not concerned.",
            RuntimeWarning,
            stacklevel=2,
        )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
