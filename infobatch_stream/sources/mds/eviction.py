"""The cache_limit of a StreamingDataset: what may be removed to keep it, and whether it can be kept."""

from typing import TYPE_CHECKING

import numpy as np

from infobatch_stream.errors import ConfigError
from infobatch_stream.sources.mds.folders import Copies

if TYPE_CHECKING:
    from streaming import StreamingDataset

__all__ = ["Eviction", "bytes_for_copies"]


class Eviction:
    """Removes the shard that was read longest ago, of those that can come again. A dataset calls it under its lock.

    StreamingDataset's own `_evict_coldest_shard`, in whose place it is put, takes any: also one of a stream without a
    remote. (It holds no reference to the dataset, which would then outlive its last user.)
    """

    def __init__(self, dataset: "StreamingDataset", copies: Copies) -> None:
        from streaming.base.dataset import NEVER, _ShardState

        self._remote, self._local, self._never = int(_ShardState.REMOTE), int(_ShardState.LOCAL), NEVER
        self._states, self._times, self._usage = (
            dataset._shard_states,
            dataset._shard_access_times,
            dataset._cache_usage,
        )
        self._shards = dataset.shards
        self._copies = copies

    def __call__(self) -> None:
        """Remove one. Raises ValueError when there is none that may be removed."""
        here = np.flatnonzero(self._states.numpy() == self._local)
        for shard in here[np.argsort(self._times.numpy()[here], kind="stable")].tolist():
            if self._copies.can_come_again(shard):
                self._times[shard] = self._never
                self._states[shard] = self._remote
                self._usage.set(int(self._usage.get()) - self._shards[shard].evict())
                return
        raise ValueError(
            "the cache_limit is reached, and no shard here may be removed: a remote has none of them. Raise the "
            "cache_limit of the StreamingDataset, or look whether its remotes are there"
        )


def bytes_for_copies(dataset: "StreamingDataset", copies: Copies) -> int | None:
    """How many bytes of the cache_limit are for shards that may be removed again; None: no limit applies.

    The limit counts those that may not be removed too. Raises ConfigError when not enough is left for the others:
    StreamingDataset asks for four times the largest.
    """
    sizes = [
        (shard.get_max_size(), copies.fetchable[stream])
        for shard, stream in zip(dataset.shards, dataset.stream_per_shard.tolist(), strict=True)
    ]
    largest = max((size for size, fetchable in sizes if fetchable), default=0)
    if not dataset.cache_limit or not largest:
        return None
    kept = sum(size for size, fetchable in sizes if not fetchable)
    indexes = sum(stream.get_index_size() for stream in dataset.streams)
    left = int(dataset.cache_limit) - indexes - kept
    if kept and left < 4 * largest:
        raise ConfigError(
            f"cache_limit={dataset.cache_limit}: it also counts shards of streams whose files here are no copies "
            f"({_name(dataset, copies)}), so they are never removed. These take {kept:,} bytes, and the others need 4 "
            f"shards of up to {largest:,}: raise cache_limit to at least {indexes + kept + 4 * largest}."
        )
    return left


def _name(dataset: "StreamingDataset", copies: Copies) -> str:
    pairs = zip(dataset.streams, copies.fetchable, strict=True)
    return ", ".join(f"{stream.local}, remote={stream.remote!r}" for stream, fetchable in pairs if not fetchable)
