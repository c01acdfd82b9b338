"""Checks of tars, as webdataset reads them, and of their indexes."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from io import BufferedReader, FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from infobatch_stream.errors import DataError
from infobatch_stream.formats.shard_list import Listed
from infobatch_stream.formats.tar_grouping import is_passed_over
from infobatch_stream.formats.tar_headers import TarError, read_members
from infobatch_stream.formats.tar_index import TarIndex
from infobatch_stream.sources.webdataset.index_cache import is_fresh, load_index
from infobatch_stream.verify.checksums import BLOCK, blocks_of
from infobatch_stream.verify.diagnostics import Checked, Checks, Diagnostics, Severity
from infobatch_stream.verify.duplicates import digest, key_digest, label_code
from infobatch_stream.verify.members import Members
from infobatch_stream.verify.tar_columns import CheckedColumns
from infobatch_stream.verify.validators import Check, tar_check

__all__ = ["TarShard"]

_RECORD = 512
_END = 2 * _RECORD  # bytes of zeros that end a tar
_LABEL = 1 << 12  # bytes of a label, at most


@dataclass(frozen=True)
class TarShard:
    """A tar: its path, the number of classes that its labels (``cls``) may have, and its columns.

    listed: what a list of the shards says of it.
    """

    name: str
    classes: int | None = None
    columns: CheckedColumns = field(default_factory=CheckedColumns)
    listed: Listed | None = None

    def check(self, checks: Checks) -> Checked:
        """Check this shard for everything that can be wrong with it."""
        diagnostics = Diagnostics(self.name)
        try:
            index = TarIndex.build(self.name)
            with Path(self.name).open("rb") as file:
                self._check_end(index, diagnostics)
                self._check_listed(index, diagnostics)
                indexed = self._check_index(index, diagnostics)
                self._check_members(checks.columns, index, diagnostics)
                self.columns.check_first(
                    index, lambda offset, length: b"".join(_blocks(file, offset, length)), diagnostics
                )
                contents, labels = self._contents(file, index, checks, diagnostics)
        except (DataError, TarError, OSError) as error:
            diagnostics.error(str(error))
            return Checked(diagnostics, readable=False)
        text, bounds = index.key_text.tobytes(), index.key_bounds.tolist()
        keys = b"".join(key_digest(text[begin:end]) for begin, end in pairwise(bounds))
        members = Members.of(index, self.columns.owned(index.extensions))
        return Checked(diagnostics, len(index), index.stamp[0], contents, labels, keys, indexed, members=members)

    def key(self, row: int) -> str | None:
        """The key of a sample, if the shard can still be read."""
        try:
            return TarIndex.build(self.name).key(row)
        except DataError:
            return None

    def _check_end(self, index: TarIndex, diagnostics: Diagnostics) -> None:
        """Check that all members are in samples, and that after the last there are only zeros, two records at least."""
        size = index.stamp[0]
        links: list[str] = []
        with _Walked(FileIO(self.name)) as file:
            names = (member.name for member in read_members(file, size, links.append))
            aside = list(filter(is_passed_over, names))
            end = file.last
            if size - end < _END:
                diagnostics.error(
                    f"it has no end: two records of zeros are missing at byte {end:,}, so it was probably cut off "
                    "between two members; copy or write it again"
                )
            file.seek(end)
            if any(block.count(0) < len(block) for block in blocks_of(file)):
                diagnostics.error(
                    f"behind its end, in the {size - end:,} bytes from {end:,} on, there is something that nothing "
                    "reads, another tar for example; write it again"
                )
        if links:
            diagnostics.error(
                f"{len(links):,} of its members are links, the first {links[0]!r}: WebDataset reads no links, so their "
                "samples lack them; write the tar again with the files themselves (GNU tar: -h --hard-dereference)"
            )
        if aside:
            what = f"{len(aside):,} of its members are in no sample, the first {aside[0]!r}: WebDataset passes over a"
            diagnostics.add(Severity.NOTE, f"{what} name without an extension, or that begins with a dot")
        if not len(index):
            diagnostics.add(Severity.WARNING, "it holds no sample")

    def _check_listed(self, index: TarIndex, diagnostics: Diagnostics) -> None:
        if self.listed is None:
            return
        for found, expected, what in (
            (index.stamp[0], self.listed.size, "bytes"), (len(index), self.listed.samples, "samples")
        ):  # fmt: skip
            if expected is not None and found != expected:
                diagnostics.error(
                    f"it has {found:,} {what}, {self.listed.place} says {expected:,}: it was changed, or is of another "
                    "dataset; fetch or write it again"
                )

    def _check_index(self, index: TarIndex, diagnostics: Diagnostics) -> bool:
        """Compare the saved index with one just built; returns whether there is a saved one."""
        if not is_fresh(self.name):
            stale = Path(f"{self.name}.index.npz").exists()
            if stale:
                diagnostics.error(
                    "its index is stale or damaged: it is of another size, time or format; renew it with "
                    "infobatch-stream index"
                )
            return stale
        kept = load_index(self.name)
        names = [field.name for field in fields(TarIndex) if field.name not in ("header", "probe")]
        differ = [name for name in names if not np.array_equal(getattr(kept, name), getattr(index, name))]
        what = f"{', '.join(differ)} differ" if differ else kept.differs_from(Path(self.name))
        if what:
            diagnostics.error(
                f"it is not what was indexed ({what}), though size and time are; restore it, or index it again"
            )
        return True

    def _check_members(self, columns: tuple[str, ...], index: TarIndex, diagnostics: Diagnostics) -> None:
        rows = np.repeat(np.arange(len(index)), np.diff(index.sample_bounds))
        for wanted in columns:
            codes = [index.extensions.index(e) for e in self.columns.meant(wanted, index.extensions)]
            has = np.zeros(len(index), bool)
            has[rows[np.isin(index.extension, codes)]] = True
            if len(index) and not has.any():
                there = ", ".join(map(repr, sorted(self.columns.extensions or index.extensions)))
                diagnostics.error(f"none of its {len(index):,} samples has {wanted!r}, but {there}")
                continue
            missing = np.flatnonzero(~has).tolist()
            diagnostics.add_rows(Severity.ERROR, missing, f"it has no {wanted!r}", index.key)
        doubtful = [code for code, name in enumerate(index.extensions) if not self.columns.may_be_empty(name)]
        empty = rows[(index.length == 0) & np.isin(index.extension, doubtful)].tolist()
        diagnostics.add_rows(Severity.WARNING, empty, "a member of it is empty", index.key)

    def _contents(
        self, file: BinaryIO, index: TarIndex, checks: Checks, diagnostics: Diagnostics
    ) -> tuple[bytes, bytes]:
        """Decode members, if asked for. Returns the digests and label codes of the samples, if asked for."""
        if not (checks.decode or checks.contents):
            return b"", b""
        decoders = {name: self.columns.checks(name, tar_check) if checks.decode else [] for name in index.extensions}
        compared, labels = self.columns.compared(index.extensions, checks.columns)
        digests, codes = [], []
        for row in range(len(index)):
            values, label = [], None
            for name, offset, length in sorted(index.members(row)):
                blocks = partial(_blocks, file, offset, length)
                if decoders[name]:
                    data = b"".join(blocks())
                    value = self._decode(name, decoders[name], data, row, index, diagnostics)
                    if name in labels and isinstance(value, int):
                        self._check_label(value, row, index, diagnostics)
                    blocks = partial(iter, [data])
                if name in compared:
                    values.append((length, blocks))
                if name in labels and checks.contents:
                    label = b"".join(_blocks(file, offset, min(length, _LABEL)))
            if checks.contents and compared:
                # A sample without the content is equal to no other.
                parts = values or [(row, partial(iter, [self.name.encode("utf-8", "surrogateescape")]))]
                digests.append(digest((length, blocks()) for length, blocks in parts))
                codes.append(label_code(label))
        return b"".join(digests), b"".join(codes)

    def _decode(
        self, name: str, decoders: list[Check], data: bytes, row: int, index: TarIndex, diagnostics: Diagnostics
    ) -> Any:
        """The result of the first decoder; None, and an error, if one of them fails."""
        try:
            values = [decoder(data) for decoder in decoders]
        except Exception as error:  # decoders raise nearly anything
            diagnostics.error(f"its {name!r} cannot be decoded ({type(error).__name__}: {error})", row, index.key(row))
            return None
        return values[0]

    def _check_label(self, label: int, row: int, index: TarIndex, diagnostics: Diagnostics) -> None:
        if self.classes is not None and not 0 <= label < self.classes:
            what = f"its label is {label}, classes.json names {self.classes:,} classes"
            diagnostics.error(what, row, index.key(row))


class _Walked(BufferedReader):
    """A file that remembers the last position it was moved to."""

    last = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self.last = offset
        return super().seek(offset, whence)


def _blocks(file: BinaryIO, offset: int, length: int) -> Iterator[bytes]:
    file.seek(offset)
    while length and (block := file.read(min(length, BLOCK))):
        length -= len(block)
        yield block
