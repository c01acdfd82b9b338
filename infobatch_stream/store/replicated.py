"""The store of a run: one file on every node, mapped by the node's ranks and committed by all together.

Ranks that see the same folder are a group and have one store; tokens prove that their maps of it are the same
memory. Groups learn of each other's losses in a merge, with which every commit begins:

    ranks 0, 1 -- scores.zarr of node A --.   merge: what was recorded becomes equal in all, since
    ranks 2, 3 -- scores.zarr of node B --'   what one has seen it sends to the others; then each commits its own
"""

import secrets
from pathlib import Path
from typing import Self

from infobatch_stream.distributed import Groups, Ranks
from infobatch_stream.errors import ConfigError, StoreError
from infobatch_stream.store.bootstrap import BLOCK, Bootstrap, Contents, Existing, neighbours
from infobatch_stream.store.header import read_header
from infobatch_stream.store.history import Epoch, History
from infobatch_stream.store.run_lock import RunLock
from infobatch_stream.store.score_store import ScoreStore

__all__ = ["ReplicatedStore"]

_COMMIT = "the commit of the scores"
_QUIET_NAN = 0x7FC00000  # a token is carried by a NaN, so one that is left behind means "not seen"


class ReplicatedStore:
    """This process's part in the store of a run. Attributes: store: that of this node."""

    def __init__(self, ranks: Ranks, groups: Groups, store: ScoreStore, run_lock: RunLock) -> None:
        """Use `open`."""
        self._ranks, self._groups, self._run_lock = ranks, groups, run_lock
        self.store = store
        run_lock.used_by(store.retire)
        self._committing: int | None = None  # the epoch of a commit that is going on, or failed

    @classmethod
    def open(
        cls,
        ranks: Ranks,
        path: Path,
        num_samples: int,
        fingerprint: str,
        existing: Existing,
        contents: Contents | None = None,
    ) -> Self:
        """Make or open the store at ``path`` on every node, all with the same scores, and map it. Collective.

        contents: of a checkpoint; they replace whatever stands there; or what a run begins with, which replaces stores
        without epochs. Else a store that is missing or behind is replaced by a copy of one that is ahead. Losses of a
        broken off epoch stay with existing="continue", unless there are several stores: that epoch begins anew, perhaps
        with other ranks, and two stores would then have a loss of one sample.

        Raises StoreError for a store with epochs when ``existing`` is "error", for one of another dataset or in use
        by another run; ConfigError for a network file system with ranks on several machines.
        """
        groups = ranks.grouped(neighbours(ranks, path))
        bootstrap = Bootstrap(ranks, groups, path, num_samples, fingerprint, existing, contents)
        opened = cls(ranks, groups, *bootstrap.store())
        opened._prove()
        opened._run_lock.take_over()
        return opened

    def iterated_by(self, iterator: object) -> None:
        """No other loader of this process may take the store as long as this iterator is in use; None: it may."""
        self._run_lock.iterated_by(iterator)

    def _prove(self) -> None:
        """Raise on every rank unless each sees in its map what every other of its group writes there."""
        store, ranks, members = self.store, self._ranks, self._groups.members
        group = members[self._groups.mine]
        before = store.token
        tokens = ranks.gather(_QUIET_NAN | secrets.randbelow(1 << 22))  # all have read what was there before
        blind: list[tuple[int, int]] = []
        for turn in range(max(map(len, members))):  # all in turn: that one sees another need not be mutual
            writer = group[turn % len(group)]
            if writer == ranks.process:
                store.token = tokens[writer]
            ranks.gather(None)
            seen = ranks.gather((writer, store.token == tokens[writer]))
            blind += [(rank, whose) for rank, (whose, sees) in enumerate(seen) if not sees]
        if self._groups.leads:
            store.token = before
        ranks.gather(None)  # nobody records before the token is gone
        if blind:
            reader, writer = blind[0]
            raise ConfigError(
                f"rank {reader} does not see what rank {writer} writes to the score store (here: {store.path}): this "
                "file system does not keep memory maps equal, or two paths lead to one store. Put the store on a local "
                "disk of each machine."
            )

    def merge(self) -> None:
        """Make what was recorded since the last commit known to all groups. Collective; nothing with one group."""
        if self._committing is not None:
            self._ranks.together("the exchange of scores", self._check_begun)
        self._merge()

    def _merge(self) -> None:
        if self._groups.count > 1:
            self._ranks.together("the exchange of scores", self._exchange)

    def _check_begun(self) -> None:
        header = read_header(self.store.path)
        if (header.state, header.epoch) != ("ready", self._committing):
            raise StoreError(
                f"the commit of epoch {self._committing} failed on one of the ranks, and was begun in "
                f"{self.store.path}: call commit() again first, or go on from a checkpoint (load_state_dict)."
            )

    def _exchange(self) -> None:
        share = self._groups.share(self.store.num_samples)
        for start in range(share.start, share.stop, BLOCK):
            mine = self.store.pending[start : min(start + BLOCK, share.stop)]
            self.store.put_pending(start, self._groups.merge(mine))

    def check(self) -> None:
        """Raise StoreError unless the store of this node is as this run left it."""
        if self._committing is None:  # one that failed may have reached this store; it is to be repeated
            self.store.check()

    def commit(self, epoch: Epoch, *, recorded: bool = False) -> None:
        """Make what all ranks recorded in ``epoch`` the scores of the next, in every store. Collective.

        May be repeated after it failed: a store that is at the next epoch already stays there. recorded: keep the
        losses in its history.
        """
        again, self._committing = self._committing is not None, epoch.number
        history = History(self.store.path, epoch, recorded=recorded)
        self._merge()
        self._ranks.together(
            _COMMIT, lambda: self._commit(history, epoch.number, again) if self._groups.leads else None
        )
        self._ranks.together(_COMMIT, self.store.refresh)
        self._committing = None

    def _commit(self, history: History, epoch: int, again: bool) -> None:
        self.store.commit(epoch, history=history)
        if again:  # a store that had been committed before got its losses back in the merge
            self.store.discard_pending()
