"""The folders of a StreamingDataset's streams, and which files in them are copies of what is at a remote."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from infobatch_stream.errors import ConfigError
from infobatch_stream.sources.shard_file import changed

if TYPE_CHECKING:
    from streaming import Stream, StreamingDataset

__all__ = ["Copies", "fix_folders", "folder_of", "is_url"]


def folder_of(stream: "Stream") -> Path:
    """Where the shards of ``stream`` lie on this machine."""
    return Path(stream.local, stream.split)


def fix_folders(dataset: "StreamingDataset") -> None:
    """Make the relative paths of ``dataset`` absolute, so that they outlive a change of the working folder.

    They mean what they meant when the dataset was made. Raises ConfigError if that cannot be told any more.
    """
    if not any(_is_relative(path) for stream in dataset.streams for path in (stream.local, stream.remote)):
        return
    base = _working_folder(dataset)
    for stream in dataset.streams:
        if _is_relative(stream.local):
            stream.local = str(base / stream.local)
        if _is_relative(stream.remote):
            stream.remote = str(base / str(stream.remote))
    for number, reader in zip(dataset.stream_per_shard.tolist(), dataset.shards, strict=True):
        reader.dirname = dataset.streams[number].local


def _working_folder(dataset: "StreamingDataset") -> Path:
    """That in which the dataset was made."""
    from streaming.base.shared.prefix import _unpack_locals

    folders = [folder_of(stream) for stream in dataset.streams]
    then = [Path(folder) for folder in _unpack_locals(bytes(dataset._locals_shm.buf))[0]]  # absolute
    now = Path.cwd()
    if len(then) != len(folders):  # the deletion of a copy of the dataset has cleared them
        return now
    candidates = [now]
    for folder, absolute in zip(folders, then, strict=True):
        tail = Path(os.path.normpath(folder)).parts
        if not folder.is_absolute() and absolute.parts[-len(tail) :] == tail:
            candidates.append(Path(*absolute.parts[: -len(tail)]))
    for base in candidates:
        if [Path(os.path.normpath(base / folder)) for folder in folders] == then:
            return base
    raise ConfigError(
        "the working folder was changed between the making of the StreamingDataset and of the loader, and its folders "
        f"are relative ({', '.join(map(str, folders))}): give absolute paths as local= and remote=, for example "
        "local=str(Path('cache').absolute())."
    )


def is_url(remote: str) -> bool:
    """Whether ``remote`` is no folder of this machine."""
    return bool(urlparse(remote).scheme)  # as streaming tells them apart


def _is_relative(path: str | None) -> bool:
    return bool(path) and not is_url(str(path)) and not Path(str(path)).is_absolute()


class Copies:
    """Which of the files on this machine can come again from a remote. Others are never removed.

    fetchable: bool per stream, whether what it has here are copies at all. They are not without a remote; where the
    remote is the same folder, also by a link or a mount; and where another such stream has the same folder.
    """

    def __init__(self, dataset: "StreamingDataset") -> None:
        places = [folder_of(stream).resolve() for stream in dataset.streams]
        only = {place for place, stream in zip(places, dataset.streams, strict=True) if not _is_elsewhere(stream)}
        self.fetchable: list[bool] = [place not in only for place in places]
        self._streams = dataset.streams
        self._stream_of: list[int] = dataset.stream_per_shard.tolist()
        self._shards = dataset.shards
        indexes = [Path(stream.remote or "", stream.split, "index.json") for stream in dataset.streams]
        self._indexes = [(path, _stamp(path)) for path in indexes]

    def is_copy(self, shard: int) -> bool:
        """Whether the files of ``shard`` are copies."""
        return self.fetchable[self._stream_of[shard]]

    def can_come_again(self, shard: int) -> bool:
        """Whether ``shard`` may be removed here: a remote that is a folder has it; of a bucket it is believed."""
        if not self.is_copy(shard):
            return False
        if is_url(str(self._streams[self._stream_of[shard]].remote)):
            return True
        for source, here, size in self._sources(shard):
            found = _stamp(source)
            if found is None or found[0] != size or source.resolve() == here:  # a link to what would be removed
                return False
        return True

    def are_linked(self, stream: int) -> bool:
        """Whether the remote of ``stream`` is a folder of links to files that are here, some at least."""
        remote = self._streams[stream].remote
        if not remote or is_url(remote):
            return False
        shards = (shard for shard, of in enumerate(self._stream_of) if of == stream)
        return any(source.resolve() == here for shard in shards for source, here, _ in self._sources(shard))

    def _sources(self, shard: int) -> Iterator[tuple[Path, Path, int]]:
        """For each file that is fetched for ``shard``, from a folder: its path, where it comes to, and its bytes."""
        stream = self._streams[self._stream_of[shard]]
        here = folder_of(stream).resolve()
        for raw, packed in self._shards[shard].file_pairs:
            file = packed or raw
            yield Path(stream.remote or "", stream.split, file.basename), here / file.basename, file.bytes

    def check_remote(self, stream: int) -> None:
        """Raise DataError if the remote of ``stream``, a folder, was written anew since the dataset was opened."""
        path, stamp = self._indexes[stream]
        if stamp is not None and stamp != _stamp(path):
            raise changed(str(path))


def _is_elsewhere(stream: "Stream") -> bool:
    """Whether what ``stream`` has here is a copy of what is at its remote."""
    if not stream.remote or is_url(stream.remote):
        return bool(stream.remote)
    try:
        return not Path(stream.remote, stream.split).samefile(folder_of(stream))
    except OSError:  # one of them is not there
        return True


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and modification time of a file; None if there is none (as of a URL)."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns
