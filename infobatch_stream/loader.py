"""InfoBatchLoader: the one object that users hold. It wires the rest together."""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import count
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from infobatch_stream._validation import check_choice, whole_number
from infobatch_stream.checkpoint import Saved, pack, unpack
from infobatch_stream.distributed import Ranks, collective
from infobatch_stream.errors import ConfigError, OutOfStepError
from infobatch_stream.losses import check_losses, check_picks, weighted_mean
from infobatch_stream.picks import Picks
from infobatch_stream.planning.config import RunConfig
from infobatch_stream.planning.epoch_plan import EpochPlan
from infobatch_stream.planning.lookahead import Lookahead, shards_in_window
from infobatch_stream.planning.position import RunPosition
from infobatch_stream.policies.base import Policy, Schedule
from infobatch_stream.policies.pruning import SoftPruning
from infobatch_stream.run_store import RunStore
from infobatch_stream.sources import open_source
from infobatch_stream.store.bootstrap import Contents, Existing
from infobatch_stream.store.history import Epoch
from infobatch_stream.store.location import location_on_node
from infobatch_stream.store.score_store import ScoreStore
from infobatch_stream.workers.batches import Batches
from infobatch_stream.workers.collation import Collation
from infobatch_stream.workers.fetch import OnError, Request

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
        dataset: A streaming.StreamingDataset, an IndexedWebDataset, or any map-style dataset.
        store: Path of the score store (made at the first iteration), or a ScoreStore. On several machines a path that
            is local on each; "{node}" in it becomes the number of the node (or the name of the host).
        batch_size: Samples per batch of a rank.
        epochs: Of the whole run.
        policy: Which scores are kept, how often.
        delta: From epoch floor(delta * epochs) on all samples are kept.
        seed: Of choice, order and workers, 0 <= seed < 2^64.
        shuffle: False keeps the order of the indices.
        shuffle_window: Entries among which samples of shards are shuffled; a larger one mixes better, over more shards.
        canonical_nodes: Lanes of the plan; default the number of nodes at the first start. Travels with the state.
        drop_last: Drop the last, incomplete step instead of filling it up with entries of weight 0.
        on_error: "raise", or "replace" to put a readable sample with weight 0 for one that cannot be read.
        existing: What to do with a store that holds epochs: "error", "overwrite" or "continue".
        predownload: How many steps ahead the shards that this rank needs are downloaded (StreamingDataset's: samples).
        history: Keep the losses of every epoch in the store (`ScoreStore.at`), not only what became of it.
        process_group: The group over which data is split, when that is not all processes.
        collate_fn: As of DataLoader: takes the list of the samples, and returns the data, row by row in the order of
            the list. It may sort the list itself, which is followed; a sorted copy is not, and is refused where a trial
            on a few samples shows it.
        collate_with_picks: Instead of collate_fn, for what sorts or filters: takes (samples, picks), and returns the
            data with the picks of its rows, as ``(data, picks[order])``.
        dataloader: Further options of the inner DataLoader, as num_workers.

    Raises ConfigError or StoreError for what cannot work. Making a loader communicates and writes nothing, except
    with existing="continue", when the ranks open the store together to learn the epoch. The methods marked
    "Collective" must be called by all ranks.

    Attributes:
        dataloader: The inner DataLoader.
        epochs: Of the whole run; may be raised on resume.
        batch_size: Samples per batch of a rank.
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
        self.batch_size = whole_number("batch_size", batch_size, 1)
        if canonical_nodes is not None:
            canonical_nodes = whole_number("canonical_nodes", canonical_nodes, 1)
        self._canonical_nodes = canonical_nodes
        self._predownload = whole_number("predownload", predownload, 0)
        check_choice("on_error", on_error, ("raise", "replace"))
        check_choice("existing", existing, ("error", "overwrite", "continue"))
        self._config = RunConfig(policy, delta, seed, shuffle, shuffle_window, drop_last)
        self._source = open_source(dataset, batch_size=self.batch_size, shuffle=shuffle)
        self._made = Batches(self._source, Collation(collate_fn, collate_with_picks), on_error, dataloader)
        self.dataloader: DataLoader[Any] = self._made.dataloader
        self.epochs = whole_number("epochs", epochs, 1)
        self._path = location_on_node(store.path if isinstance(store, ScoreStore) else store)
        self._scores = RunStore(self._path, self._source, existing, bool(history))
        self._process_group = process_group
        self._known_ranks: Ranks | None = None
        self._unreadable = 0
        self._warned: set[str] = set()
        self._run = next(_RUNS)
        self._stand_at(RunPosition())
        self._config.check(self._position, self._source.num_samples, epochs=self.epochs)
        if Ranks.known():
            self._lanes()
            # Early, where nobody else waits for this process; else all hear of it when they open the store.
            if self._ranks.processes == 1:
                self._scores.check_dataset()
        if existing == "continue":
            with collective("InfoBatchLoader(existing='continue')"):
                self._open()
            epoch = self._opened_store.epoch
            self._stand_at(RunPosition(epoch, knows_all=epoch == 0))

    def _stand_at(self, position: RunPosition) -> None:
        """Stand there; nothing is planned or iterated yet."""
        self._position = position
        self._planned: tuple[int, EpochPlan] | None = None
        self._started = 0.0
        self._iterating: object = None

    # Who and how many --------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch that is trained, or comes next."""
        return self._position.epoch

    @property
    def step(self) -> int:
        """How many steps of it were updated."""
        return self._position.step

    @property
    def spent(self) -> bool:
        """Whether something of this epoch was used, so that the next iteration is of the next one."""
        return self._position.spent

    @property
    def num_samples(self) -> int:
        """N: samples of the dataset, with the indices 0..N-1."""
        return self._source.num_samples

    @property
    def process(self) -> int:
        """The number of this process among all, 0 in a run of one."""
        return self._ranks.process

    @property
    def processes(self) -> int:
        """How many processes there are."""
        return self._ranks.processes

    @property
    def unpruned_steps(self) -> int:
        """Steps of an epoch that prunes nothing."""
        return self._config.steps_unpruned(self._source, 0, self._global_batch)

    @property
    def _ranks(self) -> Ranks:
        if self._known_ranks is None or self._store is None:  # a process group may be made after the loader
            self._known_ranks = Ranks(self._process_group)
        return self._known_ranks

    @property
    def _global_batch(self) -> int:
        return self.batch_size * self._ranks.world_size

    def _lanes(self) -> int:
        """Lanes of the plans: as given, else one per node where that divides the global batch."""
        lanes = self._canonical_nodes
        if lanes is None:
            lanes = self._ranks.nodes if self._global_batch % self._ranks.nodes == 0 else 1
        if self._global_batch % lanes:
            raise ConfigError(
                f"canonical_nodes={lanes} does not divide the global batch of {self._global_batch} "
                f"(batch_size {self.batch_size} x {self._ranks.world_size} ranks); choose a divisor."
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
            **self._config.facts(),
        }

    # The epoch and its plan --------------------------------------------------------------------------------------

    @property
    def _store(self) -> ScoreStore | None:
        return self._scores.store

    @property
    def _opened_store(self) -> ScoreStore:
        assert self._store is not None
        return self._store

    def _plan(self) -> EpochPlan:
        """The plan of this epoch, from the scores as they are known to this process."""
        epochs = self._position.begun or self.epochs  # an epoch that was begun stays what it is when epochs are raised
        if self._planned is None or self._planned[0] != epochs:
            self._planned = epochs, self._plan_at(self._position, self._scores.scores, self._lanes())
        return self._planned[1]

    def _plan_at(self, position: RunPosition, scores: NDArray[np.float32], lanes: int) -> EpochPlan:
        epochs, batch = position.begun or self.epochs, self._global_batch
        return self._config.plan(scores, self._source, position, epochs=epochs, lanes=lanes, global_batch=batch)

    # Iterating ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Steps of the current epoch; before the first is begun, of one that prunes nothing."""
        if self._store is not None:
            return self._plan().steps
        return self._config.steps_unpruned(self._source, self.epoch, self._global_batch)

    @collective("iter(loader)")
    def __iter__(self) -> Iterator[tuple[Any, Picks]]:
        """Commit what was recorded, and begin the next epoch; or go on with one of which nothing is spent yet.

        Collective. Raises ConfigError past the last epoch, OutOfStepError when the ranks are not equally far.
        """
        self._open()
        self._meet("iter(loader)")
        if self.spent:
            self._advance()
        if self.epoch >= self.epochs:
            raise ConfigError(
                f"all {self.epochs} epochs are done. Loop with 'for epoch in range(loader.epoch, loader.epochs)'; to "
                "train on, call loader.commit() and raise loader.epochs before it."
            )
        begun = self._position.begun = self._position.begun or self.epochs
        plan, ranks = self._plan(), self._ranks
        if plan.infinite:
            self._warn_once("infinite", f"{plan.infinite} scores of {self._path} are infinite {_FLIPPED}")
        if said := self._config.check(self._position, plan.entries, epochs=begun):
            self._warn_once("policy" if self.epoch else "nothing to prune", said)
        self._iterating = mine = object()
        self._started = self._started or time.monotonic()
        batches = self._made.begin(
            plan,
            self.step,
            run=self._run,
            seed=self._config.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            outlook=self._outlook(plan),
        )
        found = self._batches(batches, mine)
        self._scores.iterated_by(found)
        return found

    def _outlook(self, plan: EpochPlan) -> Lookahead | None:
        """On the shards of the steps to come; None where all are on this machine."""
        source = self._source
        if not source.is_remote or source.shard_sizes is None:
            return None
        if source.capacity is not None and self._config.shuffle:
            window = self._config.shuffle_window
            touched = shards_in_window(source.shard_sizes, plan, window, -(-self._lanes() // self._ranks.nodes))
            if source.capacity < touched:
                self._warn_once(
                    "cache",
                    f"the cache_limit of the dataset holds about {source.capacity} shards, but a shuffle_window of "
                    f"{window} entries lies in {touched}: shards will be dropped and downloaded again within an epoch. "
                    "Raise the cache_limit, or lower shuffle_window.",
                )
        return Lookahead(source.shard_sizes, self._predownload, source.capacity)

    def _batches(self, batches: Iterator[Any], mine: object) -> Iterator[tuple[Any, Picks]]:
        while True:
            if self._iterating is not mine:
                raise OutOfStepError(
                    "this iterator belongs to an epoch that was left: iter(), commit() or load_state_dict() was "
                    "called since. Take a new one with iter(loader)."
                )
            self._scores.check_scores()  # the plan reads them as it goes
            batch = next(batches, None)
            if batch is None:
                break
            if replaced := batch[1]._origin.replaced:
                self._unreadable += len(replaced)
                self._warn_once("unreadable", f"a sample could not be read and was replaced: {replaced[0]}")
            yield batch
        self._position.exhausted = True

    def peek(self) -> tuple[Any, Picks]:
        """The batch that comes next, as ``(data, picks)``, in this process; nothing is spent by it.

        Any rank may call it alone. It touches no random state. `update` with its picks records nothing.
        """
        plan, ranks = self._plan(), self._ranks
        self._scores.check_scores()
        step = min(self.step, plan.steps - 1)
        entries = plan.step(step, ranks.rank, ranks.world_size)
        seeds = (self._config.seed, plan.epoch, step, ranks.rank)
        return self._made.one(Request(entries, self._run, plan.epoch, None, seeds))

    def update(self, losses: Tensor, picks: Picks, *, score: Tensor | None = None) -> Tensor:
        """Record the losses of a batch, and return ``mean(weight * losses)``, to go backward from.

        losses: float[b], one per sample, any device; left as they are. score: float[b], recorded instead of them.
        Divided by the batch size and not by the sum of weights, as published: fewer steps of a larger expected
        gradient, and over the epoch the same expected sum. Not finite values are not recorded.

        Raises ConfigError for losses that are not one number per sample, OutOfStepError for picks of another epoch.
        """
        check_picks(picks, self._run, self.epoch)
        check_losses("losses", losses, len(picks))
        if score is not None:
            check_losses("score", score, len(picks))
        if (step := picks._origin.step) is not None:
            if self._ranks.records:
                recorder = self._scores.recorder
                recorder.add(picks.index.numpy(), picks._record.numpy(), losses if score is None else score)
                self._warn_of_losses()
            self._position.step = max(self.step, step + 1)
            self._position.updated = True
        return weighted_mean(losses, picks.weight)

    def _warn_of_losses(self) -> None:
        if self._scores.recorder.not_finite:
            self._warn_once("finite", "a loss was NaN or infinite; such losses are not recorded (see stats)")

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"InfoBatchLoader: {text}", RuntimeWarning, stacklevel=4)

    # Acting together ---------------------------------------------------------------------------------------------

    def _open(self, contents: Contents | None = None) -> None:
        """Have the store open on all ranks. Collective when it is not yet, or when there are ``contents``."""
        facts = {"lanes": self._lanes(), "epochs": self.epochs, "epoch": self.epoch}
        if self._scores.open(self._ranks, contents, **self._settings, **facts):
            self._planned = None

    def _meet(self, moment: str) -> None:
        """Have all losses in the store, and all ranks at the same place. Collective."""
        self._ranks.together(moment, self._scores.settle)
        self._warn_of_losses()
        self._ranks.agree(moment, epoch=self.epoch, step=self.step, spent=self.spent, epochs=self.epochs)

    def _advance(self) -> None:
        """Commit this epoch and stand before the next. Collective; the ranks have met."""
        if not self._position.updated and self.step < self._plan().steps:
            self._warn_once(
                "update",
                f"epoch {self.epoch} went by without update(): its losses are not known, and "
                "nothing can be pruned without losses. Call loss = loader.update(losses, picks) for every batch",
            )
        plan = self._plan()  # of the scores before the commit
        seconds = time.monotonic() - self._started if self._started else math.nan
        row = Epoch(self.epoch, plan.entries, plan.kept, plan.trained, plan.threshold, seconds)
        self._scores.commit(row)
        self._position.advance(plan.entries, plan.trained)
        self._stand_at(self._position)

    @collective("commit()")
    def commit(self) -> None:
        """Make what was recorded the scores of the next epoch, and stand before it; nothing if nothing is spent.

        Collective. An iterator of the epoch that is left raises when it is asked for more.
        """
        self._open()
        self._meet("commit()")
        if self.spent:
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
        self._scores.save_what_can_be()

    @collective("state_dict()")
    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on with exactly the same picks, on any world size of equal global batch.

        Collective; valid after any step. On rank 0 it holds the scores (8 bytes per sample), elsewhere not: save
        that of rank 0. Plain values and tensors: torch.load(weights_only=True) reads it. The history of the epochs is
        not in it: that stays in the store.
        """
        self._open()
        self._meet("state_dict()")
        progress = self._position.to_state(self._plan().steps, self._lanes())
        merged = self._scores.merge()
        store = merged if self._ranks.process == 0 else None
        return self._ranks.together("state_dict()", lambda: pack(self._settings, progress, store))

    @collective("load_state_dict()")
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was saved; its scores replace those of the store.

        Collective; ranks other than 0 may give a state without scores. Raises ConfigError for a state of another
        dataset, global batch or order.
        """
        leads = self._ranks.process == 0
        saved = self._ranks.together("load_state_dict()", lambda: self._unpack(state, with_scores=leads))
        where = asdict(saved.position)
        self._ranks.agree("load_state_dict()", **where, lanes=saved.lanes, chosen=self._canonical_nodes)
        self._open(Contents(saved.scores, saved.pending, saved.position.epoch))
        self._canonical_nodes = saved.lanes
        self._run = next(_RUNS)  # picks of before are of another place
        self._stand_at(saved.position)
        if saved.done:
            self._position.updated = True
            self._advance()

    def _unpack(self, state: dict[str, Any], *, with_scores: bool) -> Saved:
        """What ``state`` holds. Raises ConfigError before anything is replaced when this run has no such place."""
        saved = unpack(state, self._settings, with_scores=with_scores)
        epoch, step = saved.position.epoch, saved.position.step
        if (epoch, step) > (self.epochs, 0):
            raise ConfigError(
                f"the state was saved in epoch {epoch}, and this run has {self.epochs} epochs: raise epochs."
            )
        if step and saved.scores is not None:
            steps = self._plan_at(saved.position, saved.scores, saved.lanes).steps
            if step > steps:
                raise ConfigError(f"the state is damaged: it is of step {step} of epoch {epoch}, which has {steps}.")
        return saved

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
        plan, before = self._plan(), self._position
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
            "saved": 1 - (before.trained + trained) / (before.entries + entries) if before.entries + entries else 0.0,
            "not_finite": self._scores.recorder.not_finite,
            "unreadable": self._unreadable,
        }
