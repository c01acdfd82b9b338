"""The samples of MDS shards, read without a StreamingDataset, which would make shared memory and locks."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.convert.readers.input_format import Found, InputFormat
from infobatch_stream.convert.readers.options import Options, misfit
from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.formats.extensions import extension_of, without_clashes
from infobatch_stream.formats.fingerprint import fingerprint
from infobatch_stream.formats.mds_encodings import ValueKind, fit, from_mds, value_kind
from infobatch_stream.formats.mds_index import LARGEST_INDEX, IndexedShard, shards_of
from infobatch_stream.formats.schema import KEY, MEMBERS, Column, Encoded, EncodedImage, Sample, SampleSet
from infobatch_stream.formats.shard_list import lists_tars
from infobatch_stream.sources.mds.values import AGAIN, LocalShard, MdsValues
from infobatch_stream.sources.sidecars import read_classes, read_columns

__all__ = ["MDS", "MdsSet"]

_NPY = 128  # bytes that an array takes more in a tar


class MdsSet(SampleSet):
    """The samples of the MDS shards of one folder, in their order: raw values as they are, numbers and arrays.

    Nothing is unpickled, and no image decoded. Raises ConfigError and DataError.
    """

    is_shards = True

    def __init__(self, src: Path, options: Options) -> None:
        """``src``: the folder with the shards and their ``index.json``."""
        self._src = src
        lost: list[str] = []
        indexed, here = _read_index(src / "index.json", lost if options.skip else None)
        self.lost: Sequence[str] = lost
        self._values = MdsValues(indexed, here)
        self._encodings = self._values.encodings
        self.classes = read_classes([src])
        found = self._found()
        if options.columns is not None:
            names = (KEY, MEMBERS) if options.keys else (MEMBERS,)
            kept = {name: name for name in names if name in found and found[name].mds == "str"}
            options = replace(options, columns=kept | dict(options.columns))
        choice = options.choose(found, src)
        if MEMBERS in choice.columns and choice.columns[MEMBERS].mds != "str":
            raise ConfigError(
                f"{src} has a column {MEMBERS!r} that is no text; that name is for the members of samples from tars. "
                f"Convert the other columns (--column), or this one under another name (--column NAME={MEMBERS})."
            )
        self.columns, self._sources = choice.columns, choice.sources
        self._owners = {
            extension: name
            for name, source in self._sources.items()
            if name not in (KEY, MEMBERS)
            for extension in found[source].wds.split(";")
        }
        fields = (column for name, column in found.items() if name not in (KEY, MEMBERS))
        self._others = {extension for column in fields for extension in column.wds.split(";")}
        files = (Path(shard.path).name for shard in here)
        self.fingerprint = fingerprint(
            "mds", [(name, shard.raw.size, shard.samples) for name, shard in zip(files, indexed, strict=True)]
        )

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._values)

    def __getitem__(self, position: int) -> Sample:
        """The sample; raises DataError for a shard that is damaged, missing or changed."""
        raw, where = self._values[position], self._values.name(position)
        sample: dict[str, Any] = {}
        for name, source in self._sources.items():
            mds, encoding = self.columns[name].mds, self._encodings[source]
            try:
                value = from_mds(raw[source], encoding)
                sample[name] = value if mds == encoding else fit(value, mds)
            except ValueError as error:
                raise misfit(where, name, mds, error) from error
        if KEY in sample and self.columns[KEY].mds == "str":
            sample[KEY] = _text(sample[KEY], where)
        if MEMBERS in sample:
            self._name_members(sample, where)
        else:
            for name, column in self.columns.items():
                if ";" in column.wds:  # nothing says which it had
                    sample[name] = EncodedImage(sample[name].data, column.wds.partition(";")[0])
        return sample

    def sizes(self) -> NDArray[np.int64]:
        """int64[len]: of the values."""
        return self._values.sizes() + _NPY * sum(value_kind(one) is ValueKind.ARRAY for one in self._encodings.values())

    def _found(self) -> dict[str, Column]:
        """The columns there are: as ``columns.json`` says, or with extensions that fit the encodings."""
        listed = read_columns([self._src])
        if listed is None:
            names = [name for name in self._encodings if name not in (KEY, MEMBERS)]
            extensions = without_clashes({name: extension_of(self._encodings[name]) for name in names})
            listed = {name: Column(encoding, extensions.get(name, "txt")) for name, encoding in self._encodings.items()}
        elif {name: column.mds for name, column in listed.items()} != self._encodings:
            raise DataError(
                f"{self._src / 'columns.json'} has other columns or encodings than the index.json beside it; it is of "
                "other shards: remove it."
            )
        return listed

    def _name_members(self, sample: dict[str, Any], where: str) -> None:
        """Give each value the extension that its member had, and check that MEMBERS names members that there are."""
        text = sample[MEMBERS]
        try:
            members = json.loads(text.data if isinstance(text, Encoded) else text)
        except (ValueError, RecursionError):
            members = None
        if not isinstance(members, list) or not all(isinstance(member, str) for member in members):
            raise DataError(f"{where} has no JSON list of extensions in {MEMBERS}: {text!r:.100}; {AGAIN}.")
        kept: dict[str, str] = {}
        for member in members:
            name = self._owners.get(member)
            if name is None and member in self._others:  # of a column that was not chosen
                continue
            if name is None or name in kept:
                raise DataError(f"{where} has the member {member!r:.100} in {MEMBERS}, and no column for it; {AGAIN}.")
            wds = self.columns[name].wds
            kept[name] = member if member in wds.split(";") else wds  # the latter was given by the user, for all
            if kept[name] != wds:
                sample[name] = EncodedImage(sample[name].data, kept[name])
        sample[MEMBERS] = json.dumps(list(kept.values()))


def _text(key: str | Encoded, where: str) -> str:
    """A key as text. Raises DataError."""
    try:
        return key if isinstance(key, str) else key.data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} has a key that is no UTF-8 ({error}); {AGAIN}.") from error


def _read_index(path: Path, lost: list[str] | None) -> tuple[list[IndexedShard], list[LocalShard]]:
    """The shards with samples in an ``index.json``, and their files. Raises DataError.

    lost: gets the reasons for those whose file is missing or cut short, which are left out; None: they are errors.
    """
    if path.stat().st_size > LARGEST_INDEX:
        raise DataError(f"{path} has {path.stat().st_size:,} bytes; it is damaged: {AGAIN}.")
    found: list[tuple[IndexedShard, LocalShard]] = []
    for shard in shards_of(path.read_bytes(), path):
        if not shard.columns or not all(name and encoding for name, encoding, _ in shard.columns):
            raise DataError(f"{path} is no index of MDS shards: it has the columns {shard.columns!r:.200}; {AGAIN}.")
        try:
            found.append((shard, LocalShard.find(shard, path.parent)))
        except DataError as error:
            if lost is None:
                raise
            lost.append(str(error))
    if not found:
        raise DataError(lost[0] if lost else f"{path} names no shards; {AGAIN}.")
    if any(shard.encodings != found[0][0].encodings for shard, _ in found):
        raise DataError(f"{path} has shards of different columns; convert them one by one.")
    found = [(shard, here) for shard, here in found if shard.samples]
    if not found:
        raise DataError(f"{path.parent} holds no samples by its index.json; {AGAIN}.")
    return [shard for shard, _ in found], [here for _, here in found]


def _find(src: Path, names: Sequence[str]) -> Found | None:
    beside_tars = any(name.endswith(".tar") for name in names)
    if "index.json" not in names or (beside_tars and lists_tars(src / "index.json")):
        return None
    return Found("MDS shards (index.json)", lambda options: [MdsSet(src, options)])


MDS = InputFormat("MDS shards, SRC/index.json", _find)
