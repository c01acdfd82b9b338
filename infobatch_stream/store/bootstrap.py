"""How the stores of a run come to be: one on every node, all with the same scores, whatever stood there before."""

import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from infobatch_stream._files import make_held, mark
from infobatch_stream._platform import is_network, kernel, name_of_file_system
from infobatch_stream.distributed import Groups, Ranks
from infobatch_stream.errors import ConfigError, StoreError
from infobatch_stream.store.header import Header, Seeded, check_is_store, read_header, short
from infobatch_stream.store.history import mend
from infobatch_stream.store.run_lock import RunLock
from infobatch_stream.store.score_store import ScoreStore
from infobatch_stream.store.seed import digest_of
from infobatch_stream.store.staging import PathTakenError, StagedStore, put_back, tidy

__all__ = ["BLOCK", "Contents", "Existing", "Bootstrap", "check_same_data", "neighbours"]

Existing = Literal["error", "overwrite", "continue"]

BLOCK = 1 << 22  # scores exchanged between nodes at once: bounds memory
_CALL = "opening the score store"
_RUN = secrets.token_hex(8)  # of rank 0: names the run in the lock of each store
_REMEDY = (
    "Each machine needs a store of its own: give a path on a local disk of each, or one with {node} in it, as "
    "/shared/scores-{node}.zarr, which becomes another path on each."
)


@dataclass(frozen=True)
class Contents:
    """What a checkpoint puts into a store, or what a run begins with.

    Attributes:
        scores: float32[N], on rank 0.
        pending: float32[N], of a checkpoint, on rank 0.
        epoch: How many epochs the scores are of.
        seeded: What they were before the first epoch, on rank 0.
        begins: Whether a run begins with them: where a store has epochs already, they are not used.
    """

    scores: NDArray[np.float32] | None
    pending: NDArray[np.float32] | None
    epoch: int
    seeded: Seeded | None = None
    begins: bool = False


@dataclass(frozen=True)
class _Found:
    """The store of a node. epoch: None when there is none that may stay. seeds: tells scores before the first epoch."""

    epoch: int | None = None
    seeds: str = ""
    seeded: Seeded | None = None

    @property
    def stands(self) -> tuple[int, str]:
        """Larger for one that is further on: with scores before the first epoch, then by epoch."""
        return -1 if self.epoch is None else self.epoch, self.seeds


def check_same_data(path: Path, num_samples: int, fingerprint: str) -> Header:
    """The header of the store at ``path``. Raises StoreError when it was made for another dataset."""
    header = read_header(path)
    if (header.num_samples, header.fingerprint) != (num_samples, fingerprint):
        raise StoreError(
            f"{path} holds the scores of another dataset: {header.num_samples:,} samples ({header.fingerprint}), "
            f"while this one has {num_samples:,} ({fingerprint}). Give each dataset its own store, or begin anew with "
            "existing='overwrite'."
        )
    return header


def neighbours(ranks: Ranks, path: Path) -> list[list[int]]:
    """The processes in groups that see the same folder for the store at ``path``. Collective.

    Found out by files that all of them put there, and not by the names of hosts or folders. Raises ConfigError for
    a network file system with processes on several machines, StoreError for a folder that cannot be written.
    """
    if ranks.processes == 1:
        return [[0]]
    folder, word = path.parent, ranks.gather(mark())[0]
    place = os.path.realpath(path)
    machines = ranks.gather((kernel(), place, name_of_file_system(Path(place))))
    for _, theirs, _ in machines:
        _check_machines([machine for machine in machines if machine[1] == theirs])
    prefix = f".{path.name}.rank-"
    stem = f"{prefix}{word}-"
    mine = folder / f"{stem}{ranks.process}"
    held = -1

    def marked() -> Path:
        mine.touch()
        return mine

    def show() -> None:
        nonlocal held
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _, held = make_held(marked)
        except OSError as error:
            raise StoreError(f"cannot write to {folder}, for the score store {path}: {error.strerror}.") from error

    def see() -> list[int]:
        names = [entry.name for entry in folder.iterdir()]
        return sorted(int(name.removeprefix(stem)) for name in names if name.startswith(stem))

    try:
        ranks.together(_CALL, show)
        groups = ranks.gather(ranks.together(_CALL, see))
    finally:
        with suppress(OSError):
            mine.unlink()
        if held >= 0:
            os.close(held)
    for process, group in enumerate(groups):
        if process not in group or any(groups[other] != group for other in group):
            raise ConfigError(
                f"rank {process} sees the files of ranks {group} in {folder}, and they do not all see each other's: "
                "this file system does not show what other processes write. " + _REMEDY
            )
        _check_machines([machines[other] for other in group])  # one folder may be mounted in several places
    return [group for process, group in enumerate(groups) if group[0] == process]


