"""A conversion: samples are read, shuffled and written as shards; the result appears whole or not at all."""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

import numpy as np

from infobatch_stream.errors import ConfigError, DataError

from .readers import read_source
from .samples import Column, Sample, SampleSet, column_of
from .writers import MdsShards, ShardFormat, Shards, WdsShards

__all__ = ["SHARD_BYTES", "Conversion", "ShardSummary", "Track", "convert", "staged_folder", "write_shards"]

SHARD_BYTES = 1 << 26
_LEAST_SHARD = 1 << 14  # a tar is never smaller than 10 KiB
_MOST_SHARD = (1 << 32) - 1  # offsets within an MDS shard are uint32
_OURS = ("classes.json", "index.json", "shard*.mds", "*.tar", "*.tar.index.npz")

Track = Callable[[Iterable[Sample], int, str], Iterable[Sample]]
"""Shows progress: (samples, how many there are, a title) -> the same samples."""


@dataclass(frozen=True)
class ShardSummary:
    """What was written into the folder ``path``: numbers of samples and shards, the shards' size in bytes."""

    path: Path
    samples: int
    shards: int
    bytes: int


@dataclass(frozen=True)
class Conversion:
    """A finished conversion: its folders, the classes they share, and how many files were no samples."""

    parts: tuple[ShardSummary, ...]
    classes: tuple[str, ...]
    skipped: int


def convert(
    src: Path,
    dst: Path,
    format: ShardFormat | str,
    *,
    seed: int = 0,
    shuffle: bool = True,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    track: Track | None = None,
) -> Conversion:
    """Convert the image tree or the idx files in ``src`` into shards in ``dst``; see `read_source`.

    An image tree is written into ``dst``; of idx files each split into its own subfolder (train, test). With
    ``shuffle`` the samples of a folder are in the order of ``numpy.random.default_rng(seed).permutation``,
    else sorted by class and path (idx: as they are). Every folder has a ``classes.json``. The same arguments
    give the same bytes. ``track`` wraps the samples of each folder, to show progress.
    Raises ConfigError, DataError, MissingExtraError or OSError; ``dst`` is then as it was before.
    """
    here, there = Path(src).resolve(), Path(dst).resolve()
    if there.is_relative_to(here) or here.is_relative_to(there):
        raise ConfigError(f"{dst} and {src} lie one inside the other; choose a destination outside the source.")
    if seed < 0:
        raise ConfigError(f"seed is {seed}; give 0 or more.")
    with staged_folder(there, overwrite=overwrite) as folder:
        sets = read_source(Path(src))
        parts = []
        for one in sets:
            samples: Iterable[Sample] = _ordered(one, seed if shuffle else None)
            if track is not None:
                samples = track(samples, len(one), one.name or there.name)
            summary = write_shards(
                samples, folder / one.name, format,
                columns=one.columns, classes=one.classes, shard_bytes=shard_bytes,
            )  # fmt: skip
            parts.append(replace(summary, path=Path(dst) / one.name))
    return Conversion(tuple(parts), tuple(sets[0].classes or ()), sum(one.skipped for one in sets))


def _ordered(samples: SampleSet, seed: int | None) -> Iterator[Sample]:
    count = len(samples)
    for position in np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count):
        yield samples[int(position)]


