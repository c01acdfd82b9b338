"""What the loader asks of a dataset: how many samples, in which shards, and the samples themselves."""

from typing import Any, Protocol

from infobatch_stream.planning.shape import Shape

__all__ = ["Source", "name_sample"]


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
        """Whether some shard may not be on this machine yet, so that it is worth to `bring` shards ahead of use."""

    @property
    def capacity(self) -> int | None:
        """How many shards this machine keeps at least, under a limit of the user's; None if all."""

    def bring(self, shard: int) -> None:
        """Have ``shard`` on this machine, and return when it is. Called from several threads and processes at once.

        Raises DataError, naming the shard and where it would come from. Whoever reads a sample calls it first, or does
        what it does: a call that failed, or was never made, changes nothing but the time at which the shard comes.
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


def name_sample(error: Exception, indices: list[int], dataset: object) -> None:
    """Note in ``error`` of which sample it is, one of ``indices``. A note leaves its kind and text what they are."""
    which = f"sample {indices[0]}" if len(indices) == 1 else f"one of the samples {', '.join(map(str, indices))}"
    error.add_note(
        f"infobatch-stream: {which} of the {type(dataset).__name__} could not be read. (InfoBatchLoader("
        'on_error="replace") would put another sample in its place, with weight 0.)'
    )
