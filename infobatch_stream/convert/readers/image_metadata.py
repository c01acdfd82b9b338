"""Images with a table beside them that names each and tells more of it, as Hugging Face's imagefolder takes them."""

import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from infobatch_stream.convert.readers.arrow_file import ArrowFile, parquet_names, read_stream
from infobatch_stream.convert.readers.class_folders import images_below, some
from infobatch_stream.convert.readers.options import Options, unknown
from infobatch_stream.convert.readers.plain_arrow import is_text
from infobatch_stream.convert.readers.table import TableSet, is_table
from infobatch_stream.convert.readers.temp_folder import temporary_folder
from infobatch_stream.convert.readers.text_files import TextFiles
from infobatch_stream.errors import ConfigError, DataError

__all__ = ["MetadataSet"]

_NAME = "file_name"
_LABELS = frozenset({"label", "labels", "class", "classes"})  # a table that has one tells the classes itself
_FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as kinds of columns know it


class MetadataSet(TableSet):
    """The rows of a ``metadata.csv``, ``.jsonl`` or ``.parquet``, with the image that ``file_name`` means.

    That column becomes ``image``, and one as ``mask_file_name`` becomes ``mask``; paths are below the folder of the
    table. Images that no row names are left out, with a note. Raises ConfigError and DataError.
    """

    in_files = True

    def __init__(self, name: str, table: Path, options: Options, texts: TextFiles) -> None:
        """``name``: of the split, "" for none. ``texts``: see `ArrowFile`."""
        names = texts.names(table) if table in texts else parquet_names(table)
        there = set(images_below(table.parent))
        if not any(map(_image_of, names)):
            raise _without_paths(table, names, there)
        unpacked = ArrowFile([table], _own(options, names, table), texts)
        batches, notes = read_stream(unpacked.path), unpacked.notes
        if not batches:
            raise DataError(f"{table} has no rows; there is nothing to convert.")
        columns = _image_columns(table, batches[0].schema, there)
        stream = Path(temporary_folder(self), "rows.arrow")
        named = [_with_files(batch, columns) for batch in batches]
        with pa.OSFile(str(stream), "wb") as sink, pa.ipc.new_stream(sink, named[0].schema) as writer:
            for batch in named:
                writer.write_batch(batch)
        paths = [path for batch in batches for column in columns for path in batch.column(column).to_pylist()]
        if not options.skip:
            _check_there(table, columns, paths, there)
        rows = sum(batch.num_rows for batch in batches)
        options = _with_json(options, unpacked.as_json)
        super().__init__(name, [str(stream)], [(table, rows)], options, misfits=unpacked.misfits)
        left = sorted(there.difference(os.path.normpath(path) for path in paths if path))
        if left:
            notes = [*notes, f"{table} has no row for {len(left):,} images beside it, which are left out: {some(left)}"]
        if options.columns is None and not _LABELS.intersection(map(str.lower, names)):
            notes = [*notes, *_folder_notes(table, batches, next(iter(columns)))]
        self.notes = [*self.notes, *notes]


def _own(options: Options, names: Sequence[str], table: Path) -> Options:
    """``options`` for the table itself, which has the columns ``names``: paths are text, and are always wanted.

    Raises ConfigError for columns that there are not.
    """
    if options.columns is None:
        return options
    images = {name: image for name in names if (image := _image_of(name))}
    own = {image: name for name, image in images.items()} | {name: name for name in names if name not in images}
    for source in options.columns.values():
        if source not in own:
            raise unknown(source, own, table)
    columns = {f"__{name}": name for name in images}
    columns |= {name: own[source] for name, source in options.columns.items() if own[source] not in images}
    return replace(options, columns=columns)


def _with_json(options: Options, as_json: Set[str]) -> Options:
    """``options`` with the encoding of the columns ``as_json`` of a table."""
    columns = options.columns or {name: name for name in as_json}
    found = {name: "json" for name, own in columns.items() if own in as_json}
    return replace(options, encodings={**found, **(options.encodings or {})})


def _image_of(name: str) -> str | None:
    """What an image is called whose path is in the column ``name``: of mask_file_name it is mask; None for others."""
    if name == _NAME:
        return "image"
    return name.removesuffix(f"_{_NAME}") or None if name.endswith(f"_{_NAME}") else None


def _image_columns(table: Path, schema: pa.Schema, there: Set[str]) -> Mapping[str, str]:
    """The columns of paths -> what is called so of their images. Raises ConfigError."""
    texts = [field.name for field in schema if is_text(field.type)]
    found = {name: image for name in texts if (image := _image_of(name))}
    if not found:
        raise _without_paths(table, schema.names, there)
    names = [found.get(name, name) for name in schema.names]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{table} has two columns that are called {twice!r}, of which one holds paths; rename one.")
    return found


def _without_paths(table: Path, names: Sequence[str], there: Set[str]) -> ConfigError:
    """The error for a table beside the images ``there`` that does not say which they are."""
    ways = [f"Add one (or one as 'mask_{_NAME}')"]
    if is_table(table.name):
        ways.append(f"name the table to convert it without the images ({table})")
    if any(os.sep in path for path in there):
        ways.append("move it away to convert the images alone, with their folders as classes")
    return ConfigError(
        f"{table} lies beside images, and has no column {_NAME!r} of text with their paths, only "
        f"{', '.join(map(repr, names[:50]))}. {', or '.join(ways)}."
    )


def _folder_notes(table: Path, batches: Sequence[pa.RecordBatch], column: str) -> list[str]:
    """A note where all images of ``column`` lie in several folders, which may be classes."""
    paths = [os.path.normpath(path) for batch in batches for path in batch.column(column).to_pylist() if path]
    folders = sorted({path.partition(os.sep)[0] for path in paths})
    if len(folders) < 2 or not all(os.sep in path for path in paths):
        return []
    return [
        f"{table.parent}: the folders of the images ({some(folders)}) are not taken as labels, as {table.name} tells "
        f"of the images. If they are classes, add a column 'label' to it; or move {table.name} away to convert the "
        "classes without it"
    ]


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
