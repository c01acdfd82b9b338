"""Samples of MDS shards from files that stay open: streaming itself opens a shard's file for each sample."""

from bisect import bisect_right
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import pairwise
from threading import Lock, get_ident
from time import time_ns
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from infobatch_stream._process_wide import at_fork_in_child
from infobatch_stream.errors import DataError
from infobatch_stream.formats.mds_samples import BOUNDS, Frame, bounds_at
from infobatch_stream.sources.per_process import PerProcess
from infobatch_stream.sources.remote.ranges import Held
from infobatch_stream.sources.shard_file import MOST_OPEN, ShardFile

if TYPE_CHECKING:
    from streaming import StreamingDataset

__all__ = ["MdsFiles", "MdsReading"]


_LENDING = Lock()  # held while a `_Lent` comes or goes
at_fork_in_child(lambda: _LENDING.release() if _LENDING.locked() else None)  # by a thread that is not there

_SMALL = 2**14  # bytes of samples that are read together
_TABLE = 500  # entries of the table of bounds that are read in the time of one read

_Turned = tuple[int, int, ShardFile, Any, Frame]  # first sample and end of a shard, and what reads it


class MdsFiles(PerProcess):
    """Which shards of ``dataset`` can be read from open files, and those that are open in this process.

    A shard whose reader is not streaming's own MDSReader in all that finds the bytes of a sample goes the old way;
    and so does the whole of a dataset that has a ``get_item`` of its own. If it decodes in its own way, it does so.

    held: the bytes of samples whose shards are still to come.

    direct: whether ``dataset[index]`` is nothing but its ``get_item``. only_streamings: whether it runs no code but
    streaming's.
    """

    _own = "open", "held"

    def __init__(self, dataset: "StreamingDataset") -> None:
        from streaming import StreamingDataset
        from streaming.base.array import Array
        from streaming.base.format.mds.encodings import mds_decode
        from streaming.base.format.mds.reader import MDSReader

        own = vars(dataset).get("get_item")
        ours = type(dataset).get_item is StreamingDataset.get_item and (own is None or isinstance(own, _Lent))
        self.shards = [ours and _is(reader, MDSReader) for reader in dataset.shards]
        self.frames = [_frame(tuple(getattr(reader, "column_sizes", ()))) for reader in dataset.shards]
        self._usual = MDSReader.decode_sample
        self._decode_value = mds_decode
        self.direct = ours and type(dataset).__getitem__ is Array.__getitem__
        self.only_streamings = self.direct and all(
            type(reader) is MDSReader and "pkl" not in reader.column_encodings for reader in dataset.shards
        )
        # An evicted shard takes room on the disk as long as it is open. So under a limit none is open between batches.
        self.keep = not dataset.cache_limit
        self._renew()

    def decode(self, reader: Any, frame: Frame, file: ShardFile, begin: int, end: int) -> Any:
        """The sample in the bytes begin..end-1 of ``file``, which ``reader`` reads; ``frame``: that of its samples."""
        source, at = file.view(begin, end - begin)
        if not self.decodes_as_usual(reader):
            return reader.decode_sample(source[at : at + end - begin])
        # As MDSReader.decode_sample, which would need a copy of the sample to copy its values from.
        try:
            ends = frame.ends(source, at, end - begin)
        except ValueError as error:
            raise _damaged(file, str(error)) from error
        columns = zip(reader.column_names, reader.column_encodings, pairwise(ends), strict=True)
        return {name: self._decode_value(encoding, source[start:stop]) for name, encoding, (start, stop) in columns}

    def decodes_as_usual(self, reader: Any) -> bool:
        """Whether ``reader`` decodes as streaming does."""
        return type(reader).decode_sample is self._usual

    def decode_each(self, reader: Any, values: list[list[bytes]]) -> list[Any]:
        """Samples of their ``values``, which ``reader`` would decode."""
        names, decode = reader.column_names, self._decode_value
        if reader.column_encodings == ["bytes"]:
            (name,) = names
            return [{name: value} for (value,) in values]
        return [dict(zip(names, map(decode, reader.column_encodings, sample), strict=True)) for sample in values]

    def _renew(self) -> None:
        self.open = lru_cache(MOST_OPEN)(ShardFile)
        self.held = Held()

    def holding(self, samples: dict[int, bytes], shards: dict[int, int]) -> AbstractContextManager[None]:
        """Within, ``samples`` are held, of ``shards``, both by index. Raises ValueError for one that is damaged."""
        for index, data in samples.items():
            self.frames[shards[index]].ends(data, 0, len(data))  # streaming would not look
        return self.held.holding(samples)


_frame = lru_cache(64)(Frame)  # one for all shards of equal columns


def _is(reader: Any, kind: Any) -> bool:
    """Whether ``reader`` finds the bytes of a sample as ``kind`` does."""
    names = ("__getitem__", "get_item", "get_sample_data")
    return all(getattr(type(reader), name, None) is getattr(kind, name) for name in names)


