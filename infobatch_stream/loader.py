"""InfoBatchLoader: the one object that users hold. It wires the rest together."""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from infobatch_stream.arguments import check_choice, whole_number
from infobatch_stream.batches import Batches
from infobatch_stream.checkpoint import Progress, pack, unpack
from infobatch_stream.collation import Collation
from infobatch_stream.errors import ConfigError, OutOfStepError
from infobatch_stream.fetch import OnError, Request
from infobatch_stream.history import Epoch
from infobatch_stream.location import location_on_node
from infobatch_stream.losses import check_losses, weighted_mean
from infobatch_stream.opening import Contents, Existing, check_owner
from infobatch_stream.outlook import Outlook, shards_in_window
from infobatch_stream.picks import Picks
from infobatch_stream.plan import EpochPlan
from infobatch_stream.policies import Policy, Schedule, SoftPruning
from infobatch_stream.recipe import Recipe
from infobatch_stream.recorder import Recorder
from infobatch_stream.shared_store import SharedStore
from infobatch_stream.sources import open_source
from infobatch_stream.store import ScoreStore
from infobatch_stream.sync import Ranks, collective

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["InfoBatchLoader"]

_RUNS = count(1)  # and not a random number: ranks that do the same have the same, so that they may exchange picks
_FLIPPED = "(was a bit flipped on the disk?); their samples count as never seen"


