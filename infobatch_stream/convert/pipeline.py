"""A conversion: samples are read, shuffled and written as shards; the result appears whole or not at all."""

import json
import os
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Literal

from infobatch_stream._pool import await_server, ordered_map, start_server
from infobatch_stream.convert.destinations.base import Request
from infobatch_stream.convert.destinations.resolve import check_apart, open_destination, place_of
from infobatch_stream.convert.label_images import find_label_columns
from infobatch_stream.convert.manifest import Conversion, Manifest, OutputFolder, ProgressCallback, ShardSummary
from infobatch_stream.convert.ray_backend import write_on_ray
from infobatch_stream.convert.readers import TableSet, read_source
from infobatch_stream.convert.readers.exact_values import fitted
from infobatch_stream.convert.reencode import Reencoder
from infobatch_stream.convert.shard_plan import ShardPlan
from infobatch_stream.convert.shard_sizes import check_largest, sizes_in_shards
from infobatch_stream.convert.worker import Job, Target, TaskResult, add, write_task
from infobatch_stream.convert.writers import ShardFormat, room_for_samples
from infobatch_stream.errors import ConfigError
from infobatch_stream.formats.schema import KEY, MEMBERS, Column, FileSet, Sample, SampleSet, column_of
from infobatch_stream.formats.shard_set import PLAN
from infobatch_stream.formats.tar_names import check_keys

__all__ = ["SHARD_BYTES", "Conversion", "ShardSummary", "convert", "write_shards"]

SHARD_BYTES = 1 << 26
_LEAST_SHARD = 1 << 14  # a tar is never smaller than 10 KiB
_MOST_SHARD = (1 << 32) - 1  # offsets within an MDS shard are uint32


