"""The samples of WebDataset tars."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.sources.base import fingerprint
from infobatch_stream.sources.tar_index import AnyPath, TarIndex
from infobatch_stream.sources.tar_shards import TarShards
from infobatch_stream.sources.urls import base_name, expand_shards, is_remote, local_path

from ..encodings import Form, fit, form_of, strictly
from ..extensions import encoding_of, is_extension, is_image, split_prefix
from ..samples import KEY, MEMBERS, Column, Encoded, EncodedImage, Sample
from .columns import Options, misfit, read_classes, read_columns, unknown
from .temporary import temporary_folder

__all__ = ["TarSet"]

_LOOKED_AT = 1000  # samples, evenly spaced, to tell whether members are whole numbers or arrays
_LOOKED_INTO = 1 << 27  # bytes of them together, about
_MOST_COLUMNS = 256
_INT_LENGTH = 20  # characters of an int64, at most


class TarSet:
    """The samples of tars in their order: a key, and a field per member, whose bytes are copied.

    A column is what its members' extension is called, or what ``columns.json`` beside the tars or the user says.
    Where samples do not have the same members in the same order, they have the field MEMBERS.
    Raises ConfigError and DataError.
    """

    name = ""
    skipped = 0
    notes: Sequence[str] = ()
    lost: Sequence[str] = ()
    in_files = False
    is_shards = True

    def __init__(self, urls: Sequence[str], options: Options | None = None, cache_dir: AnyPath | None = None) -> None:
        """``urls``: as `IndexedWebDataset` takes them; ``cache_dir``: where indexes are kept if not beside the tars.

        Remote tars come into a temporary folder: the user's cache may have older ones of the same url.
        """
        options = options or Options()
        if cache_dir is None and any(map(is_remote, urls)):
            cache_dir = temporary_folder(self)
        self._where = urls[0] if len(urls) == 1 else f"{urls[0]} ..."
        self._shards = TarShards(expand_shards(urls), cache_dir)
        names = self._shards.urls
        folders = sorted({_folder(name) for name in names})
        self.classes = read_classes(folders)
        told = read_columns(folders)
        self._parts = self._divide(options, told or {})
        survey = _Survey(len(self._parts))
        for number, index in enumerate(self._indexes()):
            survey.add(index, self._picked(index), names[number])
        columns = self._stored(survey, told or {}, options)
        if survey.order is not None:  # MDS sorts its columns: here they are as the members are
            place = dict(zip(columns, survey.order, strict=True))
            columns = {name: columns[name] for name in sorted(columns, key=place.__getitem__)}
        head = {KEY: Column("str", "txt")} if options.keys and (told is None or KEY in told) else {}
        if survey.order is None or (told is not None and MEMBERS in told):
            head[MEMBERS] = Column("str", "txt")
        self.columns = head | options.changed(columns, self._where)
        self._strict = frozenset() if told else frozenset(columns) - options.given
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
            if extension is None:
                if form_of(column.mds) is not Form.RAW:
                    error = ValueError(f"it has no member {' or '.join(extensions)}")
                    raise misfit(_name_of(raw), name, column.mds, error)
                sample[name] = Encoded(b"")
                continue
            # One that is not among them was given by the user, for all.
            stored = extension if extension in column.wds.split(";") else column.wds
            members[extension] = stored
            sample[name] = self._value(raw, name, extension, stored)
        if KEY in self.columns:
            sample[KEY] = self._key(raw)
        if MEMBERS in self.columns:
            sample[MEMBERS] = json.dumps([members[extension] for extension in raw if extension in members])
        return sample

    def sizes(self) -> NDArray[np.int64]:
        """int64[len]: of the members and the fields that name them; from the indexes."""
        sizes = []
        least = [0 if form_of(self.columns[name].mds) is Form.RAW else 8 for name in self._parts]
        for index in self._indexes():
            picked = self._picked(index)
            names = np.array([len(extension) + 4 for extension in index.extensions] or [0])[index.extension]
            lengths = np.maximum(index.length[picked], least) + (names[picked] if MEMBERS in self.columns else 0)
            sizes.append(np.where(picked < 0, 0, lengths).sum(axis=1) + np.diff(index.key_bounds))
        return np.concatenate(sizes)

    def _value(self, raw: dict[str, Any], name: str, extension: str, stored: str) -> Any:
        column, data = self.columns[name], raw[extension]
        try:
            value = (strictly if name in self._strict else fit)(data, column.mds)
        except ValueError as error:
            raise misfit(f"{_name_of(raw)}, member {extension}", name, column.mds, error) from error
        if form_of(column.mds) is Form.RAW and (is_image(stored) or stored != column.wds):
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

    def _divide(self, options: Options, told: dict[str, Column]) -> dict[str, tuple[str, ...]]:
        """Column -> the extensions of its members, of which the first that a sample has is taken."""
        there = list(dict.fromkeys(extension for index in self._indexes() for extension in index.extensions))
        owned = {name: column.wds.split(";") for name, column in told.items() if name not in (KEY, MEMBERS)}
        for extension in there if owned else ():
            _give(extension, owned, told, self._where)
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
            options.check_name(name)
            found = [extension for extension in dict.fromkeys(extensions) if extension in there]
            if not found and MEMBERS in told and name in told:  # some of the tars only: those without it
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

    def _stored(self, survey: "_Survey", told: dict[str, Column], options: Options) -> dict[str, Column]:
        """How each column is stored, but for what the user says."""
        columns = {}
        for place, (name, extensions) in enumerate(self._parts.items()):
            # Not the key's or that of the members, which are no members themselves.
            fields = (column for field, column in told.items() if field not in (KEY, MEMBERS))
            owner = next((column for column in fields if set(extensions) & set(column.wds.split(";"))), None)
            if owner is not None:
                mds = owner.mds
            else:
                mds = next(iter({encoding_of(extension) for extension in extensions} - {"png"}), "png")
                if len({encoding_of(extension) for extension in extensions} - {"jpeg", "png"}) > 1 or (
                    survey.empty[place] and mds != "str"  # which no library could decode
                ):
                    mds = "bytes"
                if mds == "int" and survey.longest[place] > _INT_LENGTH:
                    mds = "bytes"
            columns[name] = Column(mds, ";".join(extensions))
        doubtful = {name for name, column in columns.items() if column.mds in ("int", "ndarray", "json")}
        doubtful -= options.given | (columns.keys() if told else set())
        looks = max(min(_LOOKED_AT, _LOOKED_INTO * len(self) // max(survey.bytes, 1)), 16)
        for position in np.unique(np.linspace(0, len(self) - 1, looks).astype(int)).tolist():
            if not doubtful:
                break
            raw = self._shards.read(position)
            for name in list(doubtful):
                try:
                    for extension in self._parts[name]:
                        if extension in raw:
                            strictly(raw[extension], columns[name].mds)
                except ValueError:
                    doubtful.discard(name)
                    columns[name] = replace(columns[name], mds="bytes")
        return columns


def _name_of(raw: dict[str, Any]) -> str:
    return f"{raw['__url__']}: sample {raw['__key__']!r}"


def _folder(url: str) -> str:
    return url.rpartition("/")[0] if is_remote(url) else str(Path(local_path(url)).parent)


class _Survey:
    """What the indexes of tars tell of their members, column by column.

    order: of the columns in every sample; None where samples do not have the same members in the same order.
    empty: whether a column's member is missing or empty anywhere; longest: bytes; bytes: of all together.
    """

    def __init__(self, columns: int) -> None:
        self.order: list[int] | None = []
        self.empty = np.zeros(columns, bool)
        self.longest = np.zeros(columns, np.int64)
        self.bytes = 0
        self._names: list[str] = []

    def add(self, index: TarIndex, picked: NDArray[np.int64], path: str) -> None:
        """Look at one tar. Raises DataError for a sample that has no member of any column."""
        if not len(index):
            return
        missing = picked < 0
        if (lost := missing.all(axis=1)).any():
            key = index.key(int(lost.argmax()))
            raise DataError(
                f"{path}: the sample {key!r} has none of the members that are converted; add one of its own "
                "(--column), or remove it."
            )
        lengths = np.where(missing, 0, index.length[picked])
        self.empty |= (lengths == 0).any(axis=0)
        self.longest = np.maximum(self.longest, lengths.max(axis=0))
        self.bytes += int(lengths.sum())
        order, codes = picked.argsort(axis=1), index.extension[picked]
        same = not missing.any() and (order == order[0]).all() and (codes == codes[0]).all()
        names = [index.extensions[code] for code in codes[0]]
        places = order[0].argsort().tolist()  # of a column among the members
        if self.order == []:
            self.order, self._names = places, names
        if not same or (places, names) != (self.order, self._names):
            self.order = None


def _give(extension: str, owned: dict[str, list[str]], told: dict[str, Column], where: str) -> None:
    """Add ``extension`` to the column that it belongs to, by ``columns.json``.

    The images of one column may have different extensions, of which only the first is written down.
    """
    if any(extension in extensions for extensions in owned.values()):
        return
    fitting = [
        name
        for name, extensions in owned.items()
        if is_image(extension)
        and told[name].mds in ("jpeg", "png")
        and split_prefix(extensions[0])[0] == split_prefix(extension)[0]
    ]
    if len(fitting) != 1:
        raise DataError(
            f"{where}: the columns.json beside the shards has no column for the extension {extension!r}; it is of "
            "other shards: remove it."
        )
    owned[fitting[0]].append(extension)
