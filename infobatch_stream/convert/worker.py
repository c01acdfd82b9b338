"""One task of a conversion: some samples become a shard, in a folder of its own. This runs in worker processes."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from infobatch_stream.convert.reencode import Reencoder
from infobatch_stream.convert.shard_plan import Task
from infobatch_stream.convert.writers import (
    MdsShardWriter,
    ShardFormat,
    ShardWriter,
    TarShardWriter,
    TooLargeError,
    WrittenShard,
)
from infobatch_stream.errors import DataError
from infobatch_stream.formats.schema import KEY, Column, Sample, SampleSet

_THREADS = 8  # that read files, for each process that writes
_CHUNK = 1 << 19  # bytes that one of them reads at a time, about

__all__ = ["Job", "Target", "TaskResult", "add", "read", "write_task"]


@dataclass(frozen=True)
class Target:
    """The shards that are wanted. compression, hashes: of MDS, as MDSWriter takes them."""

    format: ShardFormat
    shard_bytes: int
    compression: str | None = None
    hashes: Sequence[str] = ("xxh64",)

    @contextmanager
    def writer(self, folder: Path, columns: Mapping[str, Column], first: int = 0) -> Iterator[ShardWriter]:
        """A writer into the empty ``folder``, which completes its last shard at the end, and not after an error.

        first: the number of its first sample.
        """
        writer: ShardWriter
        if self.format is ShardFormat.MDS:
            writer = MdsShardWriter(folder, columns, self.shard_bytes, self.compression, self.hashes)
        else:
            writer = TarShardWriter(folder, columns, self.shard_bytes, first)
        try:
            yield writer
            writer.close()
        except BaseException:
            writer.abort()
            raise

    def index(self, shard: Path) -> None:
        """Make the index of a complete ``shard`` beside it, if it is a tar."""
        if self.format is ShardFormat.WDS:
            from infobatch_stream.formats.tar_index import TarIndex

            TarIndex.build(str(shard), checksum=True).save(self.companions(shard)[0])

    def companions(self, shard: Path) -> list[Path]:
        """The files that go with ``shard``."""
        if self.format is ShardFormat.MDS:
            return []
        return [shard.with_name(f"{shard.name}.index.npz")]  # a rename keeps size and mtime, so it stays fresh


@dataclass(frozen=True)
class Job:
    """What all tasks of a conversion share.

    src: as the user calls the source. skip: pass over samples that cannot be read, instead of raising.
    """

    src: str
    sets: Sequence[SampleSet]
    target: Target
    reencoder: Reencoder | None
    skip: bool


@dataclass(frozen=True)
class TaskResult:
    """A finished task: its shards, which lie in the folder ``folder`` of scratch, and why samples were passed over."""

    folder: str
    shards: list[WrittenShard]
    problems: list[str]


def write_task(job: Job, scratch: Path, task: Task) -> TaskResult:
    """Write the shards of ``task`` into a new folder below ``scratch``.

    Raises DataError and TooLargeError (of a sample, unless those are passed over), ConfigError, OSError.
    """
    folder = scratch / f"task-{task.number:06d}"
    folder.mkdir()
    source = job.sets[task.part]
    problems = list(task.gone)
    with job.target.writer(folder, source.columns, task.first) as writer:
        for sample, place in _read_all(job, source, task.positions.tolist()):
            try:
                if isinstance(sample, DataError):
                    raise sample
                add(writer, source.columns, sample, place)
            except (DataError, TooLargeError) as error:
                if not job.skip:
                    raise
                problems.append(str(error))
    for shard in writer.finished:
        job.target.index(folder / shard.file)
    return TaskResult(folder.name, writer.finished, problems)


_Read = tuple[Sample | DataError, str]


def _read_all(job: Job, source: SampleSet, positions: list[int]) -> Iterator[_Read]:
    """Each sample, or why it cannot be read, and its place. Files are read a few ahead, by threads."""
    if not source.in_files:
        yield from (read(job, source, position) for position in positions)
        return
    mean = job.target.shard_bytes // max(1, len(positions)) + 1
    some = min(max(1, _CHUNK // mean), 64)

    def read_some(at: int) -> list[_Read]:
        return [read(job, source, position) for position in positions[at : at + some]]

    with ThreadPoolExecutor(_THREADS) as threads:
        waiting: deque[Future[list[_Read]]] = deque()
        for at in range(0, len(positions), some):
            waiting.append(threads.submit(read_some, at))
            if len(waiting) > 2 * _THREADS:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def read(job: Job, source: SampleSet, position: int) -> _Read:
    """A sample, or why it cannot be read, and its place."""
    row = getattr(source, "where", None)  # of tables
    place = f"sample {position:,}" if row is None else row(position)
    try:
        sample = source[position]
        names = (sample.get("name"), sample.get(KEY), place) if row is None else (place,)
        place = next(name for name in names if isinstance(name, str) and name)
        if job.reencoder is not None:
            try:
                sample = job.reencoder(sample, source.columns)
            except DataError as error:
                return DataError(f"{place if row else f'{job.src}: {place}'}: {error}"), place
    except DataError as error:
        return error, place
    except OSError as error:  # of the source; one of the destination ends it all
        return DataError(str(error)), place
    return sample, place


def add(writer: ShardWriter, columns: Mapping[str, Column], sample: Sample, place: str) -> None:
    """Write a sample, found at ``place``. Raises DataError if it does not fit the columns, or TooLargeError."""
    if sample.keys() != columns.keys():
        raise DataError(f"{place} has the fields {sorted(sample)}; the columns are {sorted(columns)}.")
    try:
        writer.write(sample)
    except TooLargeError as error:
        raise TooLargeError(error.size, error.limit, place) from None
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        raise DataError(f"{place} does not fit the columns: {error}") from error
