"""Tables: a sample is a row."""

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import DataError, MissingExtraError
from infobatch_stream.sources.base import fingerprint

from ..encodings import fit
from ..extensions import split_prefix, without_clashes
from ..samples import Column, Sample, SampleSet
from .columns import Options, misfit

if TYPE_CHECKING:
    import pyarrow as pa

    from .spool import Spool

__all__ = ["TableSet", "is_table", "read_tables", "require_pyarrow"]

_LOOKED_AT = 100  # rows, evenly spaced, to tell whether bytes are images


def is_table(name: str) -> bool:
    """Whether a file of this name is a table that `read_tables` reads."""
    return name.endswith((".parquet", ".csv", ".csv.gz"))


def require_pyarrow() -> None:
    """Raise MissingExtraError without pyarrow."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of("pyarrow", "tools") from error


class TableSet:
    """The rows of Arrow streams, which are mapped into memory, in their order. Raises ConfigError and DataError.

    streams: files, whose columns are the same. origins: what rows are called after in errors: (file, rows) of each,
        in their order. spool: what keeps the streams from being removed; None where they are the user's own, which are
        checked.
    """

    skipped = 0
    notes: Sequence[str] = ()
    lost: Sequence[str] = ()
    in_files = False
    is_shards = False

    def __init__(
        self,
        name: str,
        streams: Sequence[str],
        origins: Sequence[tuple[Path, int]],
        options: Options,
        spool: "Spool | None" = None,
    ) -> None:
        """Looks at all lengths, and at some of the values."""
        require_pyarrow()
        from .kinds import Picture, kind_of

        self.name = name
        self._streams, self._spool, self._checked = list(streams), spool, spool is not None
        self._files = [str(path) for path, _ in origins]
        self._file_ends: list[int] = np.cumsum([rows for _, rows in origins]).tolist()
        self._load()
        first = self._batches[0]
        self._names = [field.name for field in first.schema]
        features = _features(first.schema.metadata)
        numbers = np.unique(np.linspace(0, max(len(self) - 1, 0), _LOOKED_AT, dtype=np.int64)).tolist()
        places = [self._place(number) for number in numbers] if len(self) else []
        folder = origins[0][0].parent
        kinds = {}
        chosen = self._names if options.columns is None else [n for n in self._names if n in options.columns.values()]
        for column in chosen:
            arrays = [self._array(number, column) for number in range(len(self._batches))]
            rows = [(arrays[batch], row) for batch, row in places if arrays[batch][row].is_valid]
            kinds[column] = kind_of(column, features.get(column), arrays, rows, folder)
        pictures = {n: kind for n, kind in kinds.items() if isinstance(kind, Picture) and kind.images}
        # Two columns of images clash, whatever their extensions: those are looked at in some rows only.
        wanted = {n: "jpg" if n in pictures else kind.column.wds for n, kind in kinds.items()}
        found: dict[str, Column] = {}
        for column, extension in without_clashes(wanted).items():
            kind = kinds[column]
            if column in pictures:
                pictures[column].prefix = split_prefix(extension)[0]
                extension = pictures[column].prefix + kind.column.wds  # noqa: PLW2901
            found[column] = Column(kind.column.mds, extension)
        choice = options.choose(found, self._files[0])
        self.columns, self._sources = choice.columns, choice.sources
        for column, source in self._sources.items():
            kind = kinds[source]
            if isinstance(kind, Picture) and (column in (options.extensions or {}) or not kind.images):
                kind.extension = self.columns[column].wds
        self._kinds = kinds
        self._changed = options.given
        self.classes = _classes(features, self._sources)
        self.fingerprint = fingerprint(
            "table",
            [
                name,
                *(n for path in self._files for n in (Path(path).name, Path(path).stat().st_size)),
                *self._file_ends,
            ],
        )

    def __len__(self) -> int:
        """Number of rows."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, position: int) -> Sample:
        """The row; raises DataError for a null, and for what does not fit its column."""
        batch, row = self._place(position)
        sample: dict[str, Any] = {}
        for name, source in self._sources.items():
            array = self._array(batch, source)
            try:
                if not array[row].is_valid:
                    raise ValueError("it is empty (null); fill it in, or remove the row")
                value = self._kinds[source].value(array, row)
                sample[name] = fit(value, self.columns[name].mds) if name in self._changed else value
            except (ValueError, DataError) as error:
                raise misfit(self._where(position), name, self.columns[name].mds, error) from error
        return sample

    def sizes(self) -> NDArray[np.int64]:
        """int64[len]: from lengths; only what becomes JSON is looked at itself."""
        sizes = [
            sum(self._kinds[source].sizes(self._array(number, source)) for source in self._sources.values())
            for number in range(len(self._batches))
        ]
        return np.concatenate(sizes)

    def __getstate__(self) -> dict[str, Any]:
        """State without what is mapped: each process has its own. The spool stays with the one that made it."""
        gone = ("_batches", "_ends", "_arrays")
        return {name: value for name, value in vars(self).items() if name not in gone} | {"_spool": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The state, with the streams mapped anew."""
        vars(self).update(state)
        self._load()

    def _load(self) -> None:
        from .streams import read_stream

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

            array = self._batches[number].column(column)
            if not self._checked:
                kind = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(array.type)
                try:
                    # Of texts the offsets: whether they are UTF-8 is seen where they are read.
                    (array.view(kind) if kind else array).validate(full=True)
                except pa.ArrowInvalid as error:
                    raise DataError(f"{self._where(self._ends[number] - 1)}: damaged ({error}).") from error
            while isinstance(array, pa.ExtensionArray | pa.DictionaryArray):
                array = array.storage if isinstance(array, pa.ExtensionArray) else array.dictionary_decode()
            self._arrays[number, column] = array
        return self._arrays[number, column]

    def _place(self, position: int) -> tuple[int, int]:
        """Number of the batch that has the row, and which of its rows it is."""
        batch = bisect_right(self._ends, position)
        return batch, position - (self._ends[batch - 1] if batch else 0)

    def _where(self, position: int) -> str:
        file = bisect_right(self._file_ends, position)
        row = position - (self._file_ends[file - 1] if file else 0)
        return f"{self._files[file]}: row {row:,} ({position:,} of all)"


def read_tables(tables: Sequence[Path], options: Options) -> list[SampleSet]:
    """The rows of Parquet or of CSV files, unpacked into a temporary folder. Raises ConfigError and DataError.

    Files that are named as those of the Hugging Face hub, ``train-00000-of-00002.parquet``, are a set per split.
    """
    require_pyarrow()
    from .spool import Spool

    sets: list[SampleSet] = []
    for split, files in _splits(tables).items():
        spool = Spool(files, options)
        origins = list(zip(files, spool.rows, strict=True))
        sets.append(TableSet(split, [spool.path], origins, options, spool))
    return sets


def _splits(tables: Sequence[Path]) -> Mapping[str, list[Path]]:
    import re

    splits: dict[str, list[Path]] = {}
    for table in tables:
        match = re.fullmatch(r"(\w[\w.-]*)-\d{5}-of-\d{5}(-\w+)?\.parquet", table.name)
        splits.setdefault(match[1] if match else "", []).append(table)
    return {"": list(tables)} if len(splits) < 2 or "" in splits else splits


def _features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The features of a Hugging Face dataset, which it keeps in the metadata of a schema; {} where there are none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _classes(features: Mapping[str, Any], sources: Mapping[str, str]) -> list[str] | None:
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
