"""Checks of MDS shards against their index.json. Each file is read once."""

import stat
from dataclasses import dataclass
from pathlib import Path

from infobatch_stream.errors import DataError
from infobatch_stream.formats.mds_encodings import is_known
from infobatch_stream.formats.mds_index import LARGEST_INDEX, IndexedFile, IndexedShard, entries_of
from infobatch_stream.verify.checksums import Stream, blocks_of, decompressed, hasher
from infobatch_stream.verify.diagnostics import Checked, Checks, Diagnostics, Severity
from infobatch_stream.verify.mds_samples import MdsSamples
from infobatch_stream.verify.sidecars import columns_of

__all__ = ["MdsShard", "read_mds_index"]


def read_mds_index(folder: Path, diagnostics: Diagnostics, classes: int | None) -> "list[MdsShard]":
    """The shards in the index.json of ``folder`` that can be checked; the others give errors."""
    place = folder / "index.json"
    try:
        if place.stat().st_size > LARGEST_INDEX:
            raise ValueError(f"it has {place.stat().st_size:,} bytes")
        entries = entries_of(place.read_bytes())
    except OSError as error:
        diagnostics.error(f"{place} cannot be read ({error.strerror}); without it there is no dataset")
        return []
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        diagnostics.error(
            f"{place} is no index of MDS shards ({type(error).__name__}: {error}); fetch or write it again"
        )
        return []
    shards: list[MdsShard] = []
    names: set[str] = set()
    for number, entry in enumerate(entries):
        try:
            shard = MdsShard(folder, IndexedShard.of(entry, place), classes)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            diagnostics.error(f"{place}: shard {number} is not described as one ({type(error).__name__}: {error})")
        except DataError as error:
            diagnostics.error(str(error))
        else:
            if shard.entry.raw.name in names:
                diagnostics.error(f"{place} names {shard.entry.raw.name!r} twice")
            names |= {file.name for file in shard.entry.files()}
            shards.append(shard)
    if not entries or (shards and not any(shard.entry.samples for shard in shards)):
        diagnostics.error(f"{place} names {'no shards' if not entries else 'shards without any sample'}")
    _compare_columns(place, shards, diagnostics)
    return shards


def _compare_columns(place: Path, shards: "list[MdsShard]", diagnostics: Diagnostics) -> None:
    """Compare the columns of the shards with each other, and with the columns.json beside them."""
    found = {shard.entry.columns: shard for shard in reversed(shards)}
    if len(found) > 1:
        (first, one), (second, other) = list(found.items())[-1:-3:-1]
        differ = sorted({name for name, *_ in set(first) ^ set(second)})
        what = (
            f"{one.entry.raw.name} and {other.entry.raw.name} have different columns ({', '.join(map(repr, differ))})"
        )
        diagnostics.add(Severity.WARNING, f"{what}: they are of two datasets, or written by two programs")
    declared = columns_of(place.parent, diagnostics)
    if declared is None:
        return
    expected = {name: column.mds for name, column in declared.items()}
    for shard in found.values():
        encodings, name = shard.entry.encodings, shard.entry.raw.name
        if expected != encodings:
            diagnostics.error(
                f"columns.json says {_shown(expected)}, and {name} has {_shown(encodings)}: it is of other shards; "
                "remove it"
            )
            return


def _shown(columns: dict[str, str]) -> str:
    return ", ".join(f"{name!r}: {encoding}" for name, encoding in columns.items())[:200] or "nothing"