class InfoBatchLoader:
    """Batches of the samples that are worth training on, epoch by epoch, with their weights.

    An iterable with a length. ``iter(loader)`` begins the next epoch; a batch is ``(data, picks)``; `update` takes
    the losses of a batch and returns the loss to go backward from::

        for epoch in range(loader.epoch, loader.epochs):
            for (x, y), picks in loader:
                losses = F.cross_entropy(model(x), y, reduction="none")
                loss = loader.update(losses, picks)

    Args:
        dataset: a streaming.StreamingDataset, an IndexedWebDataset, or any map-style dataset.
        store: path of the score store (made at the first iteration), or a ScoreStore. On several machines a path
            that is local on each; "{node}" in it becomes the number of the node (or the name of the host).
        batch_size: samples per batch of a rank. epochs: of the whole run.
        policy: which scores are kept, how often. delta: from epoch floor(delta * epochs) on all samples are kept.
        seed: 0 <= seed < 2^64, of choice, order and workers. shuffle: False keeps the order of the indices.
        shuffle_window: entries among which samples of shards are shuffled; a larger one mixes better, over more shards.
        canonical_nodes: lanes of the plan; default the number of nodes at the first start. Travels with the state.
        drop_last: drop the last, incomplete step instead of filling it up with entries of weight 0.
        on_error: "raise", or "replace" to put a readable sample with weight 0 for one that cannot be read.
        existing: what to do with a store that holds epochs: "error", "overwrite" or "continue".
        history: keep the losses of every epoch in the store (`ScoreStore.at`), not only what became of it.
        predownload: how many steps ahead the shards that this rank needs are downloaded (StreamingDataset's: samples).
        process_group: the group over which data is split, when that is not all processes.
        collate_fn: as of DataLoader: takes the list of the samples, and returns the data, row by row in the order of
            the list. It may sort the list itself, which is followed; a sorted copy is not, and is refused where a trial
            on a few samples shows it. collate_with_picks: instead of it for what sorts or filters: takes
            (samples, picks), and returns the data with the picks of its rows, as ``(data, picks[order])``.
        dataloader: further options of the inner DataLoader, as num_workers.

    Raises ConfigError or StoreError for what cannot work. Making a loader communicates and writes nothing, except
    with existing="continue", when the ranks open the store together to learn the epoch. The methods marked
    "Collective" must be called by all ranks.

    Attributes:
        dataloader: the inner DataLoader. epochs: may be raised on resume. epoch: the epoch that is trained, or
        comes next. step: how many of its steps were updated.
    """

    def __init__(
        self,
        dataset: Any,
        store: str | os.PathLike[str] | ScoreStore,
        *,
        batch_size: int,
        epochs: int,
        policy: Policy | Schedule = SoftPruning(ratio=0.5),  # noqa: B008 - frozen
        delta: float = 0.875,
        seed: int = 0,
        shuffle: bool = True,
        shuffle_window: int = 65536,
        canonical_nodes: int | None = None,
        drop_last: bool = False,
        on_error: OnError = "raise",
        existing: Existing = "error",
        predownload: int = 64,
        history: bool = False,
        process_group: "dist.ProcessGroup | None" = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        collate_with_picks: Callable[[list[Any], Picks], tuple[Any, Picks]] | None = None,
        **dataloader: Any,
    ) -> None:
        batch_size = whole_number("batch_size", batch_size, 1)
        if canonical_nodes is not None:
            canonical_nodes = whole_number("canonical_nodes", canonical_nodes, 1)
        self._predownload = whole_number("predownload", predownload, 0)
        self._history = bool(history)
        check_choice("on_error", on_error, ("raise", "replace"))
        check_choice("existing", existing, ("error", "overwrite", "continue"))
        self._recipe = Recipe(policy, delta, seed, shuffle, shuffle_window, drop_last)
        self._source = open_source(dataset, batch_size=batch_size, shuffle=shuffle)
        self._made = Batches(self._source, Collation(collate_fn, collate_with_picks), on_error, dataloader)
        self.dataloader: DataLoader[Any] = self._made.dataloader
        self.epochs = whole_number("epochs", epochs, 1)
        self._batch_size = batch_size
        self._existing: Existing = existing
        self._canonical_nodes = canonical_nodes
        self._process_group = process_group
        self._path = location_on_node(store.path if isinstance(store, ScoreStore) else store)
        self._shared: SharedStore | None = None
        self._recorder = Recorder()
        self._known_ranks: Ranks | None = None
        self._unreadable = 0
        self._warned: set[str] = set()
        self._run = next(_RUNS)
        self._begin(epoch=0)
        self._offered = self._kept = 0
        self._knows_all = True  # of the epochs before
        self._recipe.check(0, self._source.num_samples, epochs=self.epochs, so_far=(0, 0))
        if Ranks.known():
            self._lanes()
            # Early, where nobody else waits for this process; else all hear of it when they open the store.
            if self._ranks.processes == 1 and self._path.exists() and existing != "overwrite":
                check_owner(self._path, self._source.num_samples, self._source.fingerprint)

        if existing == "continue":
            with collective("InfoBatchLoader(existing='continue')"):
                self._open()
            self._begin(epoch=self._shared_store.store.epoch)
            self._knows_all = self.epoch == 0

    def _begin(self, epoch: int, step: int = 0, begun: int | None = None) -> None:
        """Stand before ``step`` of ``epoch``, of which nothing is planned, updated or exhausted.

        begun: how many epochs the run had when this one was begun, if it was.
        """
        self.epoch = epoch
        self.step = step
        self._begun = begun
        self._updated = self._exhausted = False
        self._planned: EpochPlan | None = None
        self._planned_for = 0
        self._started = 0.0
        self._iterating: object = None

    # Who and how many --------------------------------------------------------------------------------------------

    @property
    def _ranks(self) -> Ranks:
        if self._known_ranks is None or self._shared is None:  # a process group may be made after the loader
            self._known_ranks = Ranks(self._process_group)
        return self._known_ranks

    @property
    def _global_batch(self) -> int:
        return self._batch_size * self._ranks.world_size

    def _lanes(self) -> int:
        """Lanes of the plans: as given, else one per node where that divides the global batch."""
        lanes = self._canonical_nodes
        if lanes is None:
            lanes = self._ranks.nodes if self._global_batch % self._ranks.nodes == 0 else 1
        if self._global_batch % lanes:
            raise ConfigError(
                f"canonical_nodes={lanes} does not divide the global batch of {self._global_batch} "
                f"(batch_size {self._batch_size} x {self._ranks.world_size} ranks); choose a divisor."
            )
        return lanes

    @property
    def _settings(self) -> dict[str, Any]:
        """What has to be equal on all ranks, and in every resumed part of a run."""
        source = self._source
        return {
            "num_samples": source.num_samples,
            "fingerprint": source.fingerprint,
            "global_batch": self._global_batch,
            "mixing": repr(source.mixing),
            **self._recipe.facts(),
        }

    # The epoch and its plan --------------------------------------------------------------------------------------

    @property
    def _store(self) -> ScoreStore | None:
        return self._shared.store if self._shared is not None else None

    @property
    def _shared_store(self) -> SharedStore:
        assert self._shared is not None
        return self._shared

    def _plan(self) -> EpochPlan:
        """The plan of this epoch, from the scores as they are known to this process."""
        epochs = self._begun or self.epochs  # an epoch that was begun stays what it is when epochs are raised
        if self._planned is None or self._planned_for != epochs:
            unseen = np.broadcast_to(np.float32(np.nan), self._source.num_samples)
            self._planned = self._recipe.plan(
                unseen if self._store is None else self._store.scores,
                self._source,
                self.epoch,
                epochs=epochs,
                so_far=self._so_far,
                lanes=self._lanes(),
                global_batch=self._global_batch,
            )
            self._planned_for = epochs
        return self._planned

    @property
    def _spent(self) -> bool:
        """Whether something of this epoch was used, so that the next iteration is of the next one."""
        return self._updated or self._exhausted

    @property
    def _so_far(self) -> tuple[int, int] | None:
        """Entries of the epochs before, and how many of them were trained on, if that is known."""
        return (self._offered, self._kept) if self._knows_all else None

    # Iterating ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Steps of the current epoch; before the first is begun, of one that prunes nothing."""
        if self._store is not None:
            return self._plan().steps
        return self._recipe.steps_unpruned(self._source, self.epoch, self._global_batch)

    @collective("iter(loader)")
    def __iter__(self) -> Iterator[tuple[Any, Picks]]:
        """Commit what was recorded, and begin the next epoch; or go on with one of which nothing is spent yet.

        Collective. Raises ConfigError past the last epoch, OutOfStepError when the ranks are not equally far.
        """
        self._open()
        self._meet("iter(loader)")
        if self._spent:
            self._advance()
        if self.epoch >= self.epochs:
            raise ConfigError(
                f"all {self.epochs} epochs are done. Loop with 'for epoch in range(loader.epoch, loader.epochs)'; to "
                "train on, call loader.commit() and raise loader.epochs before it."
            )
        self._begun = self._begun or self.epochs
        plan, ranks = self._plan(), self._ranks
        if plan.infinite:
            self._warn_once("infinite", f"{plan.infinite} scores of {self._path} are infinite {_FLIPPED}")
        if said := self._recipe.check(self.epoch, plan.entries, epochs=self._begun, so_far=self._so_far):
            self._warn_once("policy" if self.epoch else "nothing to prune", said)
        self._iterating = mine = object()
        self._started = self._started or time.monotonic()
        batches = self._made.begin(
            plan,
            self.step,
            run=self._run,
            seed=self._recipe.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            outlook=self._outlook(plan),
        )
        found = self._batches(batches, mine)
        self._shared_store.iterated_by(found)
        return found

    def _outlook(self, plan: EpochPlan) -> Outlook | None:
        """On the shards of the steps to come; None where all are on this machine."""
        source = self._source
        if not source.is_remote or source.shard_sizes is None:
            return None
        if source.capacity is not None and self._recipe.shuffle:
            window = self._recipe.shuffle_window
            touched = shards_in_window(source.shard_sizes, plan, window, -(-self._lanes() // self._ranks.nodes))
            if source.capacity < touched:
                self._warn_once(
                    "cache",
                    f"the cache_limit of the dataset holds about {source.capacity} shards, but a shuffle_window of "
                    f"{window} entries lies in {touched}: shards will be dropped and downloaded again within an epoch. "
                    "Raise the cache_limit, or lower shuffle_window.",
                )
        return Outlook(source.shard_sizes, self._predownload, source.capacity)

    def _batches(self, batches: Iterator[Any], mine: object) -> Iterator[tuple[Any, Picks]]:
        while True:
            if self._iterating is not mine:
                raise OutOfStepError(
                    "this iterator belongs to an epoch that was left: iter(), commit() or load_state_dict() was "
                    "called since. Take a new one with iter(loader)."
                )
            if self._store is not None:
                self._store.check_scores()  # the plan reads them as it goes
            batch = next(batches, None)
            if batch is None:
                break
            if replaced := batch[1]._origin.replaced:
                self._unreadable += len(replaced)
                self._warn_once("unreadable", f"a sample could not be read and was replaced: {replaced[0]}")
            yield batch
        self._exhausted = True

    def peek(self) -> tuple[Any, Picks]:
        """The batch that comes next, as ``(data, picks)``, in this process; nothing is spent by it.

        Any rank may call it alone. It touches no random state. `update` with its picks records nothing.
        """
        plan, ranks = self._plan(), self._ranks
        if self._store is not None:
            self._store.check_scores()
        step = min(self.step, plan.steps - 1)
        entries, seeds = (
            plan.step(step, ranks.rank, ranks.world_size),
            (self._recipe.seed, plan.epoch, step, ranks.rank),
        )
        return self._made.one(Request(entries, self._run, plan.epoch, None, seeds))

    def update(self, losses: Tensor, picks: Picks, *, score: Tensor | None = None) -> Tensor:
        """Record the losses of a batch, and return ``mean(weight * losses)``, to go backward from.

        losses: float[b], one per sample, any device; left as they are. score: float[b], recorded instead of them.
        Divided by the batch size and not by the sum of weights, as published: fewer steps of a larger expected
        gradient, and over the epoch the same expected sum. Not finite values are not recorded.

        Raises ConfigError for losses that are not one number per sample, OutOfStepError for picks of another epoch.
        """
        if not isinstance(picks, Picks):
            raise ConfigError(f"update takes the picks that came with the batch, not {type(picks).__name__}.")
        check_losses("losses", losses, len(picks))
        if score is not None:
            check_losses("score", score, len(picks))
        origin = picks._origin
        if origin.run != self._run:
            raise OutOfStepError(
                "these picks are another loader's, or of before load_state_dict(): update each batch by the loader "
                "that gave it."
            )
        if origin.step is not None:
            if origin.epoch != self.epoch:
                raise OutOfStepError(
                    f"these picks are of epoch {origin.epoch}, the loader is in epoch {self.epoch}: update each "
                    "batch before the next epoch begins."
                )
            if self._ranks.records:
                self._recorder.add(picks.index.numpy(), picks._record.numpy(), losses if score is None else score)
                self._warn_of_losses()
            self.step = max(self.step, origin.step + 1)
            self._updated = True
        return weighted_mean(losses, picks.weight)

    def _warn_of_losses(self) -> None:
        if self._recorder.not_finite:
            self._warn_once("finite", "a loss was NaN or infinite; such losses are not recorded (see stats)")

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"InfoBatchLoader: {text}", RuntimeWarning, stacklevel=4)

    # Acting together ---------------------------------------------------------------------------------------------

    def _open(self, contents: Contents | None = None) -> None:
        """Have the store open on all ranks. Collective when it is not yet, or when there are ``contents``."""
        if self._shared is not None and contents is None:
            return
        self._ranks.agree(
            "open",
            **self._settings,
            lanes=self._lanes(),
            epochs=self.epochs,
            epoch=self.epoch,
            existing=self._existing,
        )
        source = self._source
        if self._shared is not None:
            self._shared.iterated_by(None)  # what is loaded now ends this loader's own epoch
        self._shared = SharedStore.open(
            self._ranks, self._path, source.num_samples, source.fingerprint, self._existing, contents
        )
        self._recorder.attach(self._shared_store.store)
        self._planned = None

    def _meet(self, moment: str) -> None:
        """Have all losses in the store, and all ranks at the same place. Collective."""
        self._ranks.together(moment, self._settle)
        self._warn_of_losses()
        self._ranks.agree(moment, epoch=self.epoch, step=self.step, spent=self._spent, epochs=self.epochs)

    def _settle(self) -> None:
        self._recorder.flush()
        self._shared_store.check()

    def _advance(self) -> None:
        """Commit this epoch and stand before the next. Collective; the ranks have met."""
        if not self._updated and self.step < self._plan().steps:
            self._warn_once(
                "update",
                f"epoch {self.epoch} went by without update(): its losses are not known, and "
                "nothing can be pruned without losses. Call loss = loader.update(losses, picks) for every batch",
            )
        plan = self._plan()  # of the scores before the commit
        seconds = time.monotonic() - self._started if self._started else math.nan
        row = Epoch(self.epoch, plan.entries, plan.kept, plan.trained, plan.threshold, seconds)
        self._shared_store.commit(row, recorded=self._history)
        self._shared_store.iterated_by(None)
        self._offered += plan.entries
        self._kept += plan.trained
        self._begin(epoch=self.epoch + 1)

    @collective("commit()")
    def commit(self) -> None:
        """Make what was recorded the scores of the next epoch, and stand before it; nothing if nothing is spent.

        Collective. An iterator of the epoch that is left raises when it is asked for more.
        """
        self._open()
        self._meet("commit()")
        if self._spent:
            self._advance()

    def __enter__(self) -> Self:
        """The loader."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Commit (collective); when an exception passes, only bring this rank's losses to the disk."""
        if kind is None:
            self.commit()
            return
        if error is not None:
            self._made.look_after_workers(error)  # torch raises it from a signal, wherever the main process stands
        if self._store is not None:
            with suppress(Exception):  # after a fault of the device nothing more comes from it; the cause passes on
                self._recorder.flush()
            with suppress(Exception):
                self._store.flush()

    @collective("state_dict()")
    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on with exactly the same picks, on any world size of equal global batch.

        Collective; valid after any step. On rank 0 it holds the scores (8 bytes per sample), elsewhere not: save
        that of rank 0. Plain values and tensors: torch.load(weights_only=True) reads it. The history of the epochs is
        not in it: that stays in the store.
        """
        self._open()
        self._meet("state_dict()")
        progress = Progress(
            epoch=self.epoch,
            step=self.step,
            done=self._exhausted or self.step >= self._plan().steps,
            begun=self._begun if self.step else None,
            lanes=self._lanes(),
            offered=self._offered,
            kept=self._kept,
            knows_all=self._knows_all,
        )
        self._shared_store.merge()
        store = self._shared_store.store if self._ranks.process == 0 else None
        return self._ranks.together("state_dict()", lambda: pack(self._settings, progress, store))

    @collective("load_state_dict()")
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was saved; its scores replace those of the store.

        Collective; ranks other than 0 may give a state without scores. Raises ConfigError for a state of another
        dataset, global batch or order.
        """
        leads = self._ranks.process == 0
        progress, scores, pending = self._ranks.together("load_state_dict()", lambda: self._unpack(state, leads))
        self._ranks.agree("load_state_dict()", **asdict(progress), chosen=self._canonical_nodes)
        self._open(Contents(scores, pending, progress.epoch))
        self._canonical_nodes = progress.lanes
        self._run = next(_RUNS)  # picks of before are of another place
        self._begin(epoch=progress.epoch, step=progress.step, begun=progress.begun)
        self._offered, self._kept, self._knows_all = progress.offered, progress.kept, progress.knows_all
        if progress.done:
            self._updated = True
            self._advance()

    def _unpack(
        self, state: dict[str, Any], with_scores: bool
    ) -> tuple[Progress, NDArray[np.float32] | None, NDArray[np.float32] | None]:
        """What ``state`` holds. Raises ConfigError before anything is replaced when this run has no such place."""
        progress, scores, pending = unpack(state, self._settings, with_scores=with_scores)
        epoch, step = progress.epoch, progress.step
        if (epoch, step) > (self.epochs, 0):
            raise ConfigError(
                f"the state was saved in epoch {epoch}, and this run has {self.epochs} epochs: raise epochs."
            )
        if step and scores is not None:
            steps = self._recipe.plan(
                scores,
                self._source,
                epoch,
                epochs=progress.begun or self.epochs,
                so_far=(progress.offered, progress.kept) if progress.knows_all else None,
                lanes=progress.lanes,
                global_batch=self._global_batch,
            ).steps
            if step > steps:
                raise ConfigError(f"the state is damaged: it is of step {step} of epoch {epoch}, which has {steps}.")
        return progress, scores, pending

    # What can be told of the run ---------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """How much of the whole run is done, 0 to 1, evenly however many steps an epoch has. For schedules."""
        within = self.step / self._plan().steps if self.step else 0.0
        return min(1.0, (self.epoch + within) / self.epochs)

    @property
    def kept_share(self) -> float:
        """Share of the current epoch's entries that are kept, over 0 to 1. For learning rates.

        A step stands for 1 / kept_share times as many samples as it holds, and its expected gradient is larger by that.
        """
        plan = self._plan()
        return plan.kept / plan.entries

    @property
    def stats(self) -> dict[str, float]:
        """Facts about the current epoch: flat, for a logger.

        epoch, step, steps; kept, pruned: entries of the epoch. threshold: the score from which most is kept: the mean
        under SoftPruning, the last quantile under QuantilePruning, the lowest score that is kept for certain under
        BudgetPruning; NaN without one, as in the first epoch and in annealing. mean_score: of the scores that this
        epoch was planned with, those of the epochs before; infobatch-stream inspect shows in the row of an epoch the
        mean when it was over, which is the mean_score of the next one. saved: share of all entries so far that was not
        trained on, this epoch's included (since the run was continued, if that was without a checkpoint). not_finite,
        unreadable: losses and samples of this process so far.
        """
        plan = self._plan()
        going = self.epoch < self.epochs
        kept, trained, entries = (plan.kept, plan.trained, plan.entries) if going else (0, 0, 0)
        return {
            "epoch": self.epoch,
            "step": self.step,
            "steps": plan.steps,
            "kept": kept,
            "pruned": entries - kept,
            "threshold": plan.threshold,
            "mean_score": plan.mean_score,
            "saved": 1 - (self._kept + trained) / (self._offered + entries) if self._offered + entries else 0.0,
            "not_finite": self._recorder.not_finite,
            "unreadable": self._unreadable,
        }
