"""What a user means by SRC: the kind of source that it is."""

import os
import re
from collections.abc import Mapping
from glob import glob, has_magic
from pathlib import Path

from infobatch_stream.errors import ConfigError

from ..samples import SampleSet
from .cifar import cifar_kind, read_cifar
from .columns import Options
from .idx import IdxPair, idx_pairs
from .images import EXPECTED, ImageTree, has_images
from .mds import MdsSet
from .saved import read_saved
from .table import is_table, read_tables
from .tars import TarSet

__all__ = ["read_source"]

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


def read_source(
    src: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    encodings: Mapping[str, str] | None = None,
    extensions: Mapping[str, str] | None = None,
    keys: bool = True,
) -> list[SampleSet]:
    """The sample sets of ``src``: one per split where it has splits, else one. All have the same classes.

    src: a folder of class folders with images, of idx files, of CIFAR's Python files, of MDS shards, of tars or of
        tables, or one that Hugging Face's ``save_to_disk`` wrote; a tar or a table (Parquet, CSV); or a pattern of
        those.
    columns: name -> what it is called in the source, which selects and renames; of tars extensions, of which a sample
        has one: ``{"image": "jpg;png", "label": "cls"}``. By default all.
    encodings, extensions: how columns are stored in MDS, and as members of a tar, where it is not as inferred.
    keys: whether samples keep the keys that they have.

    Raises ConfigError where ``src`` is none of these, or more than one, and for columns that there are not; DataError
    for data that is damaged.
    """
    options = Options(columns, encodings, extensions, keys)
    text = os.fspath(src)
    path = Path(text)
    if _SCHEME.match(text) or (text.endswith(".tar") and not path.is_dir()):
        return [TarSet([text], options)]
    if not path.exists():
        if has_magic(text) and (found := sorted(glob(text))):  # noqa: PTH207  # Path.glob takes no absolute pattern
            if all(is_table(name) for name in found):
                return read_tables(list(map(Path, found)), options)
            raise ConfigError(f"{text} matches {_some(found)}, which are no tars and no tables; {EXPECTED}.")
        raise ConfigError(f"{text} does not exist; {EXPECTED}.")
    if not path.is_dir():
        if is_table(text):
            return read_tables([path], options)
        raise ConfigError(f"{text} is a file; {EXPECTED}.")
    return _read_folder(path, options)


def _read_folder(src: Path, options: Options) -> list[SampleSet]:  # noqa: PLR0911  # one for each kind
    names = sorted(path.name for path in src.iterdir() if path.is_file() and not path.name.startswith("."))
    tars = [name for name in names if name.endswith(".tar")]
    tables = [name for name in names if is_table(name)]
    saved = sorted({"dataset_dict.json", "state.json"}.intersection(names))
    pairs = idx_pairs(src)
    cifar = cifar_kind(src)
    kinds = {
        "MDS shards (index.json)": "index.json" in names,
        f"WebDataset tars ({_some(tars)})": bool(tars),
        f"tables ({_some(tables)})": bool(tables),
        f"a saved Hugging Face dataset ({_some(saved)})": bool(saved),
        f"idx files ({_some([split + '-images' for split in pairs])})": bool(pairs),
        f"CIFAR's Python files ({cifar.meta if cifar else ''})": cifar is not None,
    }
    there = [kind for kind, found in kinds.items() if found]
    if there and not (pairs or cifar or saved) and has_images(src):
        there.append("class folders with images")
    if len(there) > 1:
        raise ConfigError(
            f"{src} holds {' and '.join(there)}; only one kind can be converted at a time. Name the files "
            f"({src / '*.tar'}, {src / '*.parquet'}), or move one kind to another folder."
        )
    if "index.json" in names:
        return [MdsSet(src, options)]
    if tars:
        return [TarSet([str(src)], options)]
    if tables:
        return read_tables([src / name for name in tables], options)
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
    splits = [path.name for path in sorted(src.iterdir()) if path.is_dir() and _is_shards(path)]
    if splits:
        raise ConfigError(
            f"{src} holds shards in its folders {_some(splits)}; convert each on its own, e.g. infobatch-stream "
            f"convert {src / splits[0]} DST/{splits[0]} --format ..."
        )
    return [ImageTree(src, options)]


def _is_shards(folder: Path) -> bool:
    return (folder / "index.json").is_file() or any(folder.glob("*.tar"))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