def convert(
    src: Path | str,
    dst: Path | str,
    format: ShardFormat | str,
    *,
    columns: Mapping[str, str] | None = None,
    encodings: Mapping[str, str] | None = None,
    extensions: Mapping[str, str] | None = None,
    keys: bool = True,
    fill: Mapping[str, str] | None = None,
    seed: int = 0,
    shuffle: bool | None = None,
    shard_bytes: int = SHARD_BYTES,
    shard_samples: int | None = None,
    compression: str | None = None,
    hashes: Sequence[str] = ("xxh64",),
    resize: int | None = None,
    quality: int | None = None,
    resize_columns: Mapping[str, str] | None = None,
    check: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    allow_empty: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    workers: int = 1,
    ray: str | None = None,
    on_progress: ProgressCallback | None = None,
) -> Conversion:
    """Convert a dataset into shards.

    A source of several splits gets a subfolder for each. The same arguments give the same bytes, whatever the number
    of processes. ``dst`` appears only when it is complete.

    Args:
        src: images, idx files, CIFAR, shards or tables; see `read_source`.
        dst: a folder or URL for the shards.
        format: "mds" or "wds".
        columns: the fields to take; see `read_source`.
        encodings: MDS encodings of columns; see `read_source`.
        extensions: extensions of columns in tars; see `read_source`.
        keys: whether samples keep the keys that they have.
        fill: of tables: column -> the text of what stands where it is empty (null), which is an error otherwise.
        seed: of the shuffle; 0 or more.
        shuffle: write samples in the order of ``numpy.random.default_rng(seed).permutation``, in each folder. By
            default unless ``src`` holds shards, which keep their order.
        shard_bytes: the largest size of a shard in bytes, before compression; 16 KiB to 4 GiB - 1.
        shard_samples: the most samples of a shard.
        compression: of MDS shards, as MDSWriter takes it ("zstd:3").
        hashes: of MDS shards, as MDSWriter takes them ("sha1", "xxh64").
        resize: pixels of the shorter side of an image, at most; see `Reencoder`. Else bytes are copied.
        quality: of JPEG, 1 to 95, for images that are encoded again.
        resize_columns: the columns that ``resize`` and ``quality`` are for, and how they are made smaller: "nearest"
            (label images), "smooth" (photographs) or "auto" (by their looks). By default all with images, "auto".
        check: decode all images, to find damaged ones.
        on_error: "skip" passes over samples and whole shards that cannot be read, and lists them in the result.
        allow_empty: class folders without images keep their numbers, instead of being refused.
        overwrite: replace shards in ``dst``.
        resume: go on with an interrupted conversion; shards that were not finished are made again. ``on_error`` may be
            another then, and image files that are in no shard yet may have been mended or removed.
        workers: processes.
        ray: address of a Ray cluster that does the work instead.
        on_progress: Called with the progress after each task.

    Returns:
        What was written, and what was passed over.

    Raises:
        ConfigError: for arguments that do not fit each other, the source or the destination.
        DataError: for data that are damaged.
        MissingExtraError: where a library is not installed.
        OSError: for files that cannot be read or written.

    After an error ``dst`` is as it was before. Finished shards may be kept beside it for ``resume``; then a note at the
    error says so.
    """
    target = _target(format, shard_bytes, compression, hashes)
    reencoder = Reencoder(resize, quality, check=check) if check or (resize, quality) != (None, None) else None
    if resize_columns and (resize, quality) == (None, None):
        raise ConfigError("resize_columns are the columns that resize and quality are for; give one of these.")
    dst = place_of(dst)
    check_apart(src, dst)
    if seed < 0:
        raise ConfigError(f"seed is {seed}; give 0 or more.")
    if shard_samples is not None and shard_samples < 1:
        raise ConfigError(f"shard_samples is {shard_samples}; give 1 or more.")
    library = {ShardFormat.MDS: "streaming", ShardFormat.WDS: "webdataset"}[target.format]
    parallel = workers > 1 and ray is None
    if parallel:
        start_server(write_task, [library])  # which takes seconds, while the source is looked through
    start = time.monotonic()
    sets = read_source(
        src, columns=columns, encodings=encodings, extensions=extensions, keys=keys, fill=fill,
        skip=on_error == "skip", allow_empty=allow_empty,
    )  # fmt: skip
    start += _await_library(library, parallel=parallel)
    _check_source(src, sets, target, fill, skip=on_error == "skip")
    guessed: tuple[str, ...] = ()
    if reencoder is not None:
        reencoder, guessed = _fitted(reencoder, os.fspath(src), sets, resize_columns or {})
    job = Job(os.fspath(src), sets, target, reencoder, on_error == "skip")
    shuffled = not sets[0].is_shards if shuffle is None else shuffle
    order = seed if shuffled else None
    recipe = {
        "format": target.format.value, "shard_bytes": shard_bytes, "shard_samples": shard_samples,
        "compression": compression, "hashes": sorted(hashes), "seed": order,
        "resize": resize, "resize_column": sorted((resize_columns or {}).items()), "quality": quality,
        "check": check,
        "column": list((columns or {}).items()),
        "encoding": sorted((encodings or {}).items()), "extension": sorted((extensions or {}).items()),
        "fill": sorted((fill or {}).items()), "keys": keys,
        "version": version("infobatch-stream"),
    }  # fmt: skip
    recipe = json.loads(json.dumps(recipe))  # as it will be read
    room = room_for_samples(target.format, shard_bytes)
    sizes = [sizes_in_shards(job, one) for one in sets]
    check_largest(job, sizes, room)
    request = Request(
        overwrite, recipe, resume, [one.name for one in sets], mendable=all(isinstance(one, FileSet) for one in sets)
    )
    with open_destination(dst, request) as out:
        if out.done:
            plan = ShardPlan.resume(out.plan or b"", out.where, sets, order, len(out.done))
        else:
            plan = ShardPlan.begin(sets, sizes, order, room, shard_samples)
        out.write(PLAN, plan.to_json())
        tasks = plan.tasks(order)
        folders = [
            OutputFolder(one.columns, one.classes, one.name, part.samples)
            for one, part in zip(sets, plan.parts, strict=True)
        ]
        manifest = Manifest(folders, out, target, on_progress)
        todo = tasks[len(out.done) :]
        done: Generator[TaskResult, None, None]
        if ray is not None:
            done = write_on_ray(job, out.scratch, todo, ray)
        else:
            work = partial(write_task, job, out.scratch)
            done = ordered_map(work, todo, min(workers, len(todo)), preload=[library])
        with closing(done):  # an error here ends the workers before what they have written is removed
            for task, written in zip(todo, done, strict=True):
                manifest.take(task.part, written)
        manifest.finish()
    return replace(
        manifest.summary(dst, sum(one.skipped for one in sets), time.monotonic() - start),
        lost=tuple(text for one in sets for text in one.lost),
        notes=(*(text for one in sets for text in one.notes), *guessed),
    )


