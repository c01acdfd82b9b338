"""The local shards of a StreamingDataset: whether they are whole, and the download of the others."""

import os
import threading
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from infobatch_stream.errors import DataError
from infobatch_stream.sources.mds.downloader import Attempts
from infobatch_stream.sources.mds.eviction import Eviction, bytes_for_copies
from infobatch_stream.sources.mds.files import LocalFiles
from infobatch_stream.sources.mds.folders import Copies
from infobatch_stream.sources.mds.remote_index import Indexes, checksum_of, shards_of
from infobatch_stream.sources.mds.states import States
from infobatch_stream.sources.per_process import PerProcess
from infobatch_stream.sources.remote.retry import advice, back_off, cause_of, is_lasting, is_silence
from infobatch_stream.sources.remote.single_flight import lock_path, single_flight
from infobatch_stream.sources.shard_file import changed

if TYPE_CHECKING:
    from streaming import StreamingDataset

__all__ = ["MdsCache"]

_ATTEMPTS = 3  # a shard may be evicted between its download and its use, when the cache limit is tight


class MdsCache(PerProcess):
    """Downloads shards, with the dataset's own downloader, so that nobody waits for ever and nothing bad is read.

    StreamingDataset waits for ever on a shard whose download failed or was killed in any process, accepts a file that
    failed its checksum before, and retries what cannot succeed. Here one process downloads (see `single_flight`),
    retries only what may pass, and leaves nothing behind when it fails.

    Files that are no copies (see `Copies`) are never removed. For that the dataset gets an `Eviction`, and its streams
    keep what they decompress. Where ``index.json`` has checksums and the user chose none, the streams get one to
    validate by. Otherwise the dataset stays as it is. Usable from several threads, and in each process that it is
    passed to.
    """

    _own = ("_alone",)

    def __init__(self, dataset: "StreamingDataset") -> None:
        self._dataset = dataset
        self._streams = np.asarray(dataset.stream_per_shard).tolist()
        self._copies = Copies(dataset)
        self._fetchable = self._copies.fetchable
        self._room = bytes_for_copies(dataset, self._copies)
        self._files = LocalFiles(dataset, self._copies)
        self._states = States(dataset, self._files)
        self._indexes = Indexes(dataset, self._fetchable)
        for number, (stream, shards) in enumerate(zip(dataset.streams, shards_of(dataset), strict=True)):
            stream._downloader.clean_up()  # it has connected for index.json, perhaps, and others do: see Attempts
            if not self._fetchable[number] or self._copies.are_linked(stream, shards):
                stream.safe_keep_zip = True
            if self._fetchable[number] and stream.validate_hash is None:
                stream.validate_hash = checksum_of(shards)
            if self._may_come(number):
                self._indexes.check(number)
        if dataset.cache_limit:
            vars(dataset)["_evict_coldest_shard"] = Eviction(dataset, self._copies)
        self._trusted: dict[int, tuple[int, int]] = {}  # the stamp of each shard that was found sound
        self._stamps: dict[int, tuple[int, int]] = {}  # of shards that are no copies, when they were first seen
        self._attempts = Attempts(dataset)
        self._renew()

    def _renew(self) -> None:
        # Under a limit a process downloads one shard at a time: streaming counts only what has come.
        self._alone: AbstractContextManager[Any] = threading.Lock() if self._dataset.cache_limit else nullcontext()

    @property
    def is_remote(self) -> bool:
        """Whether some shard may have to be downloaded."""
        return any(map(self._may_come, range(len(self._fetchable))))

    def _may_come(self, stream: int) -> bool:
        """Whether some shard of ``stream`` may; under a limit any that is here may be removed before."""
        return self._fetchable[stream] and (bool(self._dataset.cache_limit) or not self._states.are_local(stream))

    @property
    def capacity(self) -> int | None:
        """How many shards fit under the dataset's cache_limit at least; None without a limit."""
        if self._room is None:
            return None
        largest = max(shard.get_max_size() for shard in self._dataset.shards)
        return sum(not self._fetchable[stream] for stream in self._streams) + self._room // max(1, largest)

    def check_local(self) -> None:
        """Raise DataError if a shard that nobody can download is cut short."""
        for number, stream in enumerate(self._streams):
            if not self._fetchable[stream]:
                self._here(number)

    def is_local(self, shard: int) -> bool:
        """Whether StreamingDataset takes ``shard`` to be local."""
        return self._states.is_local(shard)

    def path(self, shard: int) -> str:
        """Where its first file lies, or will lie."""
        return str(self._files[shard][0][0])

    def ensure_local(self, shard: int) -> tuple[int, int]:
        """Return when the files of ``shard`` are local and whole: size and modification time of the last.

        Raises DataError, with the url, when they cannot be had.
        """
        for _ in range(_ATTEMPTS):
            if not self._copies.is_copy(shard):
                self._states.wait(shard)
                if stamp := self._here(shard):
                    return stamp
                self._fetch(shard)
            elif self.is_local(shard) and (stamp := self._here(shard)) and self._is_sound(shard, stamp):
                self._trusted[shard] = stamp
                return stamp
            else:
                self._fetch_locked(shard)
        if stamp := self._here(shard):
            return stamp
        raise DataError(
            f"{self._files.name(shard)} is not there, though it was downloaded {_ATTEMPTS} times: a cache_limit that "
            "is too small evicts it before it is read. Raise the cache_limit of the StreamingDataset."
        )

    def look_after(self, shard: int, error: Exception) -> DataError | None:
        """What to raise for ``error``, met in reading ``shard``, if StreamingDataset was downloading it again.

        It does so by itself for a shard that was evicted since it was downloaded. None when ``error`` is not of that.
        """
        unsound = str(error).startswith("Checksum failure")
        try:
            if not unsound and self._here(shard):
                return None
        except DataError as failure:
            return failure
        theirs = isinstance(error, FileNotFoundError | RuntimeError) and not isinstance(error, DataError)
        if not (unsound or theirs or self._states.is_preparing(shard)):
            return None
        if self._copies.is_copy(shard):
            with (
                suppress(DataError, OSError),
                single_flight(self._files[shard][0][0]),
            ):  # no process of ours downloads it
                self._states.let_go(shard)
        else:
            self._states.let_go(shard)
        return self._failure(shard, error, 1)

    def _is_sound(self, shard: int, stamp: tuple[int, int]) -> bool:
        """Whether its files can be trusted: nobody is making them, nor was when killed. stamp: theirs."""
        return self._trusted.get(shard) == stamp or not lock_path(self._files[shard][0][0]).exists()

    def _here(self, shard: int) -> tuple[int, int] | None:
        """Size and modification time of the last file; None if one is not there (if it can be downloaded: whole).

        Raises DataError for a file that is cut short and cannot be downloaded again.
        """
        stamp = None
        for file, size in self._files[shard]:
            try:
                stat = file.stat()
                if stat.st_size != size:
                    if self._states.is_preparing(shard):  # another process began to download it just now
                        return None
                    stat = file.stat()  # or has finished since
            except FileNotFoundError:
                return None
            if stat.st_size != size:
                if self._copies.is_copy(shard):
                    return None
                raise DataError(
                    f"{self._files.name(shard)} has {stat.st_size:,} bytes, its index.json says {size:,}: it is "
                    "truncated or of another dataset. Restore it from a copy, or convert the data anew."
                )
            stamp = size, stat.st_mtime_ns
        if stamp and not self._copies.is_copy(shard) and stamp != self._stamps.setdefault(shard, stamp):
            raise changed(str(file))
        return stamp

    # Downloading -------------------------------------------------------------------------------------------------

    def _fetch_locked(self, shard: int) -> None:
        try:
            with single_flight(self._files[shard][0][0]) as broken:
                if broken:
                    self._states.let_go(shard)
                self._states.wait(shard)
                if self._states.is_local(shard) and not broken and self._here(shard):
                    return  # another process downloaded it while we waited
                with nullcontext() if broken else self._files.put_aside(shard):
                    self._states.discard(shard, broken)
                    self._fetch(shard)
        except OSError as error:
            raise self._failure(shard, error, 0) from error

    def _fetch(self, shard: int) -> None:
        """Download ``shard``, with pauses that double between attempts.

        There are as many as StreamingDataset and botocore make together: three for each of the user's download_retry;
        but only one for each after a silence, which takes download_timeout every time.
        """
        rounds = max(1, int(self._dataset.streams[self._streams[shard]].download_retry or 0))
        for attempt in range(1, 3 * rounds + 1):
            try:
                with self._alone:
                    self._prepare(shard)
            except DataError:
                raise
            except Exception as error:
                last = attempt >= (rounds if is_silence(error) else 3 * rounds)
                if last or not self._copies.is_copy(shard) or is_lasting(error):
                    raise self._failure(shard, error, attempt) from error
            else:
                return
            back_off(attempt)

    def _prepare(self, shard: int) -> None:
        """Have StreamingDataset download and check ``shard``, once. If that fails, its files are removed."""
        stream = self._streams[shard]
        attempt = self._attempts.single(stream)
        try:
            if is_missing := self._copies.is_copy(shard) and self._files.is_missing(shard):
                self._indexes.check(stream)
            attempt.prepare_shard(shard, blocking=False)
            self._states.wait(shard)  # should streaming itself have been quicker
            if self._copies.is_copy(shard):
                self._check(shard, is_missing)
                self._attempts.delivered(stream)
        except BaseException:
            lock = getattr(attempt, "_cache_filelock", None)
            if lock is not None:
                lock.release(force=True)  # an eviction that failed leaves it held
            self._states.let_go(shard)
            raise

    def _check(self, shard: int, came: bool) -> None:
        """Remove ``shard``, and raise, if it is not as index.json says. came: whether it is from the remote."""
        try:
            if came:
                self._indexes.check(self._streams[shard], came)
            for file, size in self._files[shard]:
                found = file.stat().st_size if file.exists() else size  # it may be evicted again already
                if found != size:
                    raise ValueError(f"{file.name} came with {found:,} bytes, index.json says {size:,}")
        except BaseException:
            self._states.discard(shard, broken=True)
            raise

    def _failure(self, shard: int, error: Exception, attempts: int) -> DataError:
        stream = self._dataset.streams[self._streams[shard]]
        if not stream.remote:
            return DataError(
                f"{self._files.name(shard)} is missing and could not be fetched (there is no remote to take it from): "
                f"{error}. Check the path and the remote of the StreamingDataset."
            )
        raw, packed = self._dataset.shards[shard].file_pairs[0]
        url = os.path.join(stream.remote, stream.split, (packed or raw).basename)  # noqa: PTH118 - of any scheme
        tried = f" in {attempts} attempts" if attempts > 1 else ""
        what = "not whole" if self._files.is_aside(shard) else "missing"
        cause = cause_of(error)
        text = f"{type(cause).__name__}: {cause}".rstrip(". ")
        return DataError(
            f"{self._files.name(shard)} is {what} and could not be fetched from {url}{tried}: {text}. {advice(error)}"
        )
