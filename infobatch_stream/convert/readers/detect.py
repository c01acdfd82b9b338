"""What a user means by SRC: the kind of source that it is."""

import os
from collections.abc import Mapping
from pathlib import Path

from infobatch_stream._urls import has_scheme
from infobatch_stream.convert.readers.cifar import CIFAR
from infobatch_stream.convert.readers.class_folders import some
from infobatch_stream.convert.readers.described_images import DESCRIBED_IMAGES, read_splits
from infobatch_stream.convert.readers.hf_dataset import SAVED_DATASET
from infobatch_stream.convert.readers.idx import IDX
from infobatch_stream.convert.readers.images import EXPECTED, NoImagesError, has_images, read_images
from infobatch_stream.convert.readers.mds import MDS
from infobatch_stream.convert.readers.options import Options
from infobatch_stream.convert.readers.table_files import TABLES
from infobatch_stream.convert.readers.tars import TARS, TarSet
from infobatch_stream.errors import ConfigError, MissingExtraError
from infobatch_stream.formats.schema import SampleSet
from infobatch_stream.sources.patterns import expand_all

__all__ = ["read_source"]

_FORMATS = (MDS, TARS, TABLES, SAVED_DATASET, IDX, CIFAR, DESCRIBED_IMAGES)
"""What is looked for, in this order. Class folders are what is left when none of these is found."""

_EXPECTED = (
    f"expected either {EXPECTED}, or {', or '.join(format.expected for format in reversed(_FORMATS))}; tars and tables "
    "may be named by a pattern too, 'data-{000..099}.tar' or 'data-*.parquet'"
)


def read_source(
    src: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    encodings: Mapping[str, str] | None = None,
    extensions: Mapping[str, str] | None = None,
    keys: bool = True,
    fill: Mapping[str, str] | None = None,
    skip: bool = False,
    allow_empty: bool = False,
) -> list[SampleSet]:
    """The sample sets of ``src``: one per split where it has splits, else one. All have the same classes.

    src: a folder of class folders with images, of idx files, of CIFAR's Python files, of MDS shards, of tars or of
        tables, or one that Hugging Face's ``save_to_disk`` wrote; a tar or a table (Parquet, CSV); or a pattern of
        those.
    columns: name -> what it is called in the source, which selects and renames; of tars extensions, of which a sample
        has one: ``{"image": "jpg;png", "label": "cls"}``. By default all.
    encodings, extensions: how columns are stored in MDS, and as members of a tar, where it is not as inferred.
    keys: whether samples keep the keys that they have.
    fill: column -> the text that stands for its nulls, of tables.
    skip: samples that cannot be read are passed over by the caller, and whole shards here; else those that
        are known at once raise at once.
    allow_empty: class folders without images keep their numbers, instead of being refused.

    Raises ConfigError where ``src`` is none of these, or more than one, and for columns that there are not; DataError
    for data that is damaged.
    """
    options = Options(columns, encodings, extensions, keys=keys, skip=skip, fill=fill)
    text = os.fspath(src)
    path = Path(text)
    if has_scheme(text) and TABLES.is_file(text) and not text.startswith("file:"):
        raise ConfigError(f"{text}: tables are read from this machine only; copy it here first, and convert the copy.")
    if has_scheme(text) or (text.endswith(".tar") and not path.is_dir()):
        return [TarSet([text], options)]
    if path.is_dir():
        return _read_folder(path, options, allow_empty=allow_empty)
    return _read_files(text, _matches(text), options)


def _matches(text: str) -> list[str]:
    """The files or folders that a path or pattern means. Raises ConfigError where one is not there."""
    try:
        found = expand_all(text)
    except ValueError as error:
        raise ConfigError(f"The braces in {text!r} do not match; write 'data-{{000..099}}.parquet'.") from error
    except ImportError as error:
        raise MissingExtraError.of("braceexpand", "wds") from error
    missing = [name for name in found if not os.path.exists(name)]  # noqa: PTH110  # Path's raises if it is too long
    if missing or not found:
        raise ConfigError(f"{(missing or [text])[0]} does not exist; {_EXPECTED}.")
    return found


def _read_files(text: str, found: list[str], options: Options) -> list[SampleSet]:
    for format in _FORMATS:
        if format.open_files and all(map(format.is_file, found)):
            return list(format.open_files(found, options))
    if found == [text]:
        raise ConfigError(f"{text} is a file; {_EXPECTED}.")
    if all(map(os.path.isdir, found)):
        raise ConfigError(
            f"{text} matches the folders {some(found)}; convert each on its own, or name the files in them "
            "('data/**/*.tar', 'data/**/*.parquet')."
        )
    raise ConfigError(f"{text} matches {some(found)}, which are no tars and no tables; {_EXPECTED}.")


def _read_folder(src: Path, options: Options, *, allow_empty: bool) -> list[SampleSet]:
    names = sorted(path.name for path in src.iterdir() if path.is_file() and not path.name.startswith("."))
    found = [(format, found) for format in _FORMATS if (found := format.find(src, names))]
    there = [one.what for _, one in found]
    if there and not any(format.owns_folders for format, _ in found) and has_images(src):
        there.append("class folders with images")
    if len(there) > 1:
        raise ConfigError(
            f"{src} holds {' and '.join(there)}; only one kind can be converted at a time. Name the files "
            f"({src / '*.tar'}, {src / '*.parquet'}), or move one kind to another folder."
        )
    if found:
        return list(found[0][1].open(options))
    folders = sorted(path for path in src.iterdir() if path.is_dir())
    shards = [path.name for path in folders if (path / "index.json").is_file() or any(path.glob("*.tar"))]
    if shards:
        raise ConfigError(
            f"{src} holds shards in its folders {some(shards)}; convert each on its own, e.g. infobatch-stream "
            f"convert {src / shards[0]} DST/{shards[0]} --format ..."
        )
    try:
        return read_splits(src, options) or list(read_images(src, options, allow_empty=allow_empty))
    except NoImagesError as error:
        raise ConfigError(f"{str(error).removesuffix('.')}; {_EXPECTED}.") from None
