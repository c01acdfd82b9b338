"""The worker's side: a small request comes in, a finished batch goes out. Workers hold no state of an epoch."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from infobatch_stream._process_wide import keep_batch_memory
from infobatch_stream.augmentation import batch_read, sample_read
from infobatch_stream.errors import DataError
from infobatch_stream.per_sample import SampleValues
from infobatch_stream.picks import Origin, Picks
from infobatch_stream.planning.entries import Entries
from infobatch_stream.planning.epoch_plan import EpochPlan
from infobatch_stream.planning.lookahead import Lookahead
from infobatch_stream.sources.base import Source
from infobatch_stream.workers.collation import Collation, Trial
from infobatch_stream.workers.prefetch import Prefetcher
from infobatch_stream.workers.seeding import random_state_kept, seeded, set_seed

__all__ = ["Fetcher", "OnError", "Request", "Requests"]

_EARLY = 0.05  # share of an epoch's steps whose samples may come by themselves: as much is downloaded twice at most

OnError = Literal["raise", "replace"]


@dataclass(frozen=True)
class Request:
    """One batch of one rank, for the loader number ``run``.

    step None: peeked at, not spent. seed: what the batch's random state derives from. tried: whether it is tried first
    that the batch is made in the order of its samples.

    shards: that it needs, where some may not be here yet, in groups: first what an earlier step needs too. readahead:
    shards that later steps need. early: whether samples may be downloaded by themselves, if their shards are not here.
    """

    entries: Entries
    run: int
    epoch: int
    step: int | None
    seed: tuple[int, int, int, int]
    tried: bool = False
    shards: tuple[tuple[int, ...], ...] = ()
    readahead: tuple[int, ...] = ()
    early: bool = False


class Requests:
    """The requests of one rank for the rest of an epoch: what the inner DataLoader takes for a batch sampler.

    It knows the plan but not the loader, so that dropping the loader ends its workers at once.

    sample_weight: float32[N], of which a request has those of its entries: no worker needs a copy.
    """

    def __init__(self, sample_weight: SampleValues | None) -> None:
        self._plan: EpochPlan | None = None
        self._sample_weight = sample_weight

    def begin(
        self,
        plan: EpochPlan,
        first: int,
        *,
        run: int,
        seed: int,
        rank: int,
        world_size: int,
        lookahead: Lookahead | None = None,
    ) -> None:
        """From now on, the steps first.. of ``plan`` for ``rank`` of ``world_size``, with the shards in view."""
        self._plan = plan
        self._lookahead = lookahead
        self._run = run
        self._first = first
        self._early = first + max(1, int(_EARLY * plan.steps)) if lookahead is not None else first
        self._seed = seed
        self._rank = rank
        self._world_size = world_size

    def __iter__(self) -> Iterator[Request]:
        """One request a step."""
        plan, rank, world_size = self._plan, self._rank, self._world_size
        assert plan is not None
        if self._lookahead is None:
            for step in range(self._first, plan.steps):
                yield self._request(plan, step, plan.step(step, rank, world_size))
            return
        for step, upcoming in enumerate(self._lookahead.steps(plan, self._first, rank, world_size), self._first):
            yield self._request(plan, step, upcoming.entries, upcoming.shards, upcoming.readahead)

    def _request(
        self,
        plan: EpochPlan,
        step: int,
        entries: Entries,
        shards: tuple[tuple[int, ...], ...] = (),
        readahead: tuple[int, ...] = (),
    ) -> Request:
        seeds = (self._seed, plan.epoch, step, self._rank)
        entries = self.weighted(entries)
        first, early = step == self._first, step < self._early
        return Request(entries, self._run, plan.epoch, step, seeds, first, shards, readahead, early)

    def weighted(self, entries: Entries) -> Entries:
        """``entries`` with the weights of their samples, if there are any."""
        if self._sample_weight is None:
            return entries
        return replace(entries, sample_weight=self._sample_weight.values[entries.index])

    def __len__(self) -> int:
        """How many there are."""
        return 0 if self._plan is None else self._plan.steps - self._first


class Fetcher(Dataset[Any]):
    """Answers requests with ``(data, picks)``: the dataset that the inner DataLoader sees.

    on_error: "raise", or "replace" to put a readable sample of the batch, with weight 0, where one cannot be read.
    """

    def __init__(self, source: Source, collation: Collation, on_error: OnError) -> None:
        self._source = source
        self._prefetcher = Prefetcher(source)
        self._collation = collation
        self._on_error = on_error
        self._tries_ranges = source.capacity is None
        self._draws = source.draws or not collation.is_known  # whether code of the user's runs

    def __getitems__(self, request: Request) -> tuple[Any, Picks]:
        """The batch of ``request``; the same bits in whichever process, and whatever was fetched before."""
        self.queue(request)
        return self.make(request, seed_globals=self._draws)

    def queue(self, request: Request) -> None:
        """Have the shards fetched that are needed after the batch of ``request``; called in the order of the steps."""
        if request.shards:
            own = chain(*request.shards) if request.early and self._tries_ranges else ()
            self._prefetcher.queue((request.epoch, request.seed[2]), (*own, *request.readahead))

    def make(self, request: Request, *, seed_globals: bool = False) -> tuple[Any, Picks]:
        """The batch of ``request``; several threads may call it at once, unless the global random state is seeded."""
        try:
            return self._batch(request, seed_globals)
        except StopIteration as error:  # of the user's code; a loop over batches would end, as if there were no more
            raise DataError(
                f"the dataset or collate_fn raised StopIteration (epoch {request.epoch}, step {request.seed[2]}), of "
                "which the cause says more; perhaps next() was called on an iterator that had ended."
            ) from error

    def _batch(self, request: Request, seed_globals: bool) -> tuple[Any, Picks]:
        keep_batch_memory()
        entries = request.entries
        replaced: tuple[str, ...] = ()
        lost: dict[int, Exception] = {}
        alone: AbstractContextManager[None] | None = None
        if request.shards:
            alone = self._samples_alone(request) if request.early else None
            lost = self._prefetcher.fetch(() if alone else request.shards)
        if lost and self._on_error == "raise":
            raise next(iter(lost.values()))
        with (
            alone or nullcontext(),
            seeded(request.seed) if seed_globals else nullcontext(),
            batch_read(request.seed),
        ):
            if self._on_error == "raise":
                samples = self._source.read_many(entries.index.tolist())
            else:
                samples, entries, replaced = self._read_or_replace(request, lost)
            picks = Picks(
                # Copies: the plan keeps its arrays, and these are the user's to change.
                torch.from_numpy(entries.index.copy()),
                torch.from_numpy(entries.weight.copy()),
                torch.from_numpy(entries.record.copy()),
                Origin(request.run, request.epoch, request.step, replaced),
                None if entries.sample_weight is None else torch.from_numpy(entries.sample_weight),
            )
            sample_read(None)
            return self._collate(request, samples, picks, seed_globals)

    def _samples_alone(self, request: Request) -> AbstractContextManager[None] | None:
        """Where the shards of ``request`` are not here: what has its samples by themselves, if they come sooner."""
        try:
            return self._source.by_ranges(request.entries.index.tolist()) if self._tries_ranges else None
        except Exception:  # whatever it is, whole shards come without it, or say what is wrong
            self._tries_ranges = False
            return None

    def _collate(self, request: Request, samples: list[Any], picks: Picks, seed_globals: bool) -> tuple[Any, Picks]:
        if len(samples) != len(picks):
            raise DataError(
                f"the dataset gave {len(samples)} samples for {len(picks)} indices, so it cannot be told which is "
                "which. Its __getitems__ must return one for each index, in their order; let it raise for one that "
                'cannot be read, and give on_error="replace".'
            )
        if request.tried and not self._collation.is_known:
            with random_state_kept() if seed_globals else nullcontext(), batch_read(request.seed):
                if seed_globals:
                    set_seed(request.seed)
                Trial(self._collation, samples, picks).run()
        try:
            return self._collation(samples, picks)
        except Exception as error:
            self._collation.explain(error, samples, picks.index.tolist())
            raise

    def _read_or_replace(
        self, request: Request, lost: dict[int, Exception]
    ) -> tuple[list[Any], Entries, tuple[str, ...]]:
        """lost: shards that are known not to be had, and why."""
        entries = request.entries
        samples: dict[int, Any] = {}
        failures: dict[int, Exception] = {}
        sizes = self._source.shard_sizes
        if lost and sizes is not None:
            shards = np.searchsorted(np.cumsum(sizes), entries.index, side="right").tolist()
            failures = {place: lost[shard] for place, shard in enumerate(shards) if shard in lost}
        for place, index in enumerate(entries.index.tolist()):
            if place in failures:
                continue
            try:
                samples[place] = self._source.read(index)
            except Exception as error:
                failures[place] = error
        if not samples:
            raise DataError(
                f"none of the {entries.index.size} samples of this rank's batch (epoch {request.epoch}, step "
                f"{request.seed[2]}) could be read, so there is nothing to replace them with; the first error is the "
                "cause of this one."
            ) from next(iter(failures.values()))
        places = np.arange(entries.index.size)
        readable = list(samples)
        for number, place in enumerate(failures):
            places[place] = readable[number % len(readable)]
        taken = entries.take(places)
        taken.weight[list(failures)] = 0
        taken.record[list(failures)] = False
        why = tuple(f"sample {entries.index[place]}: {error!r}" for place, error in failures.items())
        return [samples[place] for place in places.tolist()], taken, why
