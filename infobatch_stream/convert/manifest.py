"""The shards of a conversion: which there are, how they are called, and what names them for their readers."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from infobatch_stream.convert.destinations.base import Destination, Record
from infobatch_stream.convert.destinations.remote import is_url
from infobatch_stream.convert.worker import Target, TaskResult
from infobatch_stream.convert.writers import ShardFormat, WrittenShard
from infobatch_stream.errors import DataError
from infobatch_stream.formats.schema import Column
from infobatch_stream.formats.shard_list import SHARD_LIST, shard_list_of

__all__ = ["Conversion", "OutputFolder", "Manifest", "ConversionProgress", "ShardSummary", "ProgressCallback"]


@dataclass(frozen=True)
class OutputFolder:
    """One folder of shards: its columns, classes (or None), name in the destination, and how many samples it gets."""

    columns: dict[str, Column]
    classes: list[str] | None
    name: str = ""
    total: int = 0


@dataclass(frozen=True)
class ShardSummary:
    """What was written into one folder or URL.

    Attributes:
        path: the folder or URL.
        samples: how many were written.
        shards: how many were written.
        bytes: size of the shards.
    """

    path: Path | str
    samples: int
    shards: int
    bytes: int


@dataclass(frozen=True)
class Conversion:
    """A finished conversion.

    Attributes:
        parts: its folders.
        classes: names of label 0, 1, ...; empty where there are none.
        skipped: number of files that were no samples.
        problems: why each sample was passed over that could not be read.
        lost: why each shard of the source was passed over that could not be read.
        notes: what else a user should know.
        seconds: time that it took, without importing libraries.
    """

    parts: tuple[ShardSummary, ...]
    classes: tuple[str, ...]
    skipped: int
    problems: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class ConversionProgress:
    """How far the folder ``title`` is: samples of ``total`` that are in shards, and the bytes of these."""

    title: str
    samples: int
    total: int
    bytes: int


ProgressCallback = Callable[[ConversionProgress], None]


class Manifest:
    """Which shards there are: gives them their numbers and names, passes them on, and writes what names them."""

    def __init__(
        self,
        sets: Sequence[OutputFolder],
        out: Destination,
        target: Target,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        self._sets, self._out, self._target, self._on_progress = sets, out, target, on_progress
        self._records: list[list[Record]] = [[] for _ in sets]
        self._published = 0  # shards of a writer that goes on
        for record in out.done:
            self._records[record["part"]].append(record)
        for part in range(len(sets)):
            if self._records[part]:
                self._report(part)

    def take(self, part: int, written: TaskResult) -> None:
        """Publish the shards of the next task, one of the set ``part``. Raises as `finish`, of the set before."""
        if part and not self._records[part]:
            self._check_read(part - 1)
        folder = self._out.scratch / written.folder
        number = sum(len(record["shards"]) for record in self._records[part])
        files: dict[str, Path] = {}
        shards = []
        for shard in written.shards:
            name = self._name(part, number, shard.file)
            for path in (folder / shard.file, *self._target.companions(folder / shard.file)):
                files[name + path.name.removeprefix(shard.file)] = path
            entry = shard.entry
            if entry is not None:
                entry = {**entry, "raw_data": {**entry["raw_data"], "basename": f"shard.{number:05}.mds"}}
                if entry["zip_data"]:
                    entry["zip_data"] = {**entry["zip_data"], "basename": name.rpartition("/")[2]}
            shards.append(asdict(replace(shard, file=name, entry=entry)))
            number += 1
        record = {
            "part": part,
            "shards": shards,
            "files": {name: path.stat().st_size for name, path in files.items()},
            "problems": written.problems,
        }
        self._out.publish(record, files)
        self._records[part].append(record)
        self._report(part)

    def take_finished(self, finished: Sequence[WrittenShard], folder: Path) -> None:
        """Publish the shards of a writer into ``folder`` that were not published yet."""
        new = list(finished[self._published :])
        for shard in new:
            self._target.index(folder / shard.file)
        if new:
            self._published += len(new)
            self.take(0, TaskResult(folder.name, new, []))

    def _name(self, part: int, number: int, file: str) -> str:
        prefix = f"{self._sets[part].name}/" if self._sets[part].name else ""
        if self._target.format is ShardFormat.WDS:
            return f"{prefix}shard-{number:06d}.tar"
        return f"{prefix}shard.{number:05}" + file[file.index(".mds") :]

    def _report(self, part: int) -> None:
        if self._on_progress is not None:
            one, shards = self._sets[part], self._shards(part)
            samples = sum(shard["samples"] for shard in shards)
            problems = sum(len(record["problems"]) for record in self._records[part])
            self._on_progress(
                ConversionProgress(one.name, samples + problems, one.total, sum(shard["bytes"] for shard in shards))
            )

    def _shards(self, part: int) -> list[dict[str, Any]]:
        return [shard for record in self._records[part] for shard in record["shards"]]

    def finish(self) -> None:
        """Write what names the shards. Raises DataError for a set of which no sample could be read."""
        for part, one in enumerate(self._sets):
            shards = self._shards(part)
            self._check_read(part)
            prefix = f"{one.name}/" if one.name else ""
            if one.classes is not None:
                self._out.write(f"{prefix}classes.json", json.dumps(one.classes, ensure_ascii=False))
            columns = {name: {"mds": column.mds, "wds": column.wds} for name, column in one.columns.items()}
            self._out.write(f"{prefix}columns.json", json.dumps(columns, ensure_ascii=False))
            if self._target.format is ShardFormat.MDS:
                index = {"shards": [shard["entry"] for shard in shards], "version": 2}
                self._out.write(f"{prefix}index.json", json.dumps(index, sort_keys=True))
            else:  # by which one sees that a tar is missing
                listed = [(shard["file"].rpartition("/")[2], shard["samples"], shard["bytes"]) for shard in shards]
                self._out.write(f"{prefix}{SHARD_LIST}", shard_list_of(listed))

    def _check_read(self, part: int) -> None:
        if not self._shards(part):
            name = self._sets[part].name
            which = f"no sample of {name}" if name else "no sample"
            raise DataError(f"{which} could be read; the first: {self._records[part][0]['problems'][0]}")

    def summary(self, dst: Path | str, skipped: int, seconds: float = 0.0) -> Conversion:
        """What was written, for the user."""
        parts = []
        for part, one in enumerate(self._sets):
            shards = self._shards(part)
            place = f"{str(dst).rstrip('/')}/{one.name}".rstrip("/") if is_url(dst) else Path(dst) / one.name
            samples, size = (sum(shard[what] for shard in shards) for what in ("samples", "bytes"))
            parts.append(ShardSummary(place, samples, len(shards), size))
        problems = [text for records in self._records for record in records for text in record["problems"]]
        return Conversion(tuple(parts), tuple(self._sets[0].classes or ()), skipped, tuple(problems), seconds=seconds)
