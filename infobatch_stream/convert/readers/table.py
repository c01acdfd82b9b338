"""Tables: a sample is a row."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.convert.readers.exact_values import exact_fit, fill_of
from infobatch_stream.convert.readers.options import Options, check_once, misfit
from infobatch_stream.errors import ConfigError, DataError, MissingExtraError
from infobatch_stream.formats.extensions import split_prefix, without_clashes
from infobatch_stream.formats.fingerprint import fingerprint
from infobatch_stream.formats.schema import KEY, Column, Encoded, Sample, SampleSet

if TYPE_CHECKING:
    import pyarrow as pa

    from infobatch_stream.convert.readers.arrow_file import ArrowFile
    from infobatch_stream.convert.readers.arrow_types import Kind

__all__ = ["TableSet", "is_table", "require_pyarrow"]

_LOOKED_AT = 100  # rows, evenly spaced, to tell whether bytes are images


def is_table(name: str) -> bool:
    """Whether a file of this name is a table."""
    return name.endswith((".parquet", ".csv", ".csv.gz"))


def require_pyarrow() -> None:
    """Raise MissingExtraError without pyarrow."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of("pyarrow", "tools") from error


class TableSet(SampleSet):
    """The rows of Arrow streams, which are mapped into memory, in their order. Raises ConfigError and DataError.

    streams: files, whose columns are the same.
    origins: (file, rows) of each file that the rows are from, in their order: for errors.
    unpacked: the temporary file that the streams are; None where they are the user's own, which are checked.
    misfits: see `ArrowFile`.
    """

    def __init__(
        self,
        name: str,
        streams: Sequence[str],
        origins: Sequence[tuple[Path, int]],
        options: Options,
        unpacked: "ArrowFile | None" = None,
        misfits: Mapping[str, Mapping[int, str]] | None = None,
        state: Path | None = None,
    ) -> None:
        """Looks at all lengths, and at some of the values.

        state: a file that is another where the rows are; None for ``origins``.
        """
        require_pyarrow()
        self.name = name
        self._streams, self._unpacked, self._checked = list(streams), unpacked, unpacked is not None
        self._misfits = misfits or (unpacked.misfits if unpacked else {})
        self.notes = notes = list(unpacked.notes) if unpacked else []
        self._files = [str(path) for path, _ in origins]
        self._file_ends: list[int] = np.cumsum([rows for _, rows in origins]).tolist()
        self._load()
        schema = self._batches[0].schema
        check_once(schema.names, self._files[0])
        features = _features_of(schema.metadata)
        notes += options.left_out(schema.names, self._files[0])
        self._kinds = self._kinds_of(options.offered(schema.names), features, options, notes)
        choice = options.choose(self._stored(options), self._files[0])
        self.columns, self._sources = choice.columns, choice.sources
        for column in self.columns.keys() - {KEY}:
            options.check_name(column)
        if not self.columns.keys() - {KEY}:
            held = "no column but the keys" if self.columns else "no columns"
            raise ConfigError(f"{self._files[0]} has {held}; there is nothing to convert.")
        self._name_files(options)
        self._changed = options.given
        fill = (options.fill or {}).items()
        self._fill = {column: fill_of(column, text, self.columns, self._files[0]) for column, text in fill}
        self.classes = _classes_of(features, self._sources)
        self.fingerprint = fingerprint(
            "table",
            [
                name,
                *(n for path in self._files for n in (Path(path).name, Path(path).stat().st_size)),
                *self._file_ends,
                *map(_digest, [path for path, _ in origins] if state is None else [state]),
            ],
        )
        if not options.skip:
            self._refuse_misfits()

    def __len__(self) -> int:
        """Number of rows."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, position: int) -> Sample:
        """The row; raises DataError for a null, and for what does not fit its column."""
        return {name: self._value(position, name) for name in self._sources}

    def sizes(self) -> NDArray[np.int64]:
        """int64[len]: from lengths; only what becomes JSON is looked at itself."""
        sizes = [
            sum(self._kinds[source].sizes(self._array(number, source)) for source in self._sources.values())
            for number in range(len(self._batches))
        ]
        return np.concatenate(sizes)

    def where(self, position: int) -> str:
        """The file and row of the sample at ``position``."""
        file = bisect_right(self._file_ends, position)
        row = position - (self._file_ends[file - 1] if file else 0)
        return f"{self._files[file]}: row {row:,} ({position:,} of all)"

    def __getstate__(self) -> dict[str, Any]:
        """State without what is mapped: each process has its own. The temporary file stays with its maker."""
        gone = ("_batches", "_ends", "_arrays")
        return {name: value for name, value in vars(self).items() if name not in gone} | {"_unpacked": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The state, with the streams mapped anew."""
        vars(self).update(state)
        self._load()

    def _kinds_of(
        self, names: Sequence[str], features: Mapping[str, Any], options: Options, notes: list[str]
    ) -> dict[str, "Kind"]:
        """The kind of each column among ``names`` that is wanted; what a user should know is added to ``notes``."""
        from infobatch_stream.convert.readers.arrow_types import Number, Text, kind_of

        numbers = np.unique(np.linspace(0, len(self) - 1, _LOOKED_AT, dtype=np.int64)).tolist()
        places = [self._place(number) for number in numbers]
        folder = Path(self._files[0]).parent
        kinds: dict[str, Kind] = {}
        for column in names:
            if options.columns is not None and column not in options.columns.values():
                continue
            arrays = [self._array(number, column) for number in range(len(self._batches))]
            rows = [(arrays[batch], row) for batch, row in places if arrays[batch][row].is_valid]
            encoding = (options.encodings or {}).get(options.called(column))
            kind = kinds[column] = kind_of(column, features.get(column), arrays, rows, folder, encoding, notes)
            if column == KEY and not isinstance(kind, Text) and not (isinstance(kind, Number) and kind.whole):
                raise ConfigError(
                    f"the column {KEY!r} names the samples, by texts or whole numbers, and not by {arrays[0].type}; "
                    "choose the others (--column)."
                )
        return kinds

    def _stored(self, options: Options) -> dict[str, Column]:
        """How each column is stored, but for what the user says."""
        from infobatch_stream.convert.readers.image_columns import FileColumn

        # Two columns of images clash, whatever their extensions: those are looked at in some rows only.
        pictures = {n for n, kind in self._kinds.items() if isinstance(kind, FileColumn) and kind.images}
        sources = {options.called(source): source for source in self._kinds if source != KEY}
        wanted = {n: "jpg" if source in pictures else self._kinds[source].column.wds for n, source in sources.items()}
        found = {KEY: Column("str", "txt")}
        for name, extension in without_clashes(wanted).items():
            kind = self._kinds[sources[name]]
            stored = extension
            if isinstance(kind, FileColumn) and kind.images:
                kind.prefix = split_prefix(extension)[0]
                stored = kind.prefix + kind.column.wds
            found[sources[name]] = Column(kind.column.mds, stored)
        return {source: found[source] for source in self._kinds}

    def _name_files(self, options: Options) -> None:
        """Give files the extension that all of a column have, where it is not an image's own."""
        from infobatch_stream.convert.readers.image_columns import FileColumn

        for column, source in self._sources.items():
            kind = self._kinds[source]
            if isinstance(kind, FileColumn) and (column in (options.extensions or {}) or not kind.images):
                kind.extension = self.columns[column].wds

    def _refuse_misfits(self) -> None:
        """Raise DataError for the first row of a column of which it is seen without its value that it does not fit."""
        for name, source in self._sources.items():
            for number, end in enumerate(self._ends):
                array = self._array(number, source)
                rows = set(self._kinds[source].doubtful(array).tolist())
                if array.null_count:
                    rows.update(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False)).tolist())
                for row in sorted(rows):
                    self._value(end - len(array) + row, name)

    def _value(self, position: int, name: str) -> Any:
        """One field of the row. Raises DataError."""
        batch, row = self._place(position)
        source, mds = self._sources[name], self.columns[name].mds
        array, kind = self._array(batch, source), self._kinds[source]
        try:
            if array[row].is_valid:
                value = kind.value(array, row)
                return str(value) if source == KEY else exact_fit(value, mds) if name in self._changed else value
            if position in self._misfits.get(source, {}):
                raise ValueError(self._misfits[source][position])
        except (ValueError, DataError) as error:
            raise misfit(self.where(position), name, mds, error, _other(kind, array.type, mds, error)) from error
        if name in self._fill:
            return self._fill[name]
        if mds == "json":
            return Encoded(b"null")
        raise DataError(
            f"{self.where(position)}: the column {name!r} is empty (null). Give what is to stand for it "
            f"(--fill {name}=VALUE), leave such rows out (--on-error skip), or choose the other columns (--column)."
        )

    def _load(self) -> None:
        from infobatch_stream.convert.readers.arrow_file import read_stream

        self._batches: list[pa.RecordBatch] = [batch for stream in self._streams for batch in read_stream(stream)]
        if not self._batches:
            raise DataError(f"{self._files[0]} has no rows; there is nothing to convert.")
        if any(batch.schema != self._batches[0].schema for batch in self._batches):
            raise DataError(f"{self._files[0]} and the files beside it have different columns; write them again.")
        self._ends: list[int] = np.cumsum([batch.num_rows for batch in self._batches]).tolist()
        self._arrays: dict[tuple[int, str], pa.Array] = {}

    def _array(self, number: int, column: str) -> "pa.Array":
        """A column of a batch, without extension types and dictionaries; of a file that is not ours checked, once."""
        if (number, column) not in self._arrays:
            import pyarrow as pa

            from infobatch_stream.convert.readers.plain_arrow import plain

            array = self._batches[number].column(column)
            if not self._checked:
                kind = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(array.type)
                try:
                    # Of texts the offsets: whether they are UTF-8 is seen where they are read.
                    (array.view(kind) if kind else array).validate(full=True)
                except pa.ArrowInvalid as error:
                    raise DataError(f"{self.where(self._ends[number] - 1)}: damaged ({error}).") from error
            self._arrays[number, column] = plain(array)
        return self._arrays[number, column]

    def _place(self, position: int) -> tuple[int, int]:
        """Number of the batch that has the row, and which of its rows it is."""
        batch = bisect_right(self._ends, position)
        return batch, position - (self._ends[batch - 1] if batch else 0)


def _other(kind: "Kind", type_: "pa.DataType", mds: str, error: Exception) -> str | None:
    """An encoding that a value would fit which is none of ``mds``; None if there is none."""
    from infobatch_stream.convert.readers.image_columns import FileColumn, NoFileError

    if isinstance(error, NoFileError | DataError) or mds == "json":
        return None
    if isinstance(kind, FileColumn):
        return "bytes" if mds != "bytes" else None
    return "json" if type_.num_fields else "bytes"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _features_of(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The features of a Hugging Face dataset, which it keeps in the metadata of a schema; {} where there are none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _classes_of(features: Mapping[str, Any], sources: Mapping[str, str]) -> list[str] | None:
    """The names of the classes: of the one column that has any, or of that which is called label."""
    found = {}
    for name, source in sources.items():
        feature = features.get(source)
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            names = feature.get("names")
            if isinstance(names, list) and all(isinstance(one, str) for one in names):
                found[name] = names
    for name in ("label", "labels", "class"):
        if name in found:
            return found[name]
    return next(iter(found.values())) if len(found) == 1 else None