def _check_machines(sharing: list[tuple[str, str, str]]) -> None:
    """Refuse that processes with one store (kernel, path, file system of each) are on several machines."""
    for _, path, file_system in sharing:
        if is_network(file_system) and len({machine for machine, *_ in sharing}) > 1:
            raise ConfigError(
                f"the score store {path} is on a network file system ({file_system}), and the ranks are on several "
                f"machines, whose memory maps of one file it does not keep equal. {_REMEDY}"
            )


class Bootstrap:
    """The opening of the stores of a run. `store` does it.

    Arguments as of `ReplicatedStore.open`; groups: of the processes that share a store.
    """

    def __init__(
        self,
        ranks: Ranks,
        groups: Groups,
        path: Path,
        num_samples: int,
        fingerprint: str,
        existing: Existing,
        contents: Contents | None,
    ) -> None:
        self._ranks, self._groups = ranks, groups
        self._path, self._num_samples, self._fingerprint = path, num_samples, fingerprint
        self._existing, self._contents = existing, contents
        self._run = ranks.gather(_RUN)[0]
        self._run_lock: RunLock | None = None  # of the store that stands there
        self._new: RunLock | None = None  # of the staged store
        self._staged: StagedStore | None = None
        self._replaces = False

    def store(self) -> tuple[ScoreStore, RunLock]:
        """The store of this node, and the hold on it. Collective."""
        leads, groups = self._groups.leads, self._groups
        everyone = self._ranks.gather(self._ranks.together(_CALL, self._look if leads else _nothing))
        found = [everyone[leader] or _Found() for leader in groups.leaders]
        best = max(found, key=lambda one: one.stands)
        if self._contents and self._contents.begins and best.epoch:
            self._contents = None
        contents = self._contents
        if contents:
            epoch, seeded = contents.epoch, self._ranks.gather(contents.seeded)[0]
        else:
            self._check_seeds(found)
            epoch, seeded = best.epoch or 0, best.seeded
        stays = not contents and found[groups.mine].stands == (epoch, best.seeds)
        differ = any(one.stands != best.stands for one in found)
        try:
            self._ranks.together(_CALL, lambda: self._prepare(epoch, seeded) if leads and not stays else None)
            if leads and groups.count > 1 and (contents or (differ and (epoch or best.seeds))):
                self._copy(0 if contents else found.index(best))
            self._ranks.together(_CALL, self._place if self._staged else _nothing)
        finally:
            if self._staged:
                self._staged.discard()
        return self._ranks.together(_CALL, self._map)

    def _look(self) -> _Found | None:
        """The store that stands here; None when there is none that may stay."""
        path, contents = self._path, self._contents
        put_back(path)
        tidy(path)  # here too: a run that goes on may stage no store
        if not path.exists():
            return None
        self._replaces = True
        if (contents and not contents.begins) or self._existing == "overwrite":
            check_is_store(path)
            if not contents:
                self._check_not_seeded()
            if (path / "pending").is_dir():  # else it is damaged, and used by nobody
                self._lock()
            return None
        check_same_data(path, self._num_samples, self._fingerprint)
        self._lock()
        store = ScoreStore.open(path)
        if self._existing == "error" and store.epoch:
            raise StoreError(
                f"{path} already holds {store.epoch} epoch(s) of scores. To go on with them, call "
                "load_state_dict() with the checkpoint of that run, or pass existing='continue'; to throw them "
                "away, pass existing='overwrite'; or give another path."
            )
        if self._existing == "error" or self._groups.count > 1:
            store.discard_pending()
        compared = self._groups.count > 1 and not store.epoch
        return _Found(store.epoch, digest_of(store.scores) if compared else "", store.seeded)

    def _check_not_seeded(self) -> None:
        """Refuse to throw away scores that were put there for this run, or for one that never came to an epoch."""
        try:
            header = check_same_data(self._path, self._num_samples, self._fingerprint)
        except StoreError:  # damaged, or of other data: it is replaced
            return
        if header.seeded and not header.epoch and header.state == "ready":
            raise StoreError(
                f"{self._path} holds no epochs yet, but scores to begin with ({short(header.seeded.source)}). To use "
                "them, leave existing='overwrite' out; to begin without them, remove the folder."
            )

    def _check_seeds(self, found: list[_Found]) -> None:
        """Refuse nodes that would begin with different scores."""
        ranks = {one.seeds: rank for one, rank in zip(found, self._groups.leaders, strict=True) if one.seeds}
        if len(ranks) > 1 and not any(one.epoch for one in found):
            raise StoreError(
                f"the ranks {sorted(ranks.values())} are on nodes whose stores ({self._path}) hold different scores to "
                "begin with. Keep one and remove the others: nodes without a store get a copy of it."
            )

    def _prepare(self, epoch: int, seeded: Seeded | None) -> None:
        header = Header(self._num_samples, self._fingerprint, epoch, "ready", seeded)
        put = self._contents or Contents(None, None, epoch)
        try:
            self._staged = StagedStore(
                self._path, header, scores=put.scores, pending=put.pending, replace=self._replaces
            )
        except PathTakenError:
            RunLock.check_unused(self._path)
            raise
        self._staged.keep_history()
        self._new = RunLock.acquire(self._staged.folder, self._run, shown=self._path)

    def _place(self) -> None:
        """Put the staged store in its place. It is locked already, so whoever finds it there finds it in use."""
        assert self._staged
        try:
            self._staged.place()
        except PathTakenError:  # another run was quicker
            RunLock.check_unused(self._path)
            raise
        self._run_lock = self._new

    def _copy(self, source: int) -> None:
        """Copy the scores of the group ``source`` into the other staged stores. Collective among the leaders."""
        contents = self._contents
        here: dict[str, NDArray[np.float32] | None] = {"scores": None}
        if contents:
            here = {"scores": contents.scores} | ({} if contents.begins else {"pending": contents.pending})
        elif self._groups.mine == source:
            here = {"scores": ScoreStore.open(self._path, mode="r").scores}
        for array, whole in here.items():
            for start in range(0, self._num_samples, BLOCK):
                size = min(BLOCK, self._num_samples - start)
                mine = np.empty(size, np.float32) if whole is None else np.array(whole[start : start + size])
                values = self._groups.from_group(source, mine)
                if self._staged and whole is None:
                    self._staged.fill(array, start, values)

    def _lock(self) -> None:
        self._run_lock = RunLock.acquire(self._path, self._run)

    def _map(self) -> tuple[ScoreStore, RunLock]:
        if not self._path.exists():
            raise StoreError(
                f"{self._path} was made by the first rank of this node, and this process does not see it. {_REMEDY}"
            )
        store = ScoreStore.open(self._path)
        if self._groups.leads:
            mend(store.path, store.epoch, store.scores)
        return store, self._run_lock or RunLock.join(self._path)


def _nothing() -> None:
    return None
