"""Batches of a plan, through a DataLoader: its options, its iterators, and workers of it that are gone."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from infobatch_stream._validation import whole_number
from infobatch_stream.errors import ConfigError
from infobatch_stream.per_sample import SampleValues
from infobatch_stream.picks import Picks
from infobatch_stream.planning.epoch_plan import EpochPlan
from infobatch_stream.sources.base import Source
from infobatch_stream.workers.collation import Collation
from infobatch_stream.workers.fetch import Fetcher, OnError, Request, Requests
from infobatch_stream.workers.health import advise, lost_worker, widen
from infobatch_stream.workers.threads import ThreadedBatches

__all__ = ["Batches"]

_OURS = {
    "batch_sampler": "the plan decides what a batch holds; see batch_size, and collate_with_picks to sort within one",
    "sampler": (
        "the plan decides the order, and gives each rank its share; see shuffle and shuffle_window. To train on some "
        "of the samples, give include=. To train on some more often, give sample_weight=, or "
        "torch.utils.data.Subset(dataset, indices), in which an index may stand several times (each time is a sample "
        "with a score of its own); of a StreamingDataset Stream(repeat=) or Stream(proportion=)"
    ),
    "in_order": "batches come in the order of the plan",
    "snapshot_every_n_steps": "state_dict() is exact after any step, and workers keep nothing to take a snapshot of",
}
_OF_WORKERS = ("num_workers", "worker_init_fn", "timeout", "persistent_workers", "multiprocessing_context")
_FAILURES = (RuntimeError, OSError, EOFError)  # as which the loss of a worker shows


class Batches:
    """Makes (data, picks) of the requests of a rank, in worker processes, in threads of this process, or in itself.

    sample_weight: float32[N], for the picks. num_threads: 0 without. options: of DataLoader. Raises ConfigError for
    those that are not the user's to choose.

    Attributes:
        dataloader: the DataLoader.
    """

    def __init__(
        self,
        source: Source,
        collation: Collation,
        on_error: OnError,
        sample_weight: SampleValues | None,
        num_threads: int,
        options: dict[str, Any],
    ) -> None:
        for name in _OURS.keys() & options.keys():
            raise ConfigError(f"{name}= is not an option of InfoBatchLoader: {_OURS[name]}.")
        self._threads = whole_number("num_threads", num_threads, 0)
        if self._threads:
            for name in filter(options.get, _OF_WORKERS):
                raise ConfigError(
                    f"{name}={options[name]!r} is for worker processes, num_threads={num_threads} for threads instead "
                    "of them: leave one of the two out."
                )
            factor = options.pop("prefetch_factor", None)
            self._ahead = self._threads * whole_number("prefetch_factor", 2 if factor is None else factor, 1)
        options.setdefault("generator", torch.Generator())  # else iter() would draw from the user's global one
        self._requests = Requests(sample_weight)
        self._fetcher = Fetcher(source, collation, on_error)
        self.dataloader: DataLoader[Any] = DataLoader(
            self._fetcher, batch_sampler=cast(Any, self._requests), collate_fn=_as_is, **options
        )

    def one(self, request: Request) -> tuple[Any, Picks]:
        """The batch of ``request``, made in this process."""
        request = replace(request, entries=self._requests.weighted(request.entries))
        return self._fetcher.__getitems__(request)

    def begin(self, plan: EpochPlan, first: int, **whose: Any) -> Iterator[tuple[Any, Picks]]:
        """The steps first.. of ``plan``, whose workers start now; ``whose``: as `Requests.begin` has it."""
        self._requests.begin(plan, first, **whose)
        if self._threads:
            return self._threaded()
        try:
            batches = iter(self.dataloader)
            widen(batches)
        except _FAILURES as error:
            self.look_after_workers(error, self.dataloader._iterator)
            raise
        return self._each(batches)

    def _threaded(self) -> Iterator[tuple[Any, Picks]]:
        def queued() -> Iterator[Request]:
            for request in requests:
                fetcher.queue(request)
                yield request

        requests, fetcher = iter(self._requests), self._fetcher
        pin = self.dataloader.pin_memory
        return ThreadedBatches(queued(), fetcher.make, threads=self._threads, ahead=self._ahead, pin_memory=pin)

    def _each(self, batches: Iterator[Any]) -> Iterator[tuple[Any, Picks]]:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except _FAILURES as error:
                self.look_after_workers(error, batches)
                raise
            yield batch

    def look_after_workers(self, error: BaseException, batches: object = None) -> None:
        """If a worker is gone, say in ``error`` what to do, and have new ones at the next iteration."""
        if lost_worker(error, batches):
            self.dataloader._iterator = None  # of persistent workers; it would wait for the dead one for ever
            advise(error)


def _as_is(batch: Any) -> Any:
    return batch