@dataclass(frozen=True)
class MdsShard:
    """A shard: its folder, its entry in index.json, and the number of classes that its labels may have."""

    folder: Path
    entry: IndexedShard
    classes: int | None

    @property
    def name(self) -> str:
        """The path of its file."""
        return str(self.folder / self.entry.raw.name)

    def key(self, row: int) -> str | None:
        """None: MDS samples have no keys."""
        return None

    def check(self, checks: Checks) -> Checked:
        """Check this shard for everything that can be wrong with it."""
        diagnostics = Diagnostics(self.name)
        self._check_columns(checks, diagnostics)
        reading = MdsSamples(self.entry, self.classes, checks, diagnostics)
        there = {file.name: self._is_whole(file, diagnostics) for file in self.entry.files()}
        if all(whole is None for whole in there.values()):
            names = " and ".join(there)
            diagnostics.error(f"{names} is missing: fetch or convert the shard again, or take it out of index.json")
        plain = there[self.entry.raw.name]
        if self.entry.zip is not None and there[self.entry.zip.name]:
            self._read(self.entry.zip, None if plain else reading, diagnostics)
        if plain:
            self._read(self.entry.raw, reading, diagnostics)
        present = (file for file in self.entry.files() if there[file.name] is not None)
        return Checked(diagnostics, self.entry.samples, sum(file.size for file in present), *reading.contents())

    def _check_columns(self, checks: Checks, diagnostics: Diagnostics) -> None:
        names = [name for name, *_ in self.entry.columns]
        for wanted in checks.columns:
            if wanted not in names:
                diagnostics.error(f"it has no column {wanted!r}, but {', '.join(map(repr, names))}")
        for name, encoding, _ in self.entry.columns:
            if not is_known(encoding):
                what = f"column {name!r} has the encoding {encoding!r}, which is not streaming's"
                diagnostics.add(Severity.WARNING, what)
        for file in self.entry.files():
            for name in file.hashes:
                if hasher(name) is None:
                    diagnostics.add(Severity.WARNING, f"its hash {name!r} is not known, so it is not compared")

    def _is_whole(self, file: IndexedFile, diagnostics: Diagnostics) -> bool | None:
        """Whether the file has its size; None if it is not there."""
        try:
            found = (self.folder / file.name).stat()
        except OSError:
            return None
        if not stat.S_ISREG(found.st_mode):
            diagnostics.error(f"{file.name} is no regular file")
        elif found.st_size != file.size:
            diagnostics.error(
                f"{file.name} has {found.st_size:,} bytes, index.json says {file.size:,}: it was cut off, or is of "
                "another dataset"
            )
        else:
            return True
        return False

    def _read(self, file: IndexedFile, reading: MdsSamples | None, diagnostics: Diagnostics) -> None:
        """Compare one of the shard's files with index.json. reading: checks the samples in it; None skips them."""
        try:
            with (self.folder / file.name).open("rb") as opened:
                stream = Stream(blocks_of(opened), file.hashes, file.size)
                if file is self.entry.zip:
                    self._read_unpacked(file, stream, reading, diagnostics)
                elif reading is not None:
                    reading.read(stream)
                _compare(file, stream, diagnostics)
        except (DataError, OSError) as error:
            diagnostics.error(f"{file.name} cannot be read to its end: {error}")

    def _read_unpacked(
        self, file: IndexedFile, packed: Stream, reading: MdsSamples | None, diagnostics: Diagnostics
    ) -> None:
        raw = self.entry.raw
        stream = Stream(decompressed(self.entry.compression, iter(packed), raw.size), raw.hashes, raw.size)
        try:
            if reading is not None:
                reading.read(stream)
            _compare(raw, stream, diagnostics, f"what {file.name} decompresses to")
        except DataError as error:
            diagnostics.error(f"{file.name} is damaged: {error}")


def _compare(file: IndexedFile, stream: Stream, diagnostics: Diagnostics, what: str = "") -> None:
    """Read the rest of ``stream``, and compare its size and hashes with those of ``file``."""
    hashes, what = stream.finish(), what or file.name
    if stream.size != file.size:
        diagnostics.error(f"{what} has {stream.size:,} bytes, index.json says {file.size:,}")
    for name, found in hashes.items():
        if found != file.hashes[name].lower():
            diagnostics.error(
                f"{what} has the {name} {found}, index.json says {file.hashes[name]}: it was changed; fetch or "
                "convert it again"
            )
