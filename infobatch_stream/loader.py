"""InfoBatchLoader: the one object that users hold. It gives batches, and takes their losses."""

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor
from torch.utils.data import DataLoader

from infobatch_stream._validation import check_choice, whole_number
from infobatch_stream.initial_scores import GivenScores, InitialScores
from infobatch_stream.loader_facts import LoaderFacts
from infobatch_stream.losses import check_losses, check_picks, weighted_mean
from infobatch_stream.per_sample import PerSample, mask_of, weights_of
from infobatch_stream.picks import Picks
from infobatch_stream.planning.config import RunConfig
from infobatch_stream.planning.epoch_plan import EpochPlan
from infobatch_stream.planning.lookahead import Lookahead, cache_advice
from infobatch_stream.policies.base import Policy, Schedule
from infobatch_stream.policies.pruning import SoftPruning
from infobatch_stream.run import Run
from infobatch_stream.sources import open_source
from infobatch_stream.store.bootstrap import Existing
from infobatch_stream.store.location import location_on_node
from infobatch_stream.store.score_store import ScoreStore
from infobatch_stream.workers.batches import Batches
from infobatch_stream.workers.collation import Collation
from infobatch_stream.workers.fetch import OnError, Request

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["InfoBatchLoader"]


class InfoBatchLoader(LoaderFacts):
    """Batches of the samples that are worth training on, epoch by epoch, with their weights.

    An iterable with a length. ``iter(loader)`` begins the next epoch; a batch is ``(data, picks)``; `update` takes
    the losses of a batch and returns the loss to go backward from:

        for epoch in range(loader.epoch, loader.epochs):
            for (x, y), picks in loader:
                losses = F.cross_entropy(model(x), y, reduction="none")
                loss = loader.update(losses, picks)

    Args:
        dataset: A streaming.StreamingDataset, an IndexedWebDataset, or any map-style dataset.
        store: Path of the score store (made at the first iteration), or a ScoreStore. On several machines a path that
            is local on each; "{node}" in it becomes the number of the node (or the name of the host).
        batch_size: Samples per batch of a rank; with constant_steps the most that it holds.
        epochs: Of the whole run.
        policy: Which scores are kept, how often.
        delta: From epoch floor(delta * epochs) on all samples are kept.
        seed: Of choice, order and workers, 0 <= seed < 2^64.
        shuffle: False keeps the order of the indices.
        shuffle_window: Entries among which samples of shards are shuffled; a larger one mixes better, over more shards.
        canonical_nodes: Lanes of the plan; default the number of nodes at the first start. Travels with the state.
        drop_last: Drop the last, incomplete step instead of filling it up with entries of weight 0.
        constant_steps: Make as many steps in every epoch as if nothing were pruned, each of a smaller batch, instead of
            fewer steps of ``batch_size``. Then no optimizer and no schedule notices that samples are skipped.
        on_error: "raise", or "replace" to put a readable sample with weight 0 for one that cannot be read.
        existing: What to do with a store that holds epochs: "error", "overwrite" or "continue".
        num_threads: Make batches by so many threads of this process, instead of in the loop or by the worker processes
            of num_workers. Then the dataset is read by several threads at once, and random augmentation should draw
            from `augmentation_rng`.
        predownload: How many steps ahead the shards that this rank needs are downloaded (StreamingDataset's: samples).
        history: Keep the losses of every epoch in the store (`ScoreStore.at`), not only what became of it.
        process_group: The group over which data is split, when that is not all processes; or a DeviceMesh of one
            dimension, as mesh["dp"].
        collate_fn: As of DataLoader: takes the list of the samples, and returns the data, row by row in the order of
            the list. It may sort the list itself, which is followed; a sorted copy is not, and is refused where a trial
            on a few samples shows it.
        collate_with_picks: Instead of collate_fn, for what sorts or filters: takes (samples, picks), and returns the
            data with the picks of its rows, as ``(data, picks[order])``.
        include: The samples to train on: bool[N], their indices, or a file of either (".npy", "table.parquet:column").
            Shards without any are not downloaded. May be changed between epochs.
        sample_weight: float[N] or such a file: multiplies the loss of each sample, beside ``picks.weight``.
        initial_scores: Scores of an earlier run or of another model, so that the first epoch prunes too: a score store
            of this dataset, float[N] (NaN: not known), or a file (".npy", "table.parquet:column"). A run that goes on
            has its own.
        dataloader: Further options of the inner DataLoader, as num_workers.

    Raises ConfigError or StoreError for what cannot work. Making a loader communicates and writes nothing, except
    with existing="continue", when the ranks open the store together to learn the epoch. The methods marked
    "Collective" must be called by all ranks.

    Attributes:
        dataloader: The inner DataLoader.
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
        constant_steps: bool = False,
        on_error: OnError = "raise",
        existing: Existing = "error",
        num_threads: int = 0,
        predownload: int = 64,
        history: bool = False,
        process_group: "dist.ProcessGroup | DeviceMesh | None" = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        collate_with_picks: Callable[[list[Any], Picks], tuple[Any, Picks]] | None = None,
        include: PerSample | None = None,
        sample_weight: PerSample | None = None,
        initial_scores: GivenScores | None = None,
        **dataloader: Any,
    ) -> None:
        self.batch_size = whole_number("batch_size", batch_size, 1)
        if canonical_nodes is not None:
            canonical_nodes = whole_number("canonical_nodes", canonical_nodes, 1)
        self._predownload = whole_number("predownload", predownload, 0)
        check_choice("on_error", on_error, ("raise", "replace"))
        check_choice("existing", existing, ("error", "overwrite", "continue"))
        config = RunConfig(policy, delta, seed, shuffle, shuffle_window, drop_last, bool(constant_steps))
        source = open_source(dataset, batch_size=self.batch_size, shuffle=shuffle)
        weights = weights_of(sample_weight, source.num_samples)
        collation = Collation(collate_fn, collate_with_picks)
        self._batches = Batches(source, collation, on_error, weights, num_threads, dataloader)
        self.dataloader: DataLoader[Any] = self._batches.dataloader
        self._run = Run(
            source,
            location_on_node(store.path if isinstance(store, ScoreStore) else store),
            config,
            batch_size=self.batch_size,
            epochs=whole_number("epochs", epochs, 1),
            canonical_nodes=canonical_nodes,
            existing=existing,
            history=bool(history),
            process_group=process_group,
            include=mask_of(include, source.num_samples),
            sample_weight=weights,
            initial_scores=None if initial_scores is None else InitialScores.of(initial_scores, source),
        )

    # Batches -----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[tuple[Any, Picks]]:
        """Commit what was recorded, and begin the next epoch; or go on with one of which nothing is spent yet.

        Collective. Raises ConfigError past the last epoch, OutOfStepError when the ranks are not equally far.
        """
        run = self._run
        plan = run.begin()
        batches = self._batches.begin(
            plan,
            self.step,
            run=run.number,
            seed=run.config.seed,
            rank=run.ranks.rank,
            world_size=run.ranks.world_size,
            lookahead=self._lookahead(plan),
        )
        return run.iterate(batches)

    def _lookahead(self, plan: EpochPlan) -> Lookahead | None:
        """Of the shards that the next steps need; None where all are on this machine."""
        run, source = self._run, self._run.source
        if not source.is_remote or source.shard_sizes is None:
            return None
        if source.capacity is not None and run.config.shuffle:
            lanes = -(-run.batch.lanes // run.ranks.nodes)
            sizes = run.curriculum.included_of(source.shard_sizes)
            advice = cache_advice(sizes, source.capacity, plan, run.config.shuffle_window, lanes)
            run.warn_once("cache", advice)
        return Lookahead(source.shard_sizes, self._predownload, source.capacity)

    def peek(self) -> tuple[Any, Picks]:
        """The batch that comes next, as ``(data, picks)``, in this process; nothing is spent by it.

        Any rank may call it alone. It touches no random state. `update` with its picks records nothing.
        """
        run = self._run
        plan, rank = run.plan(), run.ranks.rank
        run.scores.check_scores()
        step = min(self.step, plan.steps - 1)
        entries = plan.step(step, rank, run.ranks.world_size)
        request = Request(entries, run.number, plan.epoch, None, (run.config.seed, plan.epoch, step, rank))
        return self._batches.one(request)

    def update(self, losses: Tensor, picks: Picks, *, score: Tensor | None = None) -> Tensor:
        """Record the losses of a batch, and return ``sum(weight * losses) / batch_size``, to go backward from.

        The weight is ``picks.weight``, times the ``sample_weight`` of each where the loader was given one.

        Divided by ``batch_size`` and not by the sum of weights, as published: fewer steps of a larger expected
        gradient, and over the epoch the same expected sum. With constant_steps batches are smaller, and are divided by
        ``batch_size`` too: as many steps of the same expected gradient, and the mean over DDP's ranks is exact
        although they may differ by a sample. Losses that are not finite are not recorded.

        Args:
            losses: float[b], one per sample, any device; left as they are.
            picks: Those that came with the batch.
            score: float[b], recorded instead of the losses.

        Raises:
            ConfigError: For losses that are not one number per sample.
            OutOfStepError: For picks of another epoch.
        """
        check_picks(picks, self._run.number, self.epoch)
        check_losses("losses", losses, len(picks))
        if score is not None:
            check_losses("score", score, len(picks))
        if picks._origin.step is not None:  # else they were only peeked at
            self._run.record(losses if score is None else score, picks)
        # With constant_steps a batch holds fewer samples than it stands for; else as many, or what collation left.
        batch_size = self.batch_size if self.constant_steps else None
        return weighted_mean(losses, picks, batch_size, self._run.scores.recorder.ring)

    # Commits and states ------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Make what was recorded the scores of the next epoch, and stand before it; nothing if nothing is spent.

        Collective. An iterator of the epoch that is left raises when it is asked for more.
        """
        self._run.commit()

    def __enter__(self) -> Self:
        """The loader."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Commit (collective); when an exception passes, only bring this rank's losses to the disk."""
        if kind is None:
            self.commit()
            return
        if error is not None:
            self._batches.look_after_workers(error)  # torch raises it from a signal, wherever the main process stands
        self._run.scores.save_what_can_be()

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on with exactly the same picks, on any world size of equal global batch.

        Collective; valid after any step. On rank 0 it holds the scores (8 bytes per sample), elsewhere not: save
        that of rank 0. Plain values and tensors: torch.load(weights_only=True) reads it. The history of the epochs is
        not in it: that stays in the store.
        """
        return self._run.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was saved; its scores replace those of the store.

        Collective; ranks other than 0 may give a state without scores. Raises ConfigError for a state of another
        dataset, global batch or order.
        """
        self._run.load_state_dict(state)
