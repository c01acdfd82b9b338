"""The scores of a run as its loader has them: opened late, fed with losses, committed at the end of an epoch."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.distributed import Ranks
from infobatch_stream.initial_scores import InitialScores
from infobatch_stream.recorder import Recorder
from infobatch_stream.score_stats import share_known
from infobatch_stream.sources import Source
from infobatch_stream.store.bootstrap import Contents, Existing, check_same_data
from infobatch_stream.store.history import Epoch
from infobatch_stream.store.replicated import ReplicatedStore
from infobatch_stream.store.score_store import ScoreStore

__all__ = ["RunStore"]


class RunStore:
    """The store at ``path`` of the scores of ``source``. Methods marked "Collective" are called by all ranks.

    Args:
        path: Where it is, or will be.
        source: Whose samples the scores are of.
        existing: What to do with a store that holds epochs.
        history: Whether the losses of every epoch are kept.
        initial: What the scores are before the first epoch; None: what the store has.

    Attributes:
        recorder: Takes the losses of this rank.
    """

    def __init__(
        self, path: Path, source: Source, existing: Existing, history: bool, initial: InitialScores | None = None
    ) -> None:
        self.path, self.existing = path, existing
        self.recorder = Recorder()
        self._source, self._history, self._initial = source, history, initial
        self._replicated: ReplicatedStore | None = None

    @property
    def store(self) -> ScoreStore | None:
        """That of this node; None before it is open."""
        return None if self._replicated is None else self._replicated.store

    @property
    def scores(self) -> NDArray[np.float32]:
        """float32[N]: as they are known to this process; before the store is open, those to begin with."""
        if self.store is not None:
            return self.store.scores
        unseen = np.broadcast_to(np.float32(np.nan), self._source.num_samples)
        return unseen if self._initial is None else self._initial.values

    def seeded(self, epoch: int, scores: NDArray[np.float32], include: NDArray[np.bool_] | None) -> float:
        """Share of the samples that had a score before the first epoch, of a run that stands at ``epoch``.

        scores: float32[N], those of now; include: bool[N], the samples that count, or None.
        """
        if epoch == 0:
            return share_known(scores, include)
        store = self.store
        return 0.0 if store is None or store.seeded is None else store.seeded.samples / store.num_samples

    def check_dataset(self) -> None:
        """Raise StoreError where a store of another dataset stands, if it would be gone on with."""
        if self.existing != "overwrite" and self.path.exists():
            check_same_data(self.path, self._source.num_samples, self._source.fingerprint)

    def check_scores(self) -> None:
        """Raise StoreError if the scores are no longer those that a plan reads as it goes."""
        if self.store is not None:
            self.store.check_scores()

    def open(self, ranks: Ranks, contents: Contents | None, **settings: Any) -> bool:
        """Have it open on all ranks, with ``contents`` if given; whether it was not before. Collective then.

        Raises OutOfStepError where the ranks differ in ``settings``.
        """
        if self._replicated is not None and contents is None:
            return False
        initial = self._initial if contents is None else None
        ranks.agree("open", **settings, existing=self.existing, initial_scores=initial and initial.digest)
        if initial:
            mine = initial.values if ranks.process == 0 else None
            contents = Contents(mine, None, 0, initial.seeded, begins=True)
        self.iterated_by(None)  # what is loaded now ends this loader's own epoch
        source = self._source
        self._replicated = ReplicatedStore.open(
            ranks, self.path, source.num_samples, source.fingerprint, self.existing, contents
        )
        self._initial = None  # it is used once
        self.recorder.attach(self._replicated.store)
        return True

    def settle(self) -> None:
        """Have all losses of this rank in the store. Raises StoreError if it was changed from outside."""
        self.recorder.flush()
        self._opened.check()

    def iterated_by(self, iterator: object) -> None:
        """No other loader of this process may take the store as long as this iterator is in use; None: it may."""
        if self._replicated is not None:
            self._replicated.iterated_by(iterator)

    def commit(self, row: Epoch) -> None:
        """Make what was recorded the scores of the next epoch. Collective. row: what became of this one."""
        self._opened.commit(row, recorded=self._history)
        self.iterated_by(None)

    def merge(self) -> ScoreStore:
        """The store, with what all nodes recorded. Collective."""
        self._opened.merge()
        return self._opened.store

    def save_what_can_be(self) -> None:
        """Bring this rank's losses to the disk, as far as that still goes: another error is passing."""
        if self._replicated is not None:
            with suppress(Exception):  # after a fault of the device nothing more comes from it
                self.recorder.flush()
            with suppress(Exception):
                self._replicated.store.flush()

    @property
    def _opened(self) -> ReplicatedStore:
        assert self._replicated is not None
        return self._replicated
