"""What became of every epoch: kept here for people, beside the scores, as ordinary Zarr arrays.

    scores.zarr/history/
        entries, kept, trained   int64[E]       of the plan; -1 for an epoch that is not known
        threshold, mean          float64[E]     the plan's threshold; the mean of the scores when the epoch was over
        seconds                  float64[E]     from its first batch to its end, in the process that led it
        quantiles                float32[E, 11] of the scores when the epoch was over, at SHARES
        histogram                int64[E, 256]  of the same scores, between EDGES
        samples/0, samples/1     uint16[2, N]   how often a sample was trained on; one more than the epoch it last was
        recorded                 float32[E, N]  with history=True: the losses of each epoch, NaN for what was pruned
        initial                  float32[1, N]  with history=True: the scores before the first epoch, if there were any

Nothing here is needed to train: a row that cannot be written is a warning, one that cannot be read is missing. A file
is replaced and not written to, so each of them is whole, or not there.
"""

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import StoreError
from infobatch_stream.store.epoch_record import BINS, EDGES, SHARES, Epoch
from infobatch_stream.store.header import read_header
from infobatch_stream.store.history_array import GROUP, ArraySpec, HistoryArray, has_group, make_group

__all__ = [
    "EDGES", "SHARES", "Epoch", "History", "Training", "blocks", "carry", "epochs", "initial_form", "mend", "reading",
    "recorded_form", "step", "training",
]  # fmt: skip

_EPOCHS: Final = 64  # in a chunk of rows, which is written anew at each commit
_MOST: Final = 0xFFFF
_SAMPLES: Final = 1 << 20  # samples in a chunk


def _row(dtype: str, fill: float, *size: int) -> ArraySpec:
    return ArraySpec(dtype, fill, (_EPOCHS, *size), size)


_PLANNED: Final = {
    "kept": _row("<i8", -1),
    "trained": _row("<i8", -1),
    "threshold": _row("<f8", np.nan),
    "seconds": _row("<f8", np.nan),
    "entries": _row("<i8", -1),  # the last that is written: with it the row is there
}
_LEFT: Final = {
    "quantiles": _row("<f4", np.nan, len(SHARES)),
    "histogram": _row("<i8", 0, BINS),
    "mean": _row("<f8", np.nan),  # the last
}
_ROWS: Final = _PLANNED | _LEFT


def _samples(num_samples: int) -> ArraySpec:
    return ArraySpec("<u2", 0, (1, min(num_samples, _SAMPLES)), (num_samples,), rows=2, quick=True)


def recorded_form(num_samples: int) -> ArraySpec:
    """Of the losses of every epoch."""
    return ArraySpec("<f4", np.nan, (1, min(num_samples, _SAMPLES)), (num_samples,))


def initial_form(num_samples: int) -> ArraySpec:
    """Of the scores before the first epoch."""
    return replace(recorded_form(num_samples), rows=1)


