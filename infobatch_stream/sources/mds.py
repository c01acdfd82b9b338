"""MDS shards, through the user's own StreamingDataset: downloads, decoding and ``__getitem__`` stay his."""

import time
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infobatch_stream.errors import DataError
from infobatch_stream.sources.base import Pool, fingerprint
from infobatch_stream.sources.mds_reading import MdsFiles, MdsReading

if TYPE_CHECKING:
    from streaming import StreamingDataset

__all__ = ["MdsSource"]

_MIXING = ("shuffle_seed", "sampling_method", "sampling_granularity", "epoch_seed_change")  # of resample_streams
_ATTEMPTS = 3  # a shard may be evicted between its download and its use, when the cache limit is tight
_TICK = 0.01  # seconds between two looks at a shard that another process downloads


class MdsSource:
    """A StreamingDataset (or subclass) of any number of streams, read by index.

    StreamingDataset waits for ever on a shard whose download failed in any process. So before samples are read
    their shards are brought here, with a deadline, and a failed download is put back to be tried again.
    """

    def __init__(self, dataset: "StreamingDataset") -> None:
        from streaming.base.dataset import _ShardState

        self._remote, self._preparing, self._local = map(
            int, (_ShardState.REMOTE, _ShardState.PREPARING, _ShardState.LOCAL)
        )
        for stream, shard in zip(dataset.stream_per_shard, dataset.shards, strict=True):
            _check_shard(shard, Path(dataset.streams[stream].local, dataset.streams[stream].split, "index.json"))
        self._dataset = dataset
        self._open = MdsFiles(dataset)
        self.draws = not self._open.only_streamings
        self.num_samples = int(dataset.num_samples)
        self.shard_sizes = np.asarray(dataset.samples_per_shard, dtype=np.int64)
        self._ends = np.cumsum(self.shard_sizes)
        streams = np.asarray(dataset.stream_per_shard).tolist()
        self._files = [
            [
                (Path(dataset.streams[stream].local, dataset.streams[stream].split, raw.basename), int(raw.bytes))
                for raw, _ in shard.file_pairs
            ]
            for stream, shard in zip(streams, dataset.shards, strict=True)
        ]
        files = [
            (raw.basename, raw.bytes, sorted(raw.hashes.items()))
            for shard in dataset.shards
            for raw, _ in shard.file_pairs
        ]
        self.fingerprint = fingerprint("mds", [*self.shard_sizes.tolist(), *streams, *files])
        for number, stream in enumerate(streams):
            if not dataset.streams[stream].remote:
                self._here(number)  # what nobody downloads has its full size now, or never
        samples = np.asarray(dataset.samples_per_stream).tolist()
        self.mixing: dict[str, Any] = {}
        if any(stream.choose != n for stream, n in zip(dataset.streams, samples, strict=True)):
            self.mixing = {
                "choose": [int(stream.choose) for stream in dataset.streams],
                **{name: getattr(dataset, name) for name in _MIXING},
            }

    def __getstate__(self) -> dict[str, Any]:
        """State for a worker, without the file lock of this process: the dataset makes one where there is none."""
        self._dataset.__dict__.pop("_cache_filelock", None)
        return self.__dict__

    def pool(self, epoch: int) -> Pool | None:
        """What StreamingDataset would draw in ``epoch``; None when that is each sample once."""
        if not self.mixing:
            return None
        units, index = self._dataset.resample_streams(epoch)
        return Pool(np.asarray(index, dtype=np.int64), np.asarray(units, dtype=np.int64))

    def read(self, index: int) -> Any:
        """``dataset[index]``, once its shard is here. Raises DataError when the shard cannot be had."""
        return self.read_many([index])[0]

    def read_many(self, indices: list[int]) -> list[Any]:
        """The samples, in the order of ``indices``, read shard by shard, once what is not local was brought here."""
        numbers = np.array(indices)
        shards = np.searchsorted(self._ends, numbers, side="right").tolist()
        for shard in sorted(set(shards)):
            if self._state(shard) != self._local:
                self._bring(shard)
        samples: list[Any] = [None] * len(indices)
        with MdsReading(self._dataset, self._open) as reading:
            groups = [
                (shard, list(places))
                for shard, places in groupby(np.argsort(numbers, kind="stable").tolist(), key=shards.__getitem__)
            ]
            self._announce(reading, [(shard, [indices[place] for place in places]) for shard, places in groups])
            for shard, places in groups:
                reading.turn_to(shard, self._path(shard), self._bring(shard))
                try:
                    for place in places:
                        samples[place] = reading.get(indices[place])
                except (FileNotFoundError, RuntimeError) as error:  # StreamingDataset's, for a shard it cannot get
                    if self._here(shard):
                        raise
                    # Evicted since it was brought, and StreamingDataset itself failed to download it again.
                    self._give_back(shard)
                    raise self._missing(shard, error) from error
        return samples

    def _announce(self, reading: MdsReading, wanted: list[tuple[int, list[int]]]) -> None:
        """Have the system fetch samples (indices by shard) at once, unless it has the first of them in memory."""
        missing = False
        for shard, indices in wanted:
            reading.turn_to(shard, self._path(shard), self._bring(shard))
            for index in indices:
                missing = reading.announce(index) or missing
                if not missing:
                    return

    def _path(self, shard: int) -> str:
        return str(self._files[shard][0][0])

    def _bring(self, shard: int) -> tuple[int, int]:
        """Return when the files of ``shard`` are here, whole: size and modification time of the last."""
        for _ in range(_ATTEMPTS):
            self._wait(shard)  # some downloads grow in place: a shard that is not complete has the wrong size
            if stamp := self._here(shard):
                return stamp
            self._prepare(shard)
        if stamp := self._here(shard):
            return stamp
        raise DataError(
            f"{self._name(shard)} is not there, though it was downloaded {_ATTEMPTS} times: a cache_limit that is "
            "too small evicts it before it is read. Raise the cache_limit of the StreamingDataset."
        )

    def _here(self, shard: int) -> tuple[int, int] | None:
        stamp = None
        for file, size in self._files[shard]:
            try:
                stat = file.stat()
                if stat.st_size != size:
                    if self._state(shard) == self._preparing:  # another process began to download it just now
                        return None
                    stat = file.stat()  # or has finished since
            except FileNotFoundError:
                return None
            if stat.st_size != size:
                raise DataError(
                    f"{self._name(shard)} has {stat.st_size:,} bytes, its index.json says {size:,}: it is truncated or "
                    "of another dataset. Delete the file to have it downloaded again, or convert the data anew."
                )
            stamp = size, stat.st_mtime_ns
        return stamp

    def _prepare(self, shard: int) -> None:
        try:
            self._dataset.prepare_shard(shard, blocking=False)
        except Exception as error:
            self._give_back(shard)
            raise self._missing(shard, error) from error
        self._wait(shard)

    def _wait(self, shard: int) -> None:
        """Return when no process is downloading ``shard``."""
        if self._state(shard) != self._preparing:
            return
        stream = self._dataset.streams[self._dataset.stream_per_shard[shard]]
        patience = float(stream.download_timeout or 60) * (1 + int(stream.download_retry or 0)) + 10
        deadline = time.monotonic() + patience
        while self._state(shard) == self._preparing:
            if time.monotonic() > deadline:
                raise DataError(
                    f"{self._name(shard)} is being downloaded by another process for over {patience:.0f} s, or that "
                    "process died. Raise download_timeout, or restart after "
                    "streaming.base.util.clean_stale_shared_memory()."
                )
            time.sleep(_TICK)

    def _state(self, shard: int) -> int:
        return self._dataset._shard_states[shard]  # type: ignore[no-any-return]

    def _give_back(self, shard: int) -> None:
        """Let go of a shard whose download failed here, so that nobody waits for it."""
        lock = getattr(self._dataset, "_cache_filelock", None)
        if lock is None:  # no download was begun in this process
            return
        lock.release(force=True)  # an eviction that failed leaves it held
        with lock:
            if self._state(shard) == self._preparing:
                self._dataset._shard_states[shard] = self._remote

    def _missing(self, shard: int, error: Exception) -> DataError:
        remote = self._dataset.streams[self._dataset.stream_per_shard[shard]].remote
        source = f"from {remote}" if remote else "(there is no remote to take it from)"
        return DataError(
            f"{self._name(shard)} is missing and could not be fetched {source}: {error}. "
            "Check the path and the remote of the StreamingDataset."
        )

    def _name(self, shard: int) -> str:
        return f"shard {self._files[shard][0][0]}"


def _check_shard(shard: Any, index: Path) -> None:
    """Raise DataError unless the files that ``index`` names lie in its folder and can hold as many samples as it says.

    (Each sample has 4 bytes of its own in a table of offsets, so a count is no larger than the files it stands for.)
    """
    room = 0
    for file in (file for pair in shard.file_pairs for file in pair if file is not None):
        name = file.basename
        path = Path(name) if isinstance(name, str) and "\0" not in name else Path("..")
        if path.is_absolute() or ".." in path.parts or not path.name:
            raise DataError(
                f"{index} has a shard in the file {name!r}, which is not in its folder. Do not use this dataset, or "
                "fetch or write its index.json again."
            )
        if type(file.bytes) is not int or not 0 <= file.bytes < 2**63 or not isinstance(file.hashes, dict):
            raise DataError(f"{index} gives {name!r} {file.bytes!r} bytes; fetch or write it again.")
        room += file.bytes
    if type(shard.samples) is not int or not 0 <= 4 * shard.samples <= room:
        raise DataError(
            f"{index} says that {shard.file_pairs[0][0].basename!r} holds {shard.samples!r} samples in {room:,} bytes, "
            "which cannot be. Fetch or write it again."
        )