def write_shards(
    samples: Iterable[Sample],
    dst: Path,
    format: ShardFormat | str,
    *,
    columns: Mapping[str, Column] | None = None,
    classes: Sequence[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> ShardSummary:
    """Write ``samples``, in their order, as shards into the folder ``dst``, which appears only when complete.

    samples: dicts with the same keys, e.g. ``{"image": uint8[28, 28], "label": int}``; read once, one by one.
    format: "mds" writes ``shard.00000.mds`` ... and ``index.json``. "wds" writes ``shard-000000.tar`` ... with
        the index of each (``.index.npz``); member names are ``<9-digit number>.<extension>``.
    columns: how each field is stored; by default `column_of` the first sample, so that an array must have the
        same shape and dtype in all samples ("mds").
    classes: written to ``classes.json`` where given: names of label 0, 1, ...
    shard_bytes: no shard file is larger; 16 KiB to 4 GiB - 1.
    overwrite: replace a ``dst`` that holds shards, and nothing but shards, once the new one is complete.

    The same samples give the same bytes. Raises ConfigError (arguments, no samples, a sample larger than a
    shard), DataError (a sample unlike its columns), MissingExtraError, OSError, and what ``samples`` raises;
    ``dst`` is then as it was before.
    """
    try:
        format = ShardFormat(format)
    except ValueError:
        raise ConfigError(f"format is {format!r}; 'mds' and 'wds' can be written.") from None
    if not _LEAST_SHARD <= shard_bytes <= _MOST_SHARD:
        raise ConfigError(f"shards of {shard_bytes:,} bytes; {_LEAST_SHARD:,} to {_MOST_SHARD:,} are possible.")
    rest = iter(samples)
    with staged_folder(dst, overwrite=overwrite) as folder:
        first = next(rest, None)
        if first is None:
            raise ConfigError(f"there are no samples to write to {dst}.")
        if columns is None:
            columns = {name: column_of(name, value) for name, value in first.items()}
        writer: Shards
        if format is ShardFormat.MDS:
            writer = MdsShards(folder, columns, shard_bytes)
        else:
            writer = WdsShards(folder, columns, shard_bytes)
        count = _write_all(writer, set(columns), chain([first], rest))
        shards = sorted(folder.glob("*.mds" if format is ShardFormat.MDS else "*.tar"))
        if classes is not None:
            (folder / "classes.json").write_text(json.dumps(list(classes), ensure_ascii=False), encoding="utf-8")
        if format is ShardFormat.WDS:
            from infobatch_stream.sources.tar_index import load_index

            for shard in shards:  # a rename keeps size and mtime, so the indexes stay fresh
                load_index(shard, cache_dir=folder)  # the user's cache knows shards by their path, which will change
        size = sum(shard.stat().st_size for shard in shards)
    return ShardSummary(Path(dst), count, len(shards), size)


def _write_all(writer: Shards, names: set[str], samples: Iterable[Sample]) -> int:
    """Write ``samples``, whose fields are ``names``, and close the writer; the number of samples."""
    count = 0
    try:
        for sample in samples:
            if sample.keys() != names:
                raise DataError(f"sample {count} has the fields {sorted(sample)}; the columns are {sorted(names)}.")
            try:
                writer.write(sample)
            except ConfigError as error:
                raise ConfigError(f"sample {count} {error}") from None
            except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
                raise DataError(f"sample {count} does not fit the columns: {error}") from error
            count += 1
        writer.close()
    except BaseException:
        writer.abort()
        raise
    return count


@contextmanager
def staged_folder(dst: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside ``dst`` to write to: renamed to ``dst`` at the end, removed if anything is raised.

    Raises ConfigError where ``dst`` cannot be made: it holds something (with ``overwrite``: something else
    than shards), is a file or a mount point, or its parent cannot be written to.
    """
    dst = Path(dst).resolve()
    _check_free(dst, overwrite)
    made = [folder for folder in dst.parents if not folder.exists()]
    staged = dst.with_name(f"{dst.name}.partial-{secrets.token_hex(4)}")
    try:
        try:
            staged.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"{dst} cannot be made ({error}); give a folder that can be written to.") from error
        yield staged
        _check_free(dst, overwrite)  # somebody else may have written there in the meantime
        if dst.exists() and any(dst.iterdir()):
            _replace(dst, staged)
        else:
            staged.rename(dst)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def _replace(dst: Path, staged: Path) -> None:
    """Put ``staged`` in the place of the folder ``dst``, which is kept until that has happened."""
    old = dst.with_name(f"{dst.name}.old-{secrets.token_hex(4)}")
    dst.rename(old)
    try:
        staged.rename(dst)
    except BaseException:
        old.rename(dst)
        raise
    shutil.rmtree(old)


def _check_free(dst: Path, overwrite: bool) -> None:
    """Raise ConfigError where ``dst`` (absolute) may not be written; see `staged_folder`."""
    if not dst.exists():
        return
    if not dst.is_dir():
        raise ConfigError(f"{dst} is a file; give a folder that does not exist yet.")
    if os.path.ismount(dst):
        raise ConfigError(f"{dst} is a mount point, which cannot be replaced as a whole; give a folder inside it.")
    if not overwrite and any(dst.iterdir()):
        raise ConfigError(f"{dst} is not empty; give another folder, or replace this one with --overwrite.")
    # Asked for by mistake, on a home directory say, the replacement would be the end of it.
    for path in dst.rglob("*"):
        if not path.is_dir() and not any(fnmatch(path.name, ours) for ours in _OURS):
            raise ConfigError(
                f"{dst} holds {path.relative_to(dst)}, which is no part of a set of shards, so it is not "
                "replaced; remove the folder yourself, or give another."
            )
