"""Checks of tars as webdataset reads them, and of their indexes."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from io import BufferedReader, FileIO
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from infobatch_stream.errors import DataError
from infobatch_stream.sources.tar_headers import TarError, read_members
from infobatch_stream.sources.tar_index import TarIndex, is_fresh, load_index

from .duplicates import digest, key_digest
from .findings import Checked, Checks, Findings, Severity
from .streams import BLOCK, blocks_of
from .values import Check, tar_check

__all__ = ["TarShard"]

_RECORD = 512
_END = 2 * _RECORD  # bytes of zeros that end a tar


@dataclass(frozen=True)
class TarShard:
    """A tar: the local file, what to call it, and how many classes its labels (``cls``) may be of.

    aside: extensions that are no part of a sample's content.
    """

    path: str
    name: str
    classes: int | None = None
    aside: tuple[str, ...] = ()

    def check(self, checks: Checks) -> Checked:
        """Everything that can be wrong with this shard."""
        findings = Findings(self.name)
        try:
            index = TarIndex.build(self.path)
            with Path(self.path).open("rb") as file:
                self._check_end(index, findings)
                indexed = self._check_index(index, findings)
                self._check_members(checks.columns, index, findings)
                contents = self._contents(file, index, checks, findings)
        except (DataError, TarError, OSError) as error:
            findings.error(str(error))
            return Checked(findings)
        text, bounds = index.key_text.tobytes(), index.key_bounds.tolist()
        keys = b"".join(key_digest(text[begin:end]) for begin, end in pairwise(bounds))
        return Checked(findings, len(index), index.stamp[0], contents, keys, indexed)

    def key(self, row: int) -> str | None:
        """The key of a sample, if the shard can still be read."""
        try:
            return TarIndex.build(self.path).key(row)
        except DataError:
            return None

    def _check_end(self, index: TarIndex, findings: Findings) -> None:
        """Behind the last member there must be two records of zeros, and nothing else."""
        size, last = index.stamp[0], int(index.offset[-1] + index.length[-1]) if index.offset.size else 0
        begin = -(-last // _RECORD) * _RECORD
        with _Rest(FileIO(self.path), begin) as file:
            if size - begin >= _RECORD:
                for _ in read_members(file, size - begin):  # folders, and members that are in no sample
                    pass
            end = begin + file.last
            if size - end < _END:
                findings.error(
                    f"it has no end: two records of zeros are missing at byte {end:,}, so it was probably cut off "
                    "between two members; copy or write it again"
                )
            file.seek(file.last)
            if any(block.count(0) < len(block) for block in blocks_of(file)):
                findings.error(
                    f"behind its end, in the {size - end:,} bytes from {end:,} on, there is something that nothing "
                    "reads, another tar for example; write it again"
                )

    def _check_index(self, index: TarIndex, findings: Findings) -> bool:
        """Compare the index that is kept with one just made; whether there is one."""
        if not is_fresh(self.path):
            stale = Path(f"{self.path}.index.npz").exists()
            if stale:
                findings.error(
                    "its index is stale or damaged: it is of another size, time or format; renew it with "
                    "infobatch-stream index"
                )
            return stale
        kept = load_index(self.path)
        names = [field.name for field in fields(TarIndex) if field.name not in ("header", "probe")]
        differ = [name for name in names if not np.array_equal(getattr(kept, name), getattr(index, name))]
        what = f"{', '.join(differ)} differ" if differ else kept.differs_from(Path(self.path))
        if what:
            findings.error(
                f"it is not what was indexed ({what}), though size and time are; restore it, or index it again"
            )
        return True

    def _check_members(self, columns: tuple[str, ...], index: TarIndex, findings: Findings) -> None:
        rows = np.repeat(np.arange(len(index)), np.diff(index.sample_bounds))
        for wanted in columns:
            has = np.zeros(len(index), bool)
            if wanted in index.extensions:
                has[rows[index.extension == index.extensions.index(wanted)]] = True
            if len(index) and not has.any():
                findings.error(f"none of its {len(index):,} samples has {wanted!r}, but {_names(index.extensions)}")
                continue
            missing = np.flatnonzero(~has).tolist()
            findings.add_rows(Severity.ERROR, missing, f"it has no {wanted!r}", index.key)
        empty = rows[index.length == 0].tolist()
        findings.add_rows(Severity.WARNING, empty, "a member of it is empty", index.key)

    def _contents(self, file: BinaryIO, index: TarIndex, checks: Checks, findings: Findings) -> bytes:
        """Decode what can be decoded, if that is asked for; a digest of each sample, likewise."""
        if not (checks.decode or checks.contents):
            return b""
        decoders = {name: tar_check(name) if checks.decode else None for name in index.extensions}
        compared = set(checks.columns or index.extensions).difference(() if checks.columns else self.aside)
        compares = checks.contents and compared <= set(index.extensions)  # what is missing is an error, and no content
        digests = []
        for row in range(len(index)):
            values = []
            for name, offset, length in sorted(index.members(row)):
                decoder = decoders[name]
                blocks = partial(_blocks, file, offset, length)
                if decoder is not None:
                    data = b"".join(blocks())
                    self._decode(name, decoder, data, row, index, findings)
                    blocks = partial(iter, [data])
                if name in compared:
                    values.append((length, blocks))
            if compares:
                digests.append(digest((length, blocks()) for length, blocks in values))
        return b"".join(digests)

    def _decode(self, name: str, decoder: Check, data: bytes, row: int, index: TarIndex, findings: Findings) -> None:
        try:
            value = decoder(data)
        except Exception as error:  # decoders raise nearly anything
            findings.error(f"its {name!r} cannot be decoded ({type(error).__name__}: {error})", row, index.key(row))
            return
        if name == "cls" and self.classes is not None and not 0 <= value < self.classes:
            what = f"its label is {value}, classes.json names {self.classes:,} classes"
            findings.error(what, row, index.key(row))


class _Rest(BufferedReader):
    """A file from the byte ``begin`` on. last: where it was last sent to."""

    def __init__(self, file: FileIO, begin: int) -> None:
        super().__init__(file)
        self._begin, self.last = begin, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self.last = offset
        return super().seek(self._begin + offset, whence)


def _blocks(file: BinaryIO, offset: int, length: int) -> Iterator[bytes]:
    file.seek(offset)
    while length and (block := file.read(min(length, BLOCK))):
        length -= len(block)
        yield block


def _names(extensions: list[str]) -> str:
    return ", ".join(map(repr, sorted(extensions)))
