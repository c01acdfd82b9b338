"""The states of a StreamingDataset's shards, shared by all processes of a machine: local, or being downloaded."""

import time
from typing import TYPE_CHECKING, Any

from infobatch_stream.errors import DataError
from infobatch_stream.sources.mds.files import LocalFiles

if TYPE_CHECKING:
    from streaming import StreamingDataset

__all__ = ["States"]

_TICK = 0.01  # seconds between two looks at a shard that another process downloads


class States:
    """The states in shared memory of the shards of ``dataset``, and their files, which go with a change of state."""

    def __init__(self, dataset: "StreamingDataset", files: LocalFiles) -> None:
        from streaming.base.dataset import _ShardState

        self._remote, self._preparing, self._local = map(
            int, (_ShardState.REMOTE, _ShardState.PREPARING, _ShardState.LOCAL)
        )
        self._dataset = dataset
        self._files = files

    def is_local(self, shard: int) -> bool:
        """Whether StreamingDataset takes ``shard`` to be local."""
        return self._dataset._shard_states[shard] == self._local  # type: ignore[no-any-return]

    def is_preparing(self, shard: int) -> bool:
        """Whether a process is downloading or decompressing it, or died while it was."""
        return self._dataset._shard_states[shard] == self._preparing  # type: ignore[no-any-return]

    def are_local(self, stream: int) -> bool:
        """Whether all shards of a stream are here."""
        begin, count = (
            int(of[stream]) for of in (self._dataset.shard_offset_per_stream, self._dataset.shards_per_stream)
        )
        return bool((self._dataset._shard_states.numpy()[begin : begin + count] == self._local).all())

    def wait(self, shard: int) -> None:
        """Return when no process is downloading ``shard`` in StreamingDataset's own way, which takes no lock."""
        if not self.is_preparing(shard):
            return
        stream = self._dataset.streams[int(self._dataset.stream_per_shard[shard])]
        patience = float(stream.download_timeout or 60) * (1 + int(stream.download_retry or 0)) + 10
        deadline = time.monotonic() + patience
        while self.is_preparing(shard):
            if time.monotonic() > deadline:
                raise DataError(
                    f"{self._files.name(shard)} is being downloaded by another process for over {patience:.0f} s, or "
                    "that process died. Raise download_timeout; or end this run, call 'infobatch-stream unlock', and "
                    "start it again."
                )
            time.sleep(_TICK)

    def let_go(self, shard: int) -> None:
        """Nobody prepares ``shard`` any more, and nothing is left that would be taken for it."""
        with self._lock():
            if self.is_preparing(shard):
                self._files.remove(shard)
                self._dataset._shard_states[shard] = self._remote

    def discard(self, shard: int, broken: bool) -> None:
        """Remove what is here of ``shard``: it is not whole, or nobody knows where it is from.

        But whole compressed files stay, to be decompressed, unless their download was ``broken`` off.
        """
        with self._lock():
            if self.is_local(shard) and not broken and self._files.is_packed(shard):
                self._dataset.cache_usage -= self._dataset.shards[shard]._evict_raw()
            elif self.is_local(shard) and (broken or any(file.exists() for file, _ in self._files[shard])):
                self._dataset._evict_shard(shard)  # which counts as streaming counts
            if self._dataset._shard_states[shard] == self._remote:
                self._files.remove(shard, broken)

    def _lock(self) -> Any:
        """That of all processes over the states."""
        from filelock import FileLock

        return FileLock(self._dataset._cache_filelock_path)
