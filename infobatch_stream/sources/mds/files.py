"""The files of a StreamingDataset's shards on this machine: complete, unfinished, and put aside."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from shutil import copy2
from typing import TYPE_CHECKING

from infobatch_stream.sources.mds.folders import Copies
from infobatch_stream.sources.mds.remote_index import local_dir, stamp_of

if TYPE_CHECKING:
    from streaming import StreamingDataset

__all__ = ["LocalFiles"]

# What streaming and s3transfer put behind the name of an unfinished file. (Eight digits are more likely a user's date.)
_UNFINISHED = re.compile(r"(\.tmp)?(\.(?!\d{8})[0-9A-Fa-f]{8})?")


class LocalFiles:
    """Paths and sizes of the files of each shard; and the removal of what can come again.

    Indexed by the number of a shard: (path, bytes) of its files, decompressed.
    """

    def __init__(self, dataset: "StreamingDataset", copies: Copies) -> None:
        self._copies = copies
        streams = [dataset.streams[number] for number in dataset.stream_per_shard.tolist()]
        self._files = [
            [(local_dir(stream) / raw.basename, int(raw.bytes)) for raw, _ in shard.file_pairs]
            for stream, shard in zip(streams, dataset.shards, strict=True)
        ]
        self._packed = [
            [(local_dir(stream) / packed.basename, int(packed.bytes)) for _, packed in shard.file_pairs if packed]
            for stream, shard in zip(streams, dataset.shards, strict=True)
        ]

    def __getitem__(self, shard: int) -> list[tuple[Path, int]]:
        """(path, bytes) of the files of ``shard``."""
        return self._files[shard]

    def name(self, shard: int) -> str:
        """What messages call it."""
        return f"shard {self._files[shard][0][0]}"

    def is_packed(self, shard: int) -> bool:
        """Whether its compressed files are here, whole (by their size)."""
        stamps = [(stamp_of(file), size) for file, size in self._packed[shard]]
        return bool(stamps) and all(stamp is not None and stamp[0] == size for stamp, size in stamps)

    def is_missing(self, shard: int) -> bool:
        """Whether some of it can only be downloaded, since neither the file nor its compressed form is here."""
        files, packed = self._files[shard], self._packed[shard] or self._files[shard]  # all are compressed, or none
        return not all(file.exists() or other.exists() for (file, _), (other, _) in zip(files, packed, strict=True))

    @contextmanager
    def put_aside(self, shard: int) -> Iterator[None]:
        """Within, the local files of ``shard`` may be replaced. An error restores them: they may be the only ones."""
        pairs = [(file, _aside(file)) for file in self._all(shard) if file.exists()]
        for file, aside in pairs:
            aside.unlink(missing_ok=True)
            try:
                aside.hardlink_to(file)
            except OSError:  # a file system without them
                copy2(file, aside)
        try:
            yield
        except BaseException:
            for file, aside in pairs:
                aside.replace(file)
                aside.unlink(missing_ok=True)  # where it is that file still, replacing it does nothing
            raise
        for _, aside in pairs:
            aside.unlink(missing_ok=True)

    def is_aside(self, shard: int) -> bool:
        """Whether something that was here of ``shard`` is put aside."""
        return any(_aside(file).exists() for file in self._all(shard))

    def remove(self, shard: int, broken: bool = False) -> None:
        """Remove unfinished files of ``shard``, and finished ones that can come again, or of a ``broken`` download.

        Nothing if they are no copies.
        """
        if not self._copies.is_copy(shard):
            return
        whole = broken or self._copies.can_come_again(shard)
        for file in self._all(shard):
            if whole:
                file.unlink(missing_ok=True)
            for found in file.parent.glob(f"{escape(file.name)}.*"):
                if _UNFINISHED.fullmatch(found.name.removeprefix(file.name)):
                    found.unlink(missing_ok=True)

    def _all(self, shard: int) -> list[Path]:
        return [file for file, _ in (*self._files[shard], *self._packed[shard])]


def _aside(file: Path) -> Path:
    return file.with_name(f"{file.name}.aside")
