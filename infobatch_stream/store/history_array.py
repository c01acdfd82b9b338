"""An array of the history of a store: a Zarr array of the form that the layout says, or none.

Zarr would do what the metadata asks for: decode with any codec that has a name, in chunks of any size. Here it is only
compared with what it has to be, and then a chunk is read and decoded into memory of the size that the layout says.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numcodecs import blosc, zstd  # type: ignore[import-untyped]
from numpy.typing import NDArray

from infobatch_stream.store.header import MAX_EPOCH, METADATA_LIMIT, parse_json, short
from infobatch_stream.store.safe_files import link_inside, names_in, read_inside, replace_inside

__all__ = ["GROUP", "ArraySpec", "HistoryArray", "has_group", "make_group"]

GROUP: Final = "history"
_GROUP: Final = {"zarr_format": 3, "node_type": "group"}
_METADATA: Final = "zarr.json"
_BEGUN: Final = {f".{_METADATA}.new"}  # of a process that was killed
_LEVEL: Final = 5  # of compression by lz4
_ROOM: Final = 1 << 16  # bytes by which a chunk that cannot be compressed may grow


@dataclass(frozen=True)
class ArraySpec:
    """What the layout says of an array.

    dtype: little-endian, as "<i8". fill: of chunks without a file. chunk: its shape. size: of all dimensions but the
    first. rows: of the first; None: as many as there are epochs. quick: lz4 instead of zstd.
    """

    dtype: str
    fill: float
    chunk: tuple[int, ...]
    size: tuple[int, ...] = ()
    rows: int | None = None
    quick: bool = False

    def metadata(self, rows: int, attributes: dict[str, int]) -> dict[str, Any]:
        """What zarr.json holds."""
        kind = np.dtype(self.dtype)
        lz4 = {"typesize": kind.itemsize, "cname": "lz4", "clevel": _LEVEL, "shuffle": "bitshuffle", "blocksize": 0}
        packed = (
            {"name": "blosc", "configuration": lz4}
            if self.quick
            else {"name": "zstd", "configuration": {"level": 0, "checksum": False}}
        )
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [rows, *self.size],
            "data_type": kind.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "NaN" if self.fill != self.fill else int(self.fill),
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, packed],
            "attributes": attributes,
            "storage_transformers": [],
        }


def make_group(path: Path) -> None:
    """Have the Zarr group in which the arrays lie. Raises OSError or ValueError for what else is there."""
    if not has_group(path):
        _write_json(path, GROUP, {"attributes": {}, **_GROUP})


def has_group(path: Path) -> bool:
    """Whether the store at ``path`` has a history. Raises OSError or ValueError for what is none of ours."""
    found = _read_json(path, GROUP)
    if found is not None:
        _check(found, _GROUP, GROUP)
    return found is not None


class HistoryArray:
    """An array in the history of the store at ``path``, of which the metadata was compared with its `ArraySpec`.

    Attributes: rows: length of the first dimension. attributes: whole numbers by name.
    """

    def __init__(self, path: Path, name: str, form: ArraySpec, rows: int, attributes: dict[str, int]) -> None:
        """Use `open` or `make`."""
        self._path, self._name, self._form = path, f"{GROUP}/{name}", form
        self.rows, self.attributes = rows, attributes

    @classmethod
    def open(cls, path: Path, name: str, form: ArraySpec) -> Self | None:
        """The array ``name``; None when there is none.

        Raises OSError or ValueError for one that is not of ``form``.
        """
        found = _read_json(path, f"{GROUP}/{name}")
        if found is None:
            return None
        shape = found.get("shape")
        rows = shape[0] if isinstance(shape, list) and shape else None
        if type(rows) is not int or not 0 <= rows <= MAX_EPOCH or form.rows not in (None, rows):
            raise ValueError(f"{name} has the shape {short(shape)}")
        given = found.get("attributes") or {}
        known = {key: value for key, value in given.items() if type(value) is int and -1 <= value <= MAX_EPOCH}
        _check(found, form.metadata(rows, known), name)
        return cls(path, name, form, rows, known)

    @classmethod
    def make(cls, path: Path, name: str, form: ArraySpec) -> Self:
        """The array ``name``, made without rows (but for those that its form has) where there is none."""
        found = cls.open(path, name, form)
        if found is None:
            found = cls(path, name, form, form.rows or 0, {})
            found.update()
        return found

    def update(self, *, rows: int | None = None, **attributes: int) -> None:
        """Write metadata with other ``rows`` and ``attributes``."""
        self.rows = self.rows if rows is None else rows
        self.attributes = self.attributes | attributes
        _write_json(self._path, self._name, self._form.metadata(self.rows, self.attributes))

    def read(self, *place: int) -> NDArray[Any]:
        """The chunk at ``place``, in the shape of a chunk; what it has beyond the array means nothing."""
        chunk = np.full(self._form.chunk, self._form.fill, self._form.dtype)
        try:
            data = read_inside(self._path, self._file(place), chunk.nbytes + chunk.nbytes // 64 + _ROOM)
        except FileNotFoundError:
            return chunk
        # Into memory that is there: neither asks for as much as the data says that they need.
        (blosc if self._form.quick else zstd).decompress(data, chunk)
        return chunk

    def write(self, chunk: NDArray[Any], *place: int) -> None:
        """Replace the chunk at ``place``. ``chunk`` is filled up at its end where it is shorter than one."""
        whole = np.full(self._form.chunk, self._form.fill, self._form.dtype)
        whole[tuple(map(slice, chunk.shape))] = chunk
        quick = self._form.quick
        data = blosc.compress(whole, b"lz4", _LEVEL, blosc.BITSHUFFLE) if quick else zstd.compress(whole, 0)
        replace_inside(self._path, self._file(place), data)

    def places(self, rows: int | None = None) -> Iterator[tuple[int, ...]]:
        """Where chunks of the first ``rows`` (default: all) have a file: few, however large the array says it is."""
        spans = (self.rows if rows is None else rows, *self._form.size)
        yield from self._places((), [-(-span // size) for span, size in zip(spans, self._form.chunk, strict=True)])

    def _places(self, begun: tuple[int, ...], grid: list[int]) -> Iterator[tuple[int, ...]]:
        if len(begun) == len(grid):
            yield begun
            return
        names = names_in(self._path, self._file(begun))
        # Names of other digits, or with a zero in front, are no chunk's.
        numbers = {int(name) for name in names if name.isascii() and name.isdigit() and len(name) < 20}
        for number in sorted(numbers):
            if number < grid[len(begun)] and str(number) in names:
                yield from self._places((*begun, number), grid)

    def carry(self, new: Path, rows: int) -> None:
        """Give the store at ``new`` this array, cut to ``rows`` where there is one for each epoch.

        By hard links, which do no harm: files of the history are replaced and not written to.
        """
        kept = min(self.rows, rows) if self._form.rows is None else self.rows
        copy = type(self)(new, self._name.removeprefix(f"{GROUP}/"), self._form, kept, self.attributes)
        copy.update()
        for place in self.places(kept):
            rest = kept - place[0] * self._form.chunk[0]
            if rest < self._form.chunk[0]:  # what is cut off must not show when rows are added
                copy.write(self.read(*place)[:rest], *place)
                continue
            try:
                link_inside(self._path, new, self._file(place))
            except OSError:  # a file system without links
                copy.write(self.read(*place), *place)

    def _file(self, place: tuple[int, ...]) -> str:
        return "/".join((self._name, "c", *map(str, place)))


def _read_json(path: Path, name: str) -> dict[str, Any] | None:
    """What zarr.json of the folder ``name`` holds; None where there is nothing yet."""
    file = f"{name}/{_METADATA}"
    with suppress(FileNotFoundError):
        return parse_json(read_inside(path, file, METADATA_LIMIT))
    others = set(names_in(path, name)) - _BEGUN
    if _METADATA in others:  # a run has written it since
        return parse_json(read_inside(path, file, METADATA_LIMIT))
    if others:
        raise ValueError(f"{name} is not of Zarr's format 3; there is {min(others)}")
    return None


def _write_json(path: Path, name: str, metadata: dict[str, Any]) -> None:
    replace_inside(path, f"{name}/{_METADATA}", json.dumps(metadata, indent=2).encode())


def _check(found: dict[str, Any], wanted: dict[str, Any], name: str) -> None:
    """Raise ValueError unless all that reading depends on is as wanted."""
    for key in wanted.keys() - {"attributes"}:
        there, value = found.get(key, [] if key == "storage_transformers" else None), wanted[key]
        # As text, not by ==, to which 1, 1.0 and true are the same.
        if json.dumps(_told(key, there), sort_keys=True) != json.dumps(_told(key, value), sort_keys=True):
            raise ValueError(f"{key} of {name} is {short(there)}, not {value}")


def _told(key: str, found: Any) -> Any:
    """Of codecs, only what decoding depends on: not what they were told when they compressed."""
    if key != "codecs" or not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        return found
    return [found[:1], *(one.get("name") for one in found[1:])]
