"""MDS shards, through the user's own StreamingDataset: downloads, decoding and ``__getitem__`` stay his."""

import sys
from contextlib import AbstractContextManager
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from infobatch_stream.augmentation import sample_read
from infobatch_stream.formats.mds_index import check_shard, mds_fingerprint
from infobatch_stream.planning.shape import Pool
from infobatch_stream.sources.base import SourceType, name_sample
from infobatch_stream.sources.mds.cache import MdsCache
from infobatch_stream.sources.mds.folders import fix_folders
from infobatch_stream.sources.mds.options import check_options
from infobatch_stream.sources.mds.ranges import read_samples
from infobatch_stream.sources.mds.reader import MdsFiles, MdsReading
from infobatch_stream.sources.mds.remote_index import local_dir

if TYPE_CHECKING:
    from streaming import StreamingDataset

__all__ = ["MDS", "MdsSource"]

_MIXING = ("shuffle_seed", "sampling_method", "sampling_granularity", "epoch_seed_change")  # of resample_streams


class MdsSource:
    """A StreamingDataset (or subclass) of any number of streams, read by index.

    Shards are downloaded before their samples are read (see `MdsCache`). batch_size, shuffle: of the loader, for
    `check_options`.
    """

    def __init__(self, dataset: "StreamingDataset", batch_size: int | None = None, shuffle: bool = True) -> None:
        check_options(dataset, batch_size, shuffle)
        fix_folders(dataset)
        for stream, shard in zip(dataset.stream_per_shard, dataset.shards, strict=True):
            files = ((file.basename, file.bytes, file.hashes) for file in chain(*shard.file_pairs) if file is not None)
            check_shard(files, shard.samples, local_dir(dataset.streams[stream]) / "index.json")
        self._dataset = dataset
        self._open = MdsFiles(dataset)
        self.draws = not self._open.only_streamings
        self.num_samples = int(dataset.num_samples)
        self.shard_sizes = np.asarray(dataset.samples_per_shard, dtype=np.int64)
        self._ends = np.cumsum(self.shard_sizes)
        self._cache = MdsCache(dataset)
        streams = np.asarray(dataset.stream_per_shard).tolist()
        files = ((raw.basename, raw.bytes, raw.hashes) for shard in dataset.shards for raw, _ in shard.file_pairs)
        self.fingerprint = mds_fingerprint(self.shard_sizes.tolist(), streams, files)
        self._cache.check_local()
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

    @property
    def is_remote(self) -> bool:
        """Whether some shard may have to be downloaded."""
        return self._cache.is_remote

    @property
    def capacity(self) -> int | None:
        """How many shards fit under the dataset's cache_limit at least; None without a limit."""
        return self._cache.capacity

    def ensure_local(self, shard: int) -> None:
        """Return when ``shard`` is local. Raises DataError, with the url, when it cannot be downloaded."""
        self._cache.ensure_local(shard)

    def by_ranges(self, indices: list[int]) -> AbstractContextManager[None] | None:
        """Download of these samples alone what is not here; within, they are read. None where that is of no use."""
        if self.capacity is not None:
            return None
        shards = np.searchsorted(self._ends, indices, side="right").tolist()
        missing = {
            index: shard for index, shard in zip(indices, shards, strict=True) if not self._cache.is_local(shard)
        }
        if not missing or not all(self._open.shards[shard] for shard in missing.values()):
            return None
        samples = read_samples(self._dataset, list(missing), list(missing.values()))
        return None if samples is None else self._open.holding(samples, missing)

    def read(self, index: int) -> Any:
        """``dataset[index]``, once its shard is here. Raises DataError when the shard cannot be had."""
        return self.read_many([index])[0]

    def read_many(self, indices: list[int]) -> list[Any]:
        """The samples, in the order of ``indices``, read shard by shard, once what is not local was downloaded."""
        numbers = np.array(indices)
        order = np.argsort(numbers, kind="stable")
        shards = np.searchsorted(self._ends, numbers[order], side="right")
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
        groups = list(zip(shards[starts].tolist(), map(np.ndarray.tolist, np.split(order, starts)[1:]), strict=True))
        held = self._open.held.samples
        alone = {shard for shard, places in groups if held and all(indices[place] in held for place in places)}
        for shard, _ in groups:
            if not self._cache.is_local(shard) and shard not in alone:
                self._cache.ensure_local(shard)
        samples: list[Any] = [None] * len(indices)
        with MdsReading(self._dataset, self._open) as reading:
            self._readahead(reading, [group for group in groups if group[0] not in alone], indices)
            for shard, places in groups:
                if shard in alone:
                    reading.turn_away()
                else:
                    reading.turn_to(shard, self._cache.path(shard), self._cache.ensure_local(shard))
                together = reading.several(numbers[places])
                if together is not None:
                    for place, sample in zip(places, together, strict=True):
                        samples[place] = sample
                    continue
                try:
                    for place in places:
                        sample_read(indices[place])
                        samples[place] = reading.get(indices[place])
                except Exception as error:  # the user's, or StreamingDataset's, if it cannot get the shard again
                    failure = self._cache.look_after(shard, error)
                    if failure is None:
                        name_sample(error, [indices[place]], self._dataset)
                        raise
                    raise failure from error
        return samples

    def _readahead(self, reading: MdsReading, groups: list[tuple[int, list[int]]], indices: list[int]) -> None:
        """Have the system read samples (their places in ``indices``, by shard) ahead, unless the first is in memory."""
        missing = False
        for shard, places in groups:
            reading.turn_to(shard, self._cache.path(shard), self._cache.ensure_local(shard))
            for place in places:
                missing = reading.readahead(indices[place]) or missing
                if not missing:
                    return


def _accepts(dataset: Any) -> bool:
    """Whether it is a StreamingDataset: none is where streaming, whose import takes seconds, is not imported."""
    streaming = sys.modules.get("streaming.base.dataset")
    return streaming is not None and isinstance(dataset, streaming.StreamingDataset)


MDS = SourceType(_accepts, MdsSource)
