"""Images with a table beside them that names each and tells more of it, as Hugging Face's imagefolder takes them."""

import os
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.json

from infobatch_stream.errors import ConfigError, DataError

from .class_folders import images_below, some
from .columns import Options
from .spool import Spool
from .streams import read_stream
from .table import TableSet
from .temporary import temporary_folder

__all__ = ["MetadataSet"]

_NAME = "file_name"
_FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as kinds of columns know it
_BLOCK = 1 << 24  # bytes of the longest line of JSON


class MetadataSet(TableSet):
    """The rows of a ``metadata.csv``, ``.jsonl`` or ``.parquet``, with the image that ``file_name`` means.

    That column becomes ``image``, and one as ``mask_file_name`` becomes ``mask``; paths are below the folder of the
    table. Images that no row names are left out, with a note. Raises ConfigError and DataError.
    """

    in_files = True

    def __init__(self, name: str, table: Path, options: Options) -> None:
        """``name``: of the split, "" for none."""
        batches, misfits, notes = _read(table, options)
        columns = _image_columns(table, batches[0].schema)
        stream = Path(temporary_folder(self), "rows.arrow")
        named = [_with_files(batch, columns) for batch in batches]
        with pa.OSFile(str(stream), "wb") as sink, pa.ipc.new_stream(sink, named[0].schema) as writer:
            for batch in named:
                writer.write_batch(batch)
        paths = [path for batch in batches for column in columns for path in batch.column(column).to_pylist()]
        there = set(images_below(table.parent))
        if not options.skip:
            _check_there(table, columns, paths, there)
        rows = sum(batch.num_rows for batch in batches)
        super().__init__(name, [str(stream)], [(table, rows)], options, misfits=misfits)
        left = sorted(there.difference(os.path.normpath(path) for path in paths if path))
        if left:
            notes = [*notes, f"{table} has no row for {len(left):,} images beside it, which are left out: {some(left)}"]
        self.notes = [*self.notes, *notes]


def _read(table: Path, options: Options) -> tuple[list[pa.RecordBatch], Mapping[str, Mapping[int, str]], list[str]]:
    """All columns of the table, and the misfits and notes of its `Spool`. Raises ConfigError and DataError."""
    misfits: Mapping[str, Mapping[int, str]] = {}
    notes: list[str] = []
    if table.suffix == ".jsonl":
        batches = _read_json(table)
    else:
        own = options.columns or {}  # what columns are called in the table
        encodings, fill = (
            {own.get(name, name): told for name, told in (given or {}).items()}
            for given in (options.encodings, options.fill)
        )
        spool = Spool([table], Options(encodings=encodings, skip=options.skip, fill=fill))
        misfits, notes, batches = spool.misfits, spool.notes, read_stream(spool.path)
    if not batches:
        raise DataError(f"{table} has no rows; there is nothing to convert.")
    return batches, misfits, notes


def _read_json(table: Path) -> list[pa.RecordBatch]:
    """The lines of JSON; what looks like a time stays the text that it is."""
    block = pa.json.ReadOptions(block_size=_BLOCK, use_threads=False)
    try:
        found = pa.json.read_json(table, block)
        times = [field.name for field in found.schema if pa.types.is_temporal(field.type)]
        if times:
            texts = pa.schema([(name, pa.string()) for name in times])
            found = pa.json.read_json(table, block, pa.json.ParseOptions(explicit_schema=texts))
    except pa.ArrowException as error:
        raise DataError(
            f"{table} cannot be read: {error}; each line is one JSON object, with the same keys."
        ) from error
    batches: list[pa.RecordBatch] = found.combine_chunks().to_batches()
    return batches


def _image_columns(table: Path, schema: pa.Schema) -> Mapping[str, str]:
    """The columns of paths -> what is called so of their images. Raises ConfigError."""
    texts = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    found = {name: name.removesuffix(_NAME).removesuffix("_") or "image" for name in texts if name.endswith(_NAME)}
    found = {name: image for name, image in found.items() if name in (_NAME, f"{image}_{_NAME}")}
    if not found:
        raise ConfigError(
            f"{table} lies beside images, and has no column {_NAME!r} of text with their paths, only "
            f"{', '.join(map(repr, schema.names[:50]))}. Add one (or one as 'mask_{_NAME}'), or name the table to "
            f"convert it without the images ({table})."
        )
    names = [found.get(name, name) for name in schema.names]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{table} has two columns that are called {twice!r}, of which one holds paths; rename one.")
    return found


def _with_files(batch: pa.RecordBatch, columns: Mapping[str, str]) -> pa.RecordBatch:
    """``batch`` with files in the place of their paths."""
    arrays = []
    for name in batch.schema.names:
        array = batch.column(name)
        if name in columns:
            empty = pa.nulls(len(array), pa.binary())
            array = pa.StructArray.from_arrays([empty, array.cast(pa.string())], fields=list(_FILE))
        arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, [columns.get(name, name) for name in batch.schema.names])


def _check_there(table: Path, columns: Mapping[str, str], paths: list[str | None], there: set[str]) -> None:
    """Raise DataError for rows without a path, or whose image is not there."""
    missing = [
        path
        for path in paths
        if not path or (os.path.normpath(path) not in there and not (table.parent / path).is_file())
    ]
    if missing:
        what = repr(missing[0]) if missing[0] else "an empty path"
        raise DataError(
            f"{table}: {len(missing):,} of {len(paths):,} images that it names ({', '.join(columns)}) are not there, "
            f"the first {what}; put them there, remove the rows, or leave them out (--on-error skip)."
        )