class MdsReading:
    """A batch being read, shard by shard; a context manager.

    `get` gives a sample as ``dataset[index]``. If the user has a ``__getitem__`` of his own, the dataset has, until
    the last context ends, a `_Lent` as its attribute ``get_item``, which is what ``super().__getitem__`` calls. It
    gives the same samples. It does not stay, so that a dataset that is pickled, copied or read elsewhere is the user's
    own. Several threads may each read a batch of one dataset.
    """

    get: Callable[[int], Any]

    def __init__(self, dataset: "StreamingDataset", files: MdsFiles) -> None:
        self._dataset = dataset
        self._files = files
        self._turned: _Turned | None = None
        self._lent: _Lent | None = None
        self._before: MdsReading | None = None  # within which this one is, in the same thread

    def __enter__(self) -> Self:
        """Nothing is open yet."""
        self.get = self.get_item if self._files.direct else self._dataset.__getitem__
        if not self._files.direct and any(self._files.shards):
            with _LENDING:
                self._lent = vars(self._dataset).setdefault("get_item", _Lent(self._dataset))
                self._before = self._lent.begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The dataset is as it was."""
        if self._lent is not None:
            with _LENDING:
                if not self._lent.end(self._before):
                    vars(self._dataset).pop("get_item", None)
        del self.get  # else a cycle of references would keep the files open
        self._turned = None
        if not self._files.keep:
            self._files.open.cache_clear()

    def turn_away(self) -> None:
        """From now on samples of no shard that is here are wanted."""
        self._turned = None

    def turn_to(self, shard: int, path: str, stamp: tuple[int, int]) -> None:
        """From now on samples of ``shard`` are wanted, whose file at ``path`` has ``stamp`` (see `ShardFile`)."""
        self._turned = None
        if not self._files.shards[shard]:
            return
        try:
            file = self._files.open(path, stamp)
        except DataError:  # evicted, or replaced, just now: the dataset's own get_item downloads it again
            return
        dataset = self._dataset
        dataset._shard_access_times[shard] = time_ns()  # or it would be the first to be evicted
        low = int(dataset.sample_offset_per_shard[shard])
        reader = dataset.shards[shard]
        self._turned = low, low + reader.samples, file, reader, self._files.frames[shard]

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """What ``StreamingDataset.get_item`` gives. Raises DataError if the shard is cut short or damaged."""
        data = self._files.held.samples.get(sample_id)
        if data is not None:
            shard = bisect_right(self._dataset.sample_offset_per_shard, sample_id) - 1
            return self._dataset.shards[shard].decode_sample(data)
        turned = self._turned  # once, for a thread may come here while another turns
        if turned is None or not turned[0] <= sample_id < turned[1]:
            return type(self._dataset).get_item(self._dataset, sample_id, retry)
        begin, end = self._bounds(sample_id, turned)
        return self._files.decode(turned[3], turned[4], turned[2], begin, end)

    def several(self, samples: NDArray[np.int64]) -> list[Any] | None:
        """The small ``samples`` of the current shard, ascending, as `get` gives each, in a third of the time.

        None where each has to be got alone: where code of the user's runs, and where one is large or cannot be read.
        """
        if self._turned is None or not self._files.direct:
            return None
        low, _, file, reader, frame = self._turned
        if not self._files.decodes_as_usual(reader):
            return None
        try:
            begins, ends = _all_bounds(file, samples - low)
            sizes = ends - begins
            if sizes.min() <= 0 or sizes.max() > _SMALL or ends.max() > file.size:
                return None
            values = frame.each(file.read_each(begins.tolist(), sizes.tolist()))
            return self._files.decode_each(reader, values)
        except Exception:  # raised again where its sample is got, which then is known
            return None

    def readahead(self, sample_id: int) -> bool:
        """Have the system read a sample of the current shard ahead; False when it is in memory already."""
        turned = self._turned
        if turned is None:
            return False
        try:
            begin, end = self._bounds(sample_id, turned)
        except DataError:  # raised again where it is read
            return False
        return turned[2].readahead(begin, end - begin)

    @staticmethod
    def _bounds(sample_id: int, turned: _Turned) -> tuple[int, int]:
        low, _, file, *_ = turned
        begin, end = BOUNDS.unpack(file.read(bounds_at(sample_id - low), BOUNDS.size))
        if not begin < end <= file.size:
            raise _damaged(file, f"sample {sample_id - low} has the bytes {begin:,} to {end:,}")
        return begin, end


class _Lent:
    """The ``get_item`` of a dataset while threads read it: that of the reading of the thread that calls it."""

    def __init__(self, dataset: "StreamingDataset") -> None:
        self._dataset = dataset
        self._readings: dict[int, MdsReading] = {}  # by thread

    def __call__(self, sample_id: int, retry: int = 7) -> Any:
        reading = self._readings.get(get_ident())
        if reading is None:  # a thread of the user's
            return type(self._dataset).get_item(self._dataset, sample_id, retry)
        return reading.get_item(sample_id, retry)

    def begin(self, reading: MdsReading) -> MdsReading | None:
        """Go to ``reading`` in this thread; the one that it went to before, within which this one is."""
        before = self._readings.get(get_ident())
        self._readings[get_ident()] = reading
        return before

    def end(self, before: MdsReading | None) -> bool:
        """Go to ``before`` again; whether it is still used."""
        if before is None:
            del self._readings[get_ident()]
        else:
            self._readings[get_ident()] = before
        return bool(self._readings)

    def __getstate__(self) -> dict[str, Any]:
        """Without the readings, which are of this process."""
        return {"_dataset": self._dataset, "_readings": {}}


def _all_bounds(file: ShardFile, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the samples ``rows``, ascending, begin and end in ``file``."""
    first, count = int(rows[0]), int(rows[-1] - rows[0]) + 1
    if count > _TABLE * rows.size:
        parts = file.read_each([bounds_at(row) for row in rows.tolist()], [BOUNDS.size] * rows.size)
        table = np.frombuffer(b"".join(parts), "<u4").astype(np.int64).reshape(-1, 2)
        return table[:, 0], table[:, 1]
    table = np.frombuffer(file.read(bounds_at(first), 4 * (count + 1)), "<u4").astype(np.int64)
    return table[rows - first], table[rows - first + 1]


def _damaged(file: ShardFile, what: str) -> DataError:
    return DataError(
        f"Shard {file.path} is damaged: it says that {what}. If a remote has it, delete the file to have it "
        "downloaded again; else restore it from a copy, or convert the data anew."
    )
