"""The score store: what every sample's loss was, on disk, memory-mapped, shared by the ranks of a node.

A Zarr v3 group with two float32 arrays of N. ``scores`` holds the committed scores and is never written during an
epoch, so a plan can be made again from it at any time; ``pending`` takes this epoch's losses, NaN = not seen.
docs/format.md describes the files, and the steps of a commit: a process killed anywhere leaves epoch e or e + 1, and
opening the store finishes what was begun.
"""

import os
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infobatch_stream._validation import check_choice, whole_number
from infobatch_stream.errors import ConfigError, StoreError
from infobatch_stream.store import layout
from infobatch_stream.store.header import Header, read_header, remove_leftovers, write_header
from infobatch_stream.store.history import History
from infobatch_stream.store.location import location
from infobatch_stream.store.mapped_array import MappedArray, finished, read_only
from infobatch_stream.store.recorded_losses import scores_at
from infobatch_stream.store.seed import make_seeded
from infobatch_stream.store.staging import StagedStore, put_back

__all__ = ["ScoreStore"]


class ScoreStore:
    """The scores of N samples. Made by `create` or `open`; several processes may have it open at once.

    Attributes:
        path: Path of the group.
        num_samples: N.
        fingerprint: Of the dataset whose scores these are.
        epoch: How many epochs were committed; refreshed by `commit` and `refresh`.
        seeded: What its scores were before the first epoch (``samples``, ``source``); None: there were none.
    """

    def __init__(self, path: Path, header: Header, mode: Literal["r", "r+"]) -> None:
        """Map the arrays of a validated store; use `open`."""
        self.path = path
        self.num_samples, self.fingerprint = header.num_samples, header.fingerprint
        self.epoch, self.seeded = header.epoch, header.seeded
        self._mode, self._retired = mode, False
        self._scores = MappedArray(path, "scores", self.num_samples, "r")  # only a commit maps it to write
        self._pending = MappedArray(path, "pending", self.num_samples, mode)
        self._finished: list[NDArray[np.float32]] = []  # scores and pending, of a commit that was cut off

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        num_samples: int,
        fingerprint: str = "",
        *,
        scores: ArrayLike | None = None,
        pending: ArrayLike | None = None,
        epoch: int = 0,
        replace: bool = False,
    ) -> Self:
        """Make a store and open it. It appears whole, or not at all.

        Every byte is written here, so a run cannot hit a full disk later.

        Args:
            path: Of the folder to be made.
            num_samples: N, at least 1.
            fingerprint: Of the dataset; a run with another one is refused.
            scores: float32[N] to begin with instead of NaN.
            pending: float32[N], losses of the epoch that is going on, likewise.
            epoch: How many epochs the scores are of.
            replace: Put it in the place of an existing store (of nothing else).

        Raises:
            StoreError: When the path is taken, cannot be written, or the disk is full.
            ConfigError: For impossible arguments.
        """
        header = Header(
            whole_number("num_samples", num_samples, 1), fingerprint, whole_number("epoch", epoch, 0), "ready"
        )
        if not isinstance(fingerprint, str):
            raise ConfigError(f"fingerprint={fingerprint!r}: it must be a text.")
        path = location(path)
        StagedStore(path, header, scores=scores, pending=pending, replace=replace).place()
        return cls.open(path)

    @classmethod
    def seed(
        cls,
        path: str | os.PathLike[str],
        scores: "ArrayLike | ScoreStore",
        fingerprint: str | None = None,
        *,
        source: str | None = None,
        replace: bool = False,
    ) -> Self:
        """Make a store that begins with scores, and open it: a run with it prunes its first epoch too.

        Args:
            path: Of the folder to be made.
            scores: A store of the same dataset, or float[N], finite; NaN for samples that are not known.
            fingerprint: Of the dataset; of a store it is known.
            source: Of what the scores are, in words, for `seeded`.
            replace: Put it in the place of an existing store that no run uses.

        Raises ConfigError for scores that cannot be such, else StoreError as `create` does.
        """
        return cls.open(make_seeded(location(path), scores, fingerprint, source, replace))

    @classmethod
    def open(cls, path: str | os.PathLike[str], mode: Literal["r", "r+"] = "r+") -> Self:
        """Open an existing store after checking its metadata, sizes and shard indexes.

        Args:
            path: Of its folder.
            mode: "r+" to record and commit; it first finishes a commit that a killed process left. "r" changes
                nothing on disk, and shows a commit that was cut off as finished (one that begins later may show
                through).

        Raises:
            StoreError: For a path that is missing, foreign, truncated, extended or of a newer format.
        """
        check_choice("mode", mode, ("r", "r+"))
        path = location(path)
        if mode == "r+":
            put_back(path)
            with layout.exclusive(path):
                remove_leftovers(path)
                header = layout.checked_header(path)
                if header.state != "ready":
                    cls(path, header, mode)._finish_or_tell(header)
        header = layout.checked_header(path)
        store = cls(path, header, mode)
        if header.state != "ready":  # only in mode "r"
            store.epoch, *store._finished = finished(header, store._scores.values, store._pending.values)
        return store

    @property
    def scores(self) -> NDArray[np.float32]:
        """float32[N], read-only view of the committed scores; NaN = never seen. Changes at a commit only."""
        return read_only(self._finished[0]) if self._finished else self._scores.view()

    def at(self, epoch: int) -> NDArray[np.float32]:
        """float32[N]: the scores that the first ``epoch`` epochs left; NaN = never seen.

        Raises StoreError for epochs of which they were not kept (InfoBatchLoader(history=True) does).
        """
        epoch = whole_number("epoch", epoch, 0)
        return np.array(self.scores) if epoch == self.epoch else scores_at(self.path, self.num_samples, epoch)

    @property
    def pending(self) -> NDArray[np.float32]:
        """float32[N], read-only view of what this epoch recorded so far; NaN = not seen in it."""
        return read_only(self._finished[1]) if self._finished else self._pending.view()

    def record(self, index: NDArray[np.int64], loss: ArrayLike) -> int:
        """Note losses as this epoch's scores.

        Any number of processes may record at once: other samples are never touched.

        Args:
            index: int64[k], the samples; of one that occurs twice the last loss counts.
            loss: float[k].

        Returns:
            How many losses were not recorded, since they are not finite in float32.

        Raises:
            ConfigError: For other shapes or types, and samples that there are not.
            StoreError: When the store may not be written to, or its files were replaced.
        """
        self._check_writable()
        return self._pending.put(np.asarray(index), np.asarray(loss))

    def commit(self, epoch: int | None = None, *, history: History | None = None) -> None:
        """Make what was recorded the scores of the next epoch; ``epoch`` grows by one.

        To be called by one process, when no other records or reads; the others `refresh` afterwards.

        Args:
            epoch: The one to commit, if that may have been done before: then nothing happens.
            history: Takes a row of the epoch.

        Raises:
            StoreError: When the store is not at its epoch any more, or its files were replaced or cut by another
                program since they were mapped.
        """
        self._check_writable()
        with layout.exclusive(self.path):
            header = read_header(self.path)
            if epoch is not None:
                if (header.state, header.epoch) == ("ready", epoch + 1):
                    return
                self.epoch = epoch
            # A commit of ours that failed, on a full disk say, is gone on with.
            begun = (header.state, header.epoch) in (("apply", self.epoch), ("reset", self.epoch + 1))
            if not begun and (header.state, header.epoch) != ("ready", self.epoch):
                raise self._elsewhere(header)
            self._check_mapped()
            if history and not begun:
                history.before(self.scores, self.pending)
            self._finish_or_tell(header if begun else header.replace(state="apply"), begun=begun)
        if history:
            history.after(self.scores)

    def _finish_or_tell(self, header: Header, *, begun: bool = True) -> None:
        """Do what is left of a commit from ``header`` on, which is to be written first unless it is ``begun``."""
        try:
            if not begun:
                self.flush()
                write_header(self.path, header)
            self._finish(header)
        except OSError as error:
            raise StoreError(
                f"{self.path} could not be committed ({error.strerror}). Nothing is lost: mend that, then commit "
                "again or open the store anew."
            ) from error

    def _finish(self, header: Header) -> None:
        """Do what is left of a commit. Repeating it changes nothing."""
        if header.state == "apply":
            MappedArray(self.path, "scores", self.num_samples, "r+").take_seen(self._pending.values)
            header = header.replace(state="reset", epoch=header.epoch + 1)
            write_header(self.path, header)
        if header.state == "reset":
            self._pending.clear()
            header = header.replace(state="ready")
            write_header(self.path, header)
        self.epoch = header.epoch

    def put_pending(self, start: int, losses: NDArray[np.float32]) -> None:
        """Replace what was recorded of the samples from ``start`` on by ``losses`` (float32[k]), NaN = not seen."""
        self._check_writable()
        self._pending.values[start : start + len(losses)] = losses

    def discard_pending(self) -> None:
        """Forget what was recorded since the last commit."""
        self._check_writable()
        self._pending.clear()

    def flush(self) -> None:
        """Bring what was recorded to the disk, for a machine that may go down. One process does it for all."""
        self._pending.values.flush()

    def check(self) -> None:
        """Raise StoreError unless the files are those that were mapped, and at this epoch, and may be written to."""
        self._check_writable()
        self._check_mapped()
        header = read_header(self.path)
        if header.epoch != self.epoch:
            raise self._elsewhere(header)

    def check_scores(self) -> None:
        """Raise StoreError unless `scores` shows the file that is in the store: for who reads it bit by bit."""
        self._scores.check()

    def refresh(self) -> None:
        """Take note of a commit that another process made."""
        self._check_mapped()
        self.epoch = read_header(self.path).epoch

    @property
    def token(self) -> int:
        """The 32 bits of the first pending score: what one process sets here, all that share the file see."""
        return int(self._pending.values[:1].view(np.uint32)[0])

    @token.setter
    def token(self, bits: int) -> None:
        self._pending.values[:1].view(np.uint32)[0] = bits

    def retire(self) -> None:
        """Record and commit nothing from now on: another loader of this process has taken the store over."""
        self._retired = True

    def _check_writable(self) -> None:
        if self._retired:
            raise StoreError(
                f"another loader of this process has begun to train with {self.path}, so this one is out of use. Go on "
                "with the newer one, or give each a store of its own."
            )
        if self._mode == "r":
            raise StoreError(f"{self.path} was opened for reading; open it with mode='r+' to record or commit.")

    def _elsewhere(self, header: Header) -> StoreError:
        return StoreError(
            f"{self.path} stands at epoch {header.epoch} ({header.state}), not at epoch {self.epoch} (ready) as this "
            "process left it: another run uses the same store. Give each its own."
        )

    def _check_mapped(self) -> None:
        self._scores.check()
        self._pending.check()

    def __repr__(self) -> str:
        """Path, number of samples and epoch."""
        return f"ScoreStore({str(self.path)!r}, num_samples={self.num_samples}, epoch={self.epoch})"
