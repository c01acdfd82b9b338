"""The folders of a StreamingDataset's streams, and which of their files are copies of a remote's."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infobatch_stream.errors import ConfigError
from infobatch_stream.sources.mds.remote_index import checksum_of, is_same_index, is_url, local_dir, shards_of, stamp_of

if TYPE_CHECKING:
    from streaming import Stream, StreamingDataset

__all__ = ["Copies", "fix_folders"]


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

    folders = [local_dir(stream) for stream in dataset.streams]
    then = [Path(folder) for folder in _unpack_locals(bytes(dataset._locals_shm.buf))[0]]  # absolute
    now = Path.cwd()
    if len(then) != len(folders) or all(folder.is_absolute() for folder in folders):  # a copy's deletion clears them
        _check_relative_remotes(dataset)
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


def _check_relative_remotes(dataset: "StreamingDataset") -> None:
    """Raise ConfigError if relative remotes may not be those below the working folder, as no path of a local tells.

    They are, if that has never changed. Else an equal index.json proves it, if it has checksums of the shards.
    """
    now, began = Path.cwd(), Path(os.environ.get("PWD", "."))
    if began.exists() and began.samefile(now):
        return
    for stream, shards in zip(dataset.streams, shards_of(dataset), strict=True):
        if _is_relative(stream.remote) and not (is_same_index(stream) and checksum_of(shards)):
            raise ConfigError(
                f"remote={stream.remote!r} is relative to a working folder, and nothing tells to which: this process "
                f"began in {began}, and is in {now} now. Give an absolute path where the StreamingDataset is made, "
                f"remote=str(Path({stream.remote!r}).absolute())."
            )


def _is_relative(path: str | None) -> bool:
    return bool(path) and not is_url(str(path)) and not Path(str(path)).is_absolute()


class Copies:
    """Which of the files on this machine can come again from a remote. Others are never removed.

    fetchable: bool per stream, whether what it has here are copies at all. They are not without a remote; where the
    remote is the same folder, also by a link or a mount; and where another such stream has the same folder.
    """

    def __init__(self, dataset: "StreamingDataset") -> None:
        places = [local_dir(stream).resolve() for stream in dataset.streams]
        only = {place for place, stream in zip(places, dataset.streams, strict=True) if not _is_elsewhere(stream)}
        self.fetchable: list[bool] = [place not in only for place in places]
        self._streams = dataset.streams
        self._stream_of: list[int] = dataset.stream_per_shard.tolist()
        self._shards = dataset.shards

    def is_copy(self, shard: int) -> bool:
        """Whether the files of ``shard`` are copies."""
        return self.fetchable[self._stream_of[shard]]

    def can_come_again(self, shard: int) -> bool:
        """Whether ``shard`` may be removed here: a remote that is a folder has it; of a bucket it is believed."""
        if not self.is_copy(shard):
            return False
        stream = self._streams[self._stream_of[shard]]
        if is_url(str(stream.remote)):
            return True
        for source, here, size in _sources(stream, self._shards[shard]):
            found = stamp_of(source)
            if found is None or found[0] != size or source.resolve() == here:  # a link to what would be removed
                return False
        return True

    def are_linked(self, stream: "Stream", shards: list[Any]) -> bool:
        """Whether the remote of ``stream`` is a folder of links to compressed files of its shards that are here."""
        if not stream.remote or is_url(stream.remote):
            return False
        packed = (shard for shard in shards if shard.compression)
        return any(source.resolve() == here for shard in packed for source, here, _ in _sources(stream, shard))


def _sources(stream: "Stream", shard: Any) -> Iterator[tuple[Path, Path, int]]:
    """For each file that is fetched for ``shard``, from a folder: its path, where it comes to, and its bytes."""
    here = local_dir(stream).resolve()
    for raw, packed in shard.file_pairs:
        file = packed or raw
        yield Path(stream.remote or "", stream.split, file.basename), here / file.basename, file.bytes


def _is_elsewhere(stream: "Stream") -> bool:
    """Whether what ``stream`` has here is a copy of what is at its remote."""
    if not stream.remote or is_url(stream.remote):
        return bool(stream.remote)
    try:
        return not Path(stream.remote, stream.split).samefile(local_dir(stream))
    except OSError:  # one of them is not there
        return True