class History:
    """Writes what becomes of ``epoch`` beside the scores at ``path``: `before` its commit, and `after` it.

    By one process of a node. recorded: keep the losses of every sample too. What cannot be written is a warning: the
    scores are worth more.
    """

    def __init__(self, path: Path, epoch: Epoch, *, recorded: bool) -> None:
        self._path = path
        self._epoch = epoch
        self._recorded = recorded

    def before(self, scores: NDArray[np.float32], pending: NDArray[np.float32]) -> None:
        """Write the plan of the epoch, and count what was trained on.

        Both float32[N]: the scores of the plan, and the losses of the epoch.
        """
        self._attempt(lambda: self._before(scores, pending))

    def after(self, scores: NDArray[np.float32]) -> None:
        """Describe the scores that the epoch left, float32[N]. `mend` does it where a process did not come so far."""
        self._attempt(lambda: _put_row(self._path, self._epoch.describing(scores), _LEFT))

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            make_group(self._path)
            work()
        except Exception as error:  # codecs have many
            warnings.warn(
                f"the history of epoch {self._epoch.number} could not be written to {self._path / GROUP} "
                f"({type(error).__name__}: {error}); the scores are not concerned. To begin the history anew, remove "
                "that folder.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _before(self, scores: NDArray[np.float32], pending: NDArray[np.float32]) -> None:
        epoch, form = self._epoch.number, _samples(pending.size)
        old, new = (HistoryArray.make(self._path, f"samples/{half % 2}", form) for half in (epoch + 1, epoch))
        known = old.attributes.get("through") == epoch
        new.update(through=-1)  # until it is whole: a commit that is broken off is repeated
        for number, block in enumerate(blocks(pending.size)):
            seen = np.isfinite(pending[block])
            times, last = (old.read(row, number)[0] if known else np.zeros(form.chunk[1], "<u2") for row in (0, 1))
            times[: seen.size] += seen & (times[: seen.size] < _MOST)
            np.copyto(last[: seen.size], min(epoch + 1, _MOST), where=seen)
            for row, values in enumerate((times, last)):
                new.write(values[None], row, number)
        new.update(through=epoch + 1, since=old.attributes.get("since", epoch) if known else epoch)
        if self._recorded:
            self._record(scores, pending)
        _put_row(self._path, self._epoch, _PLANNED)

    def _record(self, scores: NDArray[np.float32], pending: NDArray[np.float32]) -> None:
        epoch = self._epoch.number
        rows = HistoryArray.make(self._path, "recorded", recorded_form(pending.size))
        if rows.rows < epoch:  # the epochs before it were not kept: what they left stands for them
            rows.update(rows=epoch, since=epoch)
            for number, block in enumerate(blocks(pending.size)):
                rows.write(scores[block][None], epoch - 1, number)
        rows.update(rows=max(rows.rows, epoch + 1))
        if epoch == 0 and np.isfinite(scores).any():
            initial = HistoryArray.make(self._path, "initial", initial_form(scores.size))
            for number, block in enumerate(blocks(scores.size)):
                initial.write(scores[block][None], 0, number)
        for number, block in enumerate(blocks(pending.size)):
            rows.write(pending[block][None], epoch, number)


def _put_row(path: Path, epoch: Epoch, forms: dict[str, ArraySpec]) -> None:
    chunk, place = divmod(epoch.number, _EPOCHS)
    for name, form in forms.items():
        rows = HistoryArray.make(path, name, form)
        where = (chunk, *(0 for _ in form.size))
        values = rows.read(*where)
        values[place] = getattr(epoch, name)
        rows.write(values, *where)
        rows.update(rows=max(rows.rows, epoch.number + 1))


def step() -> int:
    """How many samples are in a chunk."""
    return _SAMPLES


def blocks(num_samples: int) -> Iterator[slice]:
    """The samples of each chunk."""
    for start in range(0, num_samples, _SAMPLES):
        yield slice(start, min(start + _SAMPLES, num_samples))


def epochs(path: Path) -> list[Epoch]:
    """The epochs of the store at ``path`` that are known, in order.

    Raises StoreError for a history that is there and cannot be read.
    """
    header = read_header(path)
    over = header.epoch + (header.state == "apply")  # what comes later may be half written
    with reading(path):
        return [one for chunk in _chunks_of_rows(path) for one in _epochs_in(path, chunk) if one.number < over]


def _chunks_of_rows(path: Path) -> list[int]:
    entries = HistoryArray.open(path, "entries", _ROWS["entries"]) if has_group(path) else None
    return [] if entries is None else [chunk for (chunk,) in entries.places()]


def _epochs_in(path: Path, chunk: int) -> Iterator[Epoch]:
    rows = {name: _chunk(path, name, form, chunk) for name, form in _ROWS.items()}
    for place in np.flatnonzero(rows["entries"] >= 0).tolist():
        yield Epoch(chunk * _EPOCHS + place, **{name: _plain(row[place]) for name, row in rows.items()})


def _chunk(path: Path, name: str, form: ArraySpec, chunk: int) -> NDArray[Any]:
    found = HistoryArray.open(path, name, form)
    return np.full(form.chunk, form.fill, form.dtype) if found is None else found.read(chunk, *(0 for _ in form.size))


def _plain(value: Any) -> Any:
    return value.item() if np.ndim(value) == 0 else value


def mend(path: Path, epoch: int, scores: NDArray[np.float32]) -> None:
    """Describe the scores, float32[N], that ``epoch`` epochs left, if a process was killed before it came to that."""
    with suppress(StoreError), reading(path):  # who writes to it next hears of what is wrong
        chunk = (epoch - 1) // _EPOCHS
        if epoch and has_group(path):
            for row in _epochs_in(path, chunk):
                if row.number == epoch - 1 and np.isnan(row.mean):  # which is written last
                    _put_row(path, row.describing(scores), _LEFT)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """A fault in reading the history of the store at ``path`` is a StoreError."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:  # codecs have many
        raise StoreError(
            f"{path / GROUP} cannot be read ({type(error).__name__}: {error}). Nothing but reports depends on it: "
            "remove that folder, and the history begins anew."
        ) from error


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
    num_samples = read_header(path).num_samples
    with reading(path):
        for name in ("samples/0", "samples/1") if has_group(path) else ():
            half = HistoryArray.open(path, name, _samples(num_samples))
            if half is None or half.attributes.get("through") != epoch:
                continue
            found = np.empty((2, num_samples), np.uint16)
            for number, block in enumerate(blocks(num_samples)):
                for row in (0, 1):
                    found[row, block] = half.read(row, number)[0, : block.stop - block.start]
            again = HistoryArray.open(path, name, _samples(num_samples))
            if again is not None and again.attributes.get("through") == epoch:  # still: a run may write to it
                return Training(found[0], found[1].astype(np.int32) - 1, half.attributes.get("since", 0))
    return None


def carry(old: Path, new: Path, num_samples: int, epoch: int) -> None:
    """Give the store at ``new`` the history of that at ``old``, both of N samples, of the epochs before ``epoch``.

    What cannot be taken over is a warning, and left behind.
    """
    forms = _ROWS | {"recorded": recorded_form(num_samples)}
    forms |= {"initial": initial_form(num_samples)} if epoch else {}  # else it is of scores that are replaced
    forms |= {f"samples/{half}": _samples(num_samples) for half in (0, 1)}
    try:
        if not has_group(old):
            return
        make_group(new)
        for name, form in forms.items():
            found = HistoryArray.open(old, name, form)
            if found is None or (name == "recorded" and epoch < found.attributes.get("since", 0)):
                continue  # all that it has comes later
            found.carry(new, epoch)
    except Exception as error:  # codecs have many
        shutil.rmtree(new / GROUP, ignore_errors=True)
        warnings.warn(
            f"the history in {old / GROUP} cannot be read ({type(error).__name__}: {error}), so it begins anew; the "
            "scores are not concerned.",
            RuntimeWarning,
            stacklevel=2,
        )
