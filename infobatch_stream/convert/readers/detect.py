"""What a user means by SRC: the kind of source that it is."""

import os
from collections.abc import Mapping
from pathlib import Path

from infobatch_stream._urls import has_scheme
from infobatch_stream.convert.readers.cifar import cifar_kind, read_cifar
from infobatch_stream.convert.readers.class_folders import is_image_file, is_split, metadata_of, some, subfolders
from infobatch_stream.convert.readers.hf_dataset import read_saved
from infobatch_stream.convert.readers.idx import IdxPair, idx_pairs
from infobatch_stream.convert.readers.images import EXPECTED, has_images, read_images
from infobatch_stream.convert.readers.mds import MdsSet
from infobatch_stream.convert.readers.options import Options
from infobatch_stream.convert.readers.table import is_table, require_pyarrow
from infobatch_stream.convert.readers.table_files import read_tables
from infobatch_stream.convert.readers.tars import TarSet
from infobatch_stream.errors import ConfigError, MissingExtraError
from infobatch_stream.formats.schema import SampleSet
from infobatch_stream.formats.shard_list import lists_tars
from infobatch_stream.sources.patterns import expand_all

__all__ = ["read_source"]


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
    skip: samples that cannot be read are passed over by the caller, and whole shards here; else those of which that is
        known at once are told at once.
    allow_empty: class folders without images keep their numbers, instead of being refused.

    Raises ConfigError where ``src`` is none of these, or more than one, and for columns that there are not; DataError
    for data that is damaged.
    """
    options = Options(columns, encodings, extensions, keys=keys, skip=skip, fill=fill)
    text = os.fspath(src)
    path = Path(text)
    if has_scheme(text) and is_table(text) and not text.startswith("file:"):
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
        raise ConfigError(f"{(missing or [text])[0]} does not exist; {EXPECTED}.")
    return found


def _read_files(text: str, found: list[str], options: Options) -> list[SampleSet]:
    if all(is_table(name) for name in found):
        return read_tables(list(map(Path, found)), options)
    if all(name.endswith(".tar") for name in found):
        return [TarSet(found, options)]
    if found == [text]:
        raise ConfigError(f"{text} is a file; {EXPECTED}.")
    if all(map(os.path.isdir, found)):
        raise ConfigError(
            f"{text} matches the folders {some(found)}; convert each on its own, or name the files in them "
            "('data/**/*.tar', 'data/**/*.parquet')."
        )
    raise ConfigError(f"{text} matches {some(found)}, which are no tars and no tables; {EXPECTED}.")


def _read_folder(  # noqa: PLR0911  # one for each kind
    src: Path, options: Options, *, allow_empty: bool
) -> list[SampleSet]:
    names = sorted(path.name for path in src.iterdir() if path.is_file() and not path.name.startswith("."))
    tars = [name for name in names if name.endswith(".tar")]
    is_mds = "index.json" in names and not (tars and lists_tars(src / "index.json"))
    metadata = metadata_of(src)
    tables = [name for name in names if is_table(name) and (metadata is None or name != metadata.name)]
    saved = sorted({"dataset_dict.json", "state.json"}.intersection(names))
    pairs = idx_pairs(src)
    cifar = cifar_kind(src)
    kinds = {
        "MDS shards (index.json)": is_mds,
        f"WebDataset tars ({some(tars)})": bool(tars),
        f"tables ({some(tables)})": bool(tables),
        f"a saved Hugging Face dataset ({some(saved)})": bool(saved),
        f"idx files ({some([split + '-images' for split in pairs])})": bool(pairs),
        f"CIFAR's Python files ({cifar.meta if cifar else ''})": cifar is not None,
        f"images with a table ({metadata.name if metadata else ''})": metadata is not None,
    }
    there = [kind for kind, found in kinds.items() if found]
    if there and not (pairs or cifar or saved or metadata) and has_images(src):
        there.append("class folders with images")
    if len(there) > 1:
        raise ConfigError(
            f"{src} holds {' and '.join(there)}; only one kind can be converted at a time. Name the files "
            f"({src / '*.tar'}, {src / '*.parquet'}), or move one kind to another folder."
        )
    if is_mds:
        return [MdsSet(src, options)]
    if tars:
        return [TarSet([str(src)], options)]
    if metadata is not None:
        return _read_metadata({"": metadata}, options)
    if tables:
        return _read_tables(src, tables, [name for name in names if is_image_file(name)], options)
    if saved:
        return read_saved(src, options)
    if pairs:
        sets = [IdxPair(name, images, labels, options) for name, (images, labels) in sorted(pairs.items())]
        classes = max((one.classes or [] for one in sets), key=len)  # a small test split may lack the last class
        for one in sets:
            one.classes = classes
        return list(sets)
    if cifar:
        return list(read_cifar(src, cifar, options))
    shards = [path.name for path in sorted(src.iterdir()) if path.is_dir() and _is_shards(path)]
    if shards:
        raise ConfigError(
            f"{src} holds shards in its folders {some(shards)}; convert each on its own, e.g. infobatch-stream "
            f"convert {src / shards[0]} DST/{shards[0]} --format ..."
        )
    return _read_described(src, options) or list(read_images(src, options, allow_empty=allow_empty))


def _read_tables(src: Path, tables: list[str], images: list[str], options: Options) -> list[SampleSet]:
    """The tables in ``src``, with a note on the ``images`` beside them."""
    sets = read_tables([src / name for name in tables], options)
    if images:
        note = (
            f"{src}: {len(images):,} images beside the tables are left out ({some(images)}). A table that tells of "
            "images is called metadata.csv (.jsonl, .parquet), and has their names in a column file_name"
        )
        sets[0].notes = [*sets[0].notes, note]
    return list(sets)


def _read_described(src: Path, options: Options) -> list[SampleSet]:
    """The splits in ``src`` that have images with a table of their own; nothing where there are none."""
    tables = {name: metadata_of(src / name) for name in subfolders(src) if is_split(name)}
    found = {name: table for name, table in tables.items() if table is not None}
    missing = [name for name in subfolders(src) if name not in found]
    if found and missing:
        raise ConfigError(
            f"{src} holds images with a metadata table in {some(list(found))}, and none in {some(missing)}; convert "
            f"each that has one on its own, e.g. infobatch-stream convert {src / next(iter(found))} DST --format ..."
        )
    return _read_metadata(found, options)


def _read_metadata(tables: Mapping[str, Path], options: Options) -> list[SampleSet]:
    """The rows of ``tables`` with the images beside them: a set for each split."""
    require_pyarrow()
    from infobatch_stream.convert.readers.image_metadata import MetadataSet
    from infobatch_stream.convert.readers.text_files import TextFiles

    texts = TextFiles(list(tables.values()))
    return [MetadataSet(name, table, options, texts) for name, table in tables.items()]


def _is_shards(folder: Path) -> bool:
    return (folder / "index.json").is_file() or any(folder.glob("*.tar"))
