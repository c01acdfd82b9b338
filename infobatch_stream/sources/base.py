"""What the loader asks of a dataset: how many samples, in which shards, and the samples themselves."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from infobatch_stream.planning.shape import Shape

__all__ = ["Source", "SourceType", "name_sample"]


class Source(Shape, Protocol):
    """A dataset of N samples, read by index.

    A source is built in the main process of a rank and travels to the workers (by fork or by pickle), so it
    holds no open file that does not survive both.
    """

    @property
    def fingerprint(self) -> str:
        """A short text that changes, as far as can be told cheaply, when an index would mean another sample.

        It does not depend on paths.
        """

    @property
    def mixing(self) -> dict[str, Any]:
        """What `pool` depends on, as plain values: ranks, and parts of a resumed run, must agree on it."""

    @property
    def draws(self) -> bool:
        """Whether reading runs code of the user's, which may draw random numbers. If unsure, it does."""

    @property
    def is_remote(self) -> bool:
        """Whether some shard may have to be downloaded, so that prefetching by `ensure_local` helps."""

    @property
    def capacity(self) -> int | None:
        """How many shards this machine keeps at least, under a limit of the user's; None if all."""

    def ensure_local(self, shard: int) -> None:
        """Return when ``shard`` is local. Several threads and processes may call it at once.

        Raises DataError, naming the shard and its url. `read` does the same where needed, so that a call which failed,
        or was never made, changes only when the shard is downloaded.
        """

    def by_ranges(self, indices: list[int]) -> AbstractContextManager[None] | None:
        """Download of these samples alone what is not here; within the context they are read without their shards.

        None where that cannot be done, or whole shards come about as soon. May raise anything: then they have to.
        """

    def read(self, index: int) -> Any:
        """Sample ``index``.

        Raises DataError, naming the shard, when the shard cannot be read; what the user's own code raises
        passes unchanged.
        """

    def read_many(self, indices: list[int]) -> list[Any]:
        """The samples, in the order of ``indices``, read in any order; one that cannot be read raises.

        The error has a note that names the sample.
        """


@dataclass(frozen=True)
class SourceType:
    """A kind of dataset that can be trained on; `infobatch_stream.sources` lists them all.

    accepts: whether it can open a dataset, told without importing a library that the user has not imported.
    open: makes the source from the dataset, and the loader's batch_size and shuffle.
    """

    accepts: Callable[[Any], bool]
    open: Callable[[Any, int | None, bool], Source]


def name_sample(error: Exception, indices: list[int], dataset: object) -> None:
    """Note in ``error`` of which sample it is, one of ``indices``. A note leaves its kind and text what they are."""
    which = f"sample {indices[0]}" if len(indices) == 1 else f"one of the samples {', '.join(map(str, indices))}"
    error.add_note(
        f"infobatch-stream: {which} of the {type(dataset).__name__} could not be read. (InfoBatchLoader("
        'on_error="replace") would put another sample in its place, with weight 0.)'
    )