def write_shards(
    samples: Iterable[Sample],
    dst: Path | str,
    format: ShardFormat | str,
    *,
    columns: Mapping[str, Column] | None = None,
    classes: Sequence[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    compression: str | None = None,
    hashes: Sequence[str] = ("xxh64",),
    overwrite: bool = False,
) -> ShardSummary:
    """Write samples as shards, in their order. The same samples give the same bytes.

    Args:
        samples: dicts with the same keys, e.g. ``{"image": uint8[28, 28], "label": int}``; read once, one by one.
        dst: a folder, which appears only when it is complete, or a URL.
        format: "mds" writes ``shard.00000.mds`` ... and ``index.json``. "wds" writes ``shard-000000.tar`` ... with the
            index of each (``.index.npz``); member names are ``<9-digit number>.<extension>``.
        columns: how each field is stored; by default `column_of` the first sample, so that an array must have the same
            shape and dtype in all samples ("mds").
        classes: names of label 0, 1, ..., written to ``classes.json``.
        shard_bytes: the largest size of a shard in bytes, before compression; 16 KiB to 4 GiB - 1.
        compression: of MDS shards, as MDSWriter takes it ("zstd:3").
        hashes: of MDS shards, as MDSWriter takes them ("sha1", "xxh64").
        overwrite: replace a ``dst`` that holds shards, and nothing but shards, once the new one is complete.

    Returns:
        The number of samples and shards, and the shards' size in bytes.

    Raises:
        ConfigError: for arguments that are not allowed, no samples, or a sample larger than a shard.
        DataError: for a sample that does not fit the columns.
        MissingExtraError: where a library is not installed.
        OSError: for files that cannot be written.

    What ``samples`` raises passes on. After any error ``dst`` is as it was before.
    """
    target = _target(format, shard_bytes, compression, hashes)
    dst = place_of(dst)
    rest = iter(samples)
    with open_destination(dst, Request(overwrite)) as out:
        first = next(rest, None)
        if first is None:
            raise ConfigError(f"there are no samples to write to {dst}.")
        if columns is None:
            columns = {name: column_of(name, value) for name, value in first.items()}
        if not columns.keys() - {KEY, MEMBERS}:
            raise ConfigError(f"the samples have no fields but their keys, {list(columns)}; there is nothing to write.")
        source = OutputFolder(dict(columns), None if classes is None else list(classes))
        manifest = Manifest([source], out, target)
        folder = out.scratch / "all"
        folder.mkdir()
        with target.writer(folder, columns) as writer:
            for number, sample in enumerate(chain([first], rest)):
                add(writer, columns, fitted(sample, columns, f"sample {number}"), f"sample {number}")
                manifest.take_finished(writer.finished, folder)
        manifest.take_finished(writer.finished, folder)
        manifest.finish()
    return manifest.summary(dst, 0).parts[0]


def _check_source(
    src: Path | str, sets: Sequence[SampleSet], target: Target, fill: Mapping[str, str] | None, *, skip: bool
) -> None:
    """Raise ConfigError where options are not for such a source, DataError for keys that tars cannot hold."""
    if fill and not all(isinstance(one, TableSet) for one in sets):
        raise ConfigError(f"fill is for the empty values of tables, and {src} is none; leave it out.")
    if target.format is ShardFormat.WDS and not skip:
        for one in sets:
            check_keys(os.fspath(src), one)


def _fitted(
    reencoder: Reencoder, src: str, sets: Sequence[SampleSet], columns: Mapping[str, str]
) -> tuple[Reencoder, tuple[str, ...]]:
    """``reencoder`` for the images of ``sets``, and notes on what was guessed. columns: resize_columns of `convert`."""
    reencoder.check_columns([one.columns for one in sets], src)
    if (reencoder.resize, reencoder.quality) == (None, None):
        return reencoder, ()
    labels, guessed = find_label_columns(sets, columns, src)
    return replace(reencoder, chosen=frozenset(columns) or None, labels=labels), guessed


def _target(format: ShardFormat | str, shard_bytes: int, compression: str | None, hashes: Sequence[str]) -> Target:
    try:
        format = ShardFormat(format)
    except ValueError:
        raise ConfigError(f"format is {format!r}; 'mds' and 'wds' can be written.") from None
    if not _LEAST_SHARD <= shard_bytes <= _MOST_SHARD:
        raise ConfigError(f"shards of {shard_bytes:,} bytes; {_LEAST_SHARD:,} to {_MOST_SHARD:,} are possible.")
    if compression and format is ShardFormat.WDS:
        raise ConfigError(f"compression is {compression!r}: only MDS shards are compressed, tars are read by index.")
    return Target(format, shard_bytes, compression, tuple(hashes))


def _await_library(name: str, *, parallel: bool) -> float:
    """Return when ``name`` is imported, here or where workers come from: the seconds that it took, of nobody's data."""
    start = time.monotonic()
    if parallel:
        await_server()
    else:
        with suppress(Exception):  # raised where it is needed
            import_module(name)
    return time.monotonic() - start
