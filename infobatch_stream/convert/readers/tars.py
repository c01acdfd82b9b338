"""The samples of WebDataset tars."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infobatch_stream._urls import base_name, folder_of, is_remote
from infobatch_stream.convert.readers.class_folders import some
from infobatch_stream.convert.readers.input_format import Found, InputFormat
from infobatch_stream.convert.readers.options import Options, misfit, unknown
from infobatch_stream.convert.readers.tar_survey import Odd, Survey, encoding_for, fits, why_unfit
from infobatch_stream.convert.readers.temp_folder import temporary_folder
from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.formats.extensions import is_extension, is_image
from infobatch_stream.formats.fingerprint import fingerprint
from infobatch_stream.formats.mds_encodings import ValueKind, fit, fit_exactly, value_kind
from infobatch_stream.formats.schema import KEY, MEMBERS, Column, Encoded, EncodedImage, Sample, SampleSet
from infobatch_stream.formats.tar_columns import TarColumns
from infobatch_stream.formats.tar_index import TarIndex
from infobatch_stream.sources.remote.shard_cache import ShardCache
from infobatch_stream.sources.sidecars import read_classes, read_columns
from infobatch_stream.sources.urls import expand_shards
from infobatch_stream.sources.webdataset.shards import TarShards, readable

__all__ = ["TARS", "TarSet"]

_LOOKED_AT = 1000  # samples, evenly spaced, to tell whether members are whole numbers or arrays
_LOOKED_INTO = 1 << 27  # bytes of them together, about
_MOST_COLUMNS = 256


class TarSet(SampleSet):
    """The samples of tars in their order: a key, and a field per member, whose bytes are copied.

    A column is what its members' extension is called, or what ``columns.json`` beside the tars or the user says.
    Where samples do not have the same members in the same order, they have the field MEMBERS.
    Raises ConfigError and DataError.
    """

    is_shards = True

    def __init__(self, urls: Sequence[str], options: Options) -> None:
        """``urls``: as `IndexedWebDataset` takes them.

        Remote tars come into a temporary folder: the user's cache may have older ones of the same url.
        """
        cache_dir = temporary_folder(self) if any(map(is_remote, urls)) else None
        self._where = urls[0] if len(urls) == 1 else f"{urls[0]} ..."
        self._odd: dict[str, str] = {}  # column -> a note on how it is stored
        self.notes: Sequence[str] = ()
        self.lost: Sequence[str] = ()
        names = expand_shards(urls)
        if options.skip:
            names, self.lost = readable(names, ShardCache(cache_dir))
        self._shards = TarShards(names, cache_dir)
        folders = sorted({folder_of(name) for name in names})
        self.classes = read_classes(folders)
        listed = read_columns(folders)
        self._parts = self._divide(options, listed or {})
        survey = Survey(len(self._parts))
        for number, index in enumerate(self._indexes()):
            survey.add(index, self._picked(index), names[number])
        if survey.bare.count and not options.skip:
            raise DataError(
                f"{survey.bare.first}; add one of its own (--column), remove the sample, or leave it out (--on-error "
                "skip)."
            )
        columns = options.changed(self._stored(survey, listed or {}, options), self._where)
        # Where samples are known to have different members, some were without them from the start.
        self._free = frozenset(columns) - options.given if MEMBERS in (listed or {}) else frozenset[str]()
        self._required = self._find_required(columns)
        places = [place for place, name in enumerate(columns) if name in self._required]
        survey.set_order(((index, self._picked(index)) for index in self._indexes()), places, skip=options.skip)
        if survey.order is not None:  # MDS sorts its columns: here they are as the members are
            place = dict(zip(columns, survey.order, strict=True))
            columns = {name: columns[name] for name in sorted(columns, key=place.__getitem__)}
        head = {KEY: Column("str", "txt")} if options.keys and (listed is None or KEY in listed) else {}
        if survey.order is None or (listed is not None and MEMBERS in listed):
            head[MEMBERS] = Column("str", "txt")
        self.columns = head | columns
        checked = {name for name in options.given if columns[name].mds == "json"}  # of which any text could be stored
        self._strict = checked if listed else frozenset(columns) - options.given | checked
        self.fingerprint = fingerprint(
            "wds",
            [*map(base_name, names), *self._shards.sizes.tolist(), *self._shards.probes, survey.bytes],
        )

    def __len__(self) -> int:
        """Number of samples."""
        return self._shards.ends[-1]

    def __getitem__(self, position: int) -> Sample:
        """The sample; raises DataError for a member that does not fit its column."""
        raw = self._shards.read(position)
        sample: dict[str, Any] = {}
        members: dict[str, str] = {}  # extension -> as it is called in what is written
        for name, column in self.columns.items():
            if name not in self._parts:  # KEY and MEMBERS
                continue
            extensions = self._parts[name]
            extension = next((extension for extension in extensions if extension in raw), None)
            if extension is None or (name in self._required and not raw[extension]):
                if name in self._required:
                    there = "an empty" if extension else "no"
                    error = ValueError(f"it has {there} member {extension or ' or '.join(extensions)}")
                    raise misfit(_name_of(raw), name, column.mds, error)
                sample[name] = Encoded(b"")
                continue
            # One that is not among them was given by the user, for all.
            stored = extension if extension in column.wds.split(";") else column.wds
            members[extension] = stored
            sample[name] = self._value(raw, name, extension, stored)
        if not members:
            raise DataError(f"{_name_of(raw)} has none of the members that are converted.")
        if KEY in self.columns:
            sample[KEY] = self._key(raw)
        if MEMBERS in self.columns:
            sample[MEMBERS] = json.dumps([members[extension] for extension in raw if extension in members])
        return sample

    def keep_columns(self, columns: dict[str, Column]) -> None:
        """See `KeepsColumns`: types and order follow from which samples are whole, and from whether others count."""
        for name in self._parts:
            if (kept := columns[name].mds) != (now := self.columns[name].mds):
                why = f"as when the conversion began (begun now, it would be {now})"
                self._odd[name] = f"{self._where}: the column {name!r} is stored as {kept}, {why}"
        self.columns, self.notes = columns, list(self._odd.values())
        self._required = self._find_required({name: columns[name] for name in self._parts})

    def sizes(self) -> NDArray[np.int64]:
        """int64[len]: of the members and the fields that name them; from the indexes."""
        sizes = []
        least = [0 if value_kind(self.columns[name].mds) is ValueKind.RAW else 8 for name in self._parts]
        for index in self._indexes():
            picked = self._picked(index)
            names = np.array([len(extension) + 4 for extension in index.extensions] or [0])[index.extension]
            lengths = np.maximum(index.length[picked], least) + (names[picked] if MEMBERS in self.columns else 0)
            sizes.append(np.where(picked < 0, 0, lengths).sum(axis=1) + np.diff(index.key_bounds))
        return np.concatenate(sizes)

    def _value(self, raw: dict[str, Any], name: str, extension: str, stored: str) -> Any:
        column, data = self.columns[name], raw[extension]
        try:
            value = (fit_exactly if name in self._strict else fit)(data, column.mds)
        except ValueError as error:
            raise misfit(f"{_name_of(raw)}, member {extension}", name, column.mds, error) from error
        if value_kind(column.mds) is ValueKind.RAW and (is_image(stored) or stored != column.wds):
            return EncodedImage(data, stored)
        return value

    def _key(self, raw: dict[str, Any]) -> str:
        key: str = raw["__key__"]
        try:
            key.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{raw['__url__']}: the key {key!r} is no UTF-8, and shards hold text; rename the members."
            ) from error
        return key

    def _indexes(self) -> Iterator[TarIndex]:
        return (tar.index() for tar in self._shards.tars)

    def _divide(self, options: Options, listed: dict[str, Column]) -> dict[str, tuple[str, ...]]:
        """Column -> the extensions of its members, of which the first that a sample has is taken."""
        there = list(dict.fromkeys(extension for index in self._indexes() for extension in index.extensions))
        columns = TarColumns(listed)
        owned = columns.owned(there)
        for extension in there if owned else ():
            if columns.owner(extension) is None:
                raise DataError(
                    f"{self._where}: the columns.json beside the shards has no column for the extension {extension!r}; "
                    "it is of other shards: remove it."
                )
        if options.columns is not None:
            owned = {
                name: [extension for part in source.split(";") for extension in owned.get(part, [part])]
                for name, source in options.columns.items()
            }
        elif not owned:
            if len(there) > _MOST_COLUMNS:
                raise ConfigError(
                    f"the members of {self._where} have {len(there):,} different extensions ({', '.join(there[:5])}, "
                    "...): all behind the first dot of a name is one. Choose some (--column image=jpg)."
                )
            owned = {extension: [extension] for extension in there}
        takers: dict[str, str] = {}
        for name, extensions in owned.items():
            options.check_name(name, own=name if name in listed and name not in (KEY, MEMBERS) else None)
            found = [extension for extension in dict.fromkeys(extensions) if extension in there]
            if not found and MEMBERS in listed and name in listed:  # some of the tars only: those without it
                found = extensions
            if not found:
                raise unknown(";".join(extensions), there, self._where)
            for extension in found:
                if not is_extension(extension) or extension.startswith("__"):
                    raise ConfigError(
                        f"{self._where} has members with the extension {extension!r}, which cannot be a column; leave "
                        "them out (--column NAME=EXTENSION for each that is wanted)."
                    )
                if takers.setdefault(extension, name) != name:
                    raise ConfigError(
                        f"the columns {takers[extension]!r} and {name!r} both take the members {extension!r}; give "
                        "each member to one column."
                    )
            owned[name] = found
        return {name: tuple(extensions) for name, extensions in owned.items()}

    def _find_required(self, columns: dict[str, Column]) -> frozenset[str]:
        """The columns that every sample must have: no library decodes nothing as a number, an array or an image."""
        return frozenset(
            name
            for name, column in columns.items()
            if value_kind(column.mds) is not ValueKind.RAW
            or (column.mds not in ("bytes", "str") and name not in self._free)
        )

    def _picked(self, index: TarIndex) -> NDArray[np.int64]:
        """int64[n, columns]: the member of each sample that is the value of each column, -1 where it has none."""
        codes = {extension: code for code, extension in enumerate(index.extensions)}
        sample_of = np.repeat(np.arange(len(index)), np.diff(index.sample_bounds))
        picked = np.full((len(index), len(self._parts)), -1)
        for place, extensions in enumerate(self._parts.values()):
            for extension in reversed(extensions):
                members = np.flatnonzero(index.extension == codes.get(extension, -1))
                picked[sample_of[members], place] = members
        return picked

    def _stored(self, survey: Survey, listed: dict[str, Column], options: Options) -> dict[str, Column]:
        """How each column is stored, but for what the user says; notes where samples have it other than by its name."""
        columns = {}
        doubtful: dict[str, Odd] = {}
        for place, (name, extensions) in enumerate(self._parts.items()):
            # Not the key's or that of the members, which are no members themselves.
            fields = (column for field, column in listed.items() if field not in (KEY, MEMBERS))
            owner = next((column for column in fields if set(extensions) & set(column.wds.split(";"))), None)
            mds = encoding_for(extensions) if owner is None else owner.mds
            if owner is None and name not in options.given and mds not in ("bytes", "str"):
                odd = survey.long[place] if mds == "int" and survey.long[place].count else survey.absent[place]
                if not odd.keeps_type(survey.total, skip=options.skip):
                    self._note_stored_as_bytes(name, mds, odd, survey.total, "")
                    mds = "bytes"
                elif mds in ("int", "ndarray", "json") and not listed:
                    doubtful[name] = Odd()
            columns[name] = Column(mds, ";".join(extensions))
        looks = max(min(_LOOKED_AT, _LOOKED_INTO * len(self) // max(survey.bytes, 1)), 16)
        positions = np.unique(np.linspace(0, len(self) - 1, looks).astype(int)).tolist()
        for position in positions if doubtful else ():
            raw = self._shards.read(position)
            for name, odd in doubtful.items():
                for extension in self._parts[name]:
                    if raw.get(extension) and (why := why_unfit(raw[extension], columns[name].mds)):
                        odd.add(1, f"{_name_of(raw)}: {why}")
                        odd.fitting += fits(raw[extension], columns[name].mds)
        for name, odd in doubtful.items():
            if not odd.keeps_type(len(positions), skip=options.skip):
                self._note_stored_as_bytes(name, columns[name].mds, odd, len(positions), " that were looked at")
                columns[name] = replace(columns[name], mds="bytes")
        return columns

    def _note_stored_as_bytes(self, name: str, mds: str, odd: Odd, total: int, which: str) -> None:
        """Note that a column is stored as bytes."""
        remedy = f"To leave such samples out instead: --encoding {name}={mds} --on-error skip"
        if odd.fitting:  # and not as they are written
            remedy = f"--encoding {name}={mds} stores them as {'numbers' if mds == 'int' else mds} instead"
        if 0 < odd.fitting < odd.count:
            remedy += ", and with --on-error skip leaves out those that are none"
        self._odd[name] = (
            f"{self._where}: the column {name!r} is stored as bytes and not as {mds}, because of {odd.count:,} of "
            f"{total:,} samples{which} ({odd.first}). {remedy}"
        )
        self.notes = list(self._odd.values())


def _name_of(raw: dict[str, Any]) -> str:
    return f"{raw['__url__']}: sample {raw['__key__']!r}"


def _find(src: Path, names: Sequence[str]) -> Found | None:
    tars = list(filter(TARS.is_file, names))
    return Found(f"WebDataset tars ({some(tars)})", lambda options: [TarSet([str(src)], options)]) if tars else None


TARS = InputFormat(
    "WebDataset tars, SRC/*.tar", _find, lambda name: name.endswith(".tar"), lambda *args: [TarSet(*args)]
)
