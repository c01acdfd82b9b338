"""A conversion: samples are read, shuffled and written as shards; the result appears whole or not at all."""

import json
import os
import re
import tempfile
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.sources.urls import is_remote, local_path

from .bucket import is_url, url_destination
from .destination import PLAN, Destination, local_destination
from .fitted import fitted
from .label_images import find_label_columns
from .ledger import Conversion, Layout, Ledger, ShardSummary, Watch
from .on_ray import write_on_ray
from .pool import await_server, ordered_map, start_server
from .readers import TableSet, read_source
from .reencode import Reencoder
from .samples import Column, Encoded, Sample, SampleSet, column_of
from .shard_plan import Plan
from .tar_names import check_keys
from .task import Job, Target, Written, add, read, write_task
from .writers import ShardFormat, TooLargeError, room_for_samples, stored_sizes

__all__ = ["SHARD_BYTES", "Conversion", "ShardSummary", "convert", "write_shards"]

SHARD_BYTES = 1 << 26
_LEAST_SHARD = 1 << 14  # a tar is never smaller than 10 KiB
_MOST_SHARD = (1 << 32) - 1  # offsets within an MDS shard are uint32
_TRIED = 64  # images that are encoded to learn how large they become
_LARGEST = 16  # samples that are tried, where some may be larger than a shard


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
    watch: Watch | None = None,
) -> Conversion:
    """Convert ``src`` (images, idx, CIFAR, shards, tables; see `read_source`) into shards in ``dst``, a folder or URL.

    A source of several splits gets a subfolder for each. The same arguments give the same bytes, whatever the number
    of processes.

    columns, encodings, extensions, keys: which fields are taken, and how they are stored; see `read_source`.
    fill: of tables: column -> the text of what stands where it is empty (null), which is an error otherwise.
    shuffle: the samples of a folder in the order of ``numpy.random.default_rng(seed).permutation``; by default
        unless ``src`` holds shards, which keep their order, as images without a shuffle are sorted by class and path.
    shard_bytes, shard_samples: no shard holds more; 16 KiB to 4 GiB - 1 (before compression).
    compression, hashes: of MDS shards, as MDSWriter takes them ("zstd:3"; "sha1", "xxh64").
    resize, quality, check: see `Reencoder`; ``check`` decodes images without changing them. Else bytes are copied.
    resize_columns: the columns that ``resize`` and ``quality`` are for, and how they are made smaller: "nearest" (label
        images), "smooth" (photographs) or "auto" (by their looks). By default all with images, "auto".
    on_error: "skip" passes over samples that cannot be read, and lists them in the result; also whole shards.
    allow_empty: class folders without images keep their numbers, instead of being refused.
    overwrite: replace shards in ``dst``. resume: go on with a conversion that was broken off; the shards that were
        in the making are made again. ``on_error`` may be another then, and image files that are in no shard yet may
        have been mended or removed; what goes into which shard stays as it was decided at the beginning.
    workers: processes. ray: address of a Ray cluster that does the work instead. watch: is told of the progress.

    Raises ConfigError, DataError, MissingExtraError or OSError. ``dst`` is then as it was before; beside it, shards
    that are done may be kept for `resume`, which a note at the error tells.
    """
    target = _target(format, shard_bytes, compression, hashes)
    reencoder = Reencoder(resize, quality) if check or resize is not None or quality is not None else None
    if resize_columns and (resize, quality) == (None, None):
        raise ConfigError("resize_columns are the columns that resize and quality are for; give one of these.")
    dst = _place(dst)
    _check_apart(src, dst)
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
    if fill and not all(isinstance(one, TableSet) for one in sets):
        raise ConfigError(f"fill is for the empty values of tables, and {src} is none; leave it out.")
    if target.format is ShardFormat.WDS and on_error == "raise":
        for one in sets:
            check_keys(os.fspath(src), one)
    guessed: tuple[str, ...] = ()
    if reencoder is not None:
        reencoder.check_columns([one.columns for one in sets], src)
        if (resize, quality) != (None, None):
            labels, guessed = find_label_columns(sets, resize_columns or {}, os.fspath(src))
            chosen = frozenset(resize_columns) if resize_columns else None
            reencoder = replace(reencoder, chosen=chosen, labels=labels, check=check)
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
        "fill": sorted((fill or {}).items()),
        "columns": [{name: [column.mds, column.wds] for name, column in one.columns.items()} for one in sets],
        "version": version("infobatch-stream"),
    }  # fmt: skip
    recipe = json.loads(json.dumps(recipe))  # as it will be read
    room = room_for_samples(target.format, shard_bytes)
    sizes = [_sizes(job, one) for one in sets]
    _check_largest(job, sizes, room)
    with _destination(dst, overwrite=overwrite, recipe=recipe, resume=resume) as out:
        if out.done:
            plan = Plan.resume(out.plan or b"", out.where, sets, order, len(out.done))
        else:
            plan = Plan.begin(sets, sizes, order, room, shard_samples)
        out.write(PLAN, plan.to_json())
        tasks = plan.tasks(order)
        layouts = [
            Layout(one.columns, one.classes, one.name, part.samples) for one, part in zip(sets, plan.parts, strict=True)
        ]
        ledger = Ledger(layouts, out, target, watch)
        todo = tasks[len(out.done) :]
        done: Generator[Written, None, None]
        if ray is not None:
            done = write_on_ray(job, out.scratch, todo, ray)
        else:
            work = partial(write_task, job, out.scratch)
            done = ordered_map(work, todo, min(workers, len(todo)), preload=[library])
        with closing(done):  # an error here ends the workers before what they have written is removed
            for task, written in zip(todo, done, strict=True):
                ledger.take(task.part, written)
        ledger.finish()
    return replace(
        ledger.summary(dst, sum(one.skipped for one in sets), time.monotonic() - start),
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
    """Write ``samples``, in their order, as shards into ``dst``, a folder (which appears only when complete) or URL.

    samples: dicts with the same keys, e.g. ``{"image": uint8[28, 28], "label": int}``; read once, one by one.
    format: "mds" writes ``shard.00000.mds`` ... and ``index.json``. "wds" writes ``shard-000000.tar`` ... with
        the index of each (``.index.npz``); member names are ``<9-digit number>.<extension>``.
    columns: how each field is stored; by default `column_of` the first sample, so that an array must have the
        same shape and dtype in all samples ("mds").
    classes: written to ``classes.json`` where given: names of label 0, 1, ...
    shard_bytes: no shard file is larger; 16 KiB to 4 GiB - 1. compression, hashes: as of `convert`.
    overwrite: replace a ``dst`` that holds shards, and nothing but shards, once the new one is complete.

    The same samples give the same bytes. Raises ConfigError (arguments, no samples, a sample larger than a
    shard), DataError (a sample unlike its columns), MissingExtraError, OSError, and what ``samples`` raises;
    ``dst`` is then as it was before.
    """
    target = _target(format, shard_bytes, compression, hashes)
    dst = _place(dst)
    rest = iter(samples)
    with _destination(dst, overwrite=overwrite) as out:
        first = next(rest, None)
        if first is None:
            raise ConfigError(f"there are no samples to write to {dst}.")
        if columns is None:
            columns = {name: column_of(name, value) for name, value in first.items()}
        source = Layout(dict(columns), None if classes is None else list(classes))
        ledger = Ledger([source], out, target)
        folder = out.scratch / "all"
        folder.mkdir()
        writer = target.open(folder, columns)
        taken = 0
        try:
            for number, sample in enumerate(chain([first], rest)):
                add(writer, columns, fitted(sample, columns, f"sample {number}"), f"sample {number}")
                if len(writer.finished) > taken:
                    taken = ledger.take_finished(writer.finished, taken, folder)
            writer.close()
        except BaseException:
            writer.abort()
            raise
        ledger.take_finished(writer.finished, taken, folder)
        ledger.finish()
    return ledger.summary(dst, 0).parts[0]


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


def _destination(
    dst: Path | str, *, overwrite: bool, recipe: Mapping[str, Any] | None = None, resume: bool = False
) -> AbstractContextManager[Destination]:
    if is_url(dst):
        if overwrite:
            raise ConfigError(f"{dst} is in a bucket, where shards are not replaced; remove them, or give another url.")
        return url_destination(str(dst), recipe=recipe, resume=resume)
    return local_destination(Path(dst), overwrite=overwrite, recipe=recipe, resume=resume)


def _place(dst: Path | str) -> Path | str:
    """``dst`` as a path, where it is one; a url. Raises ConfigError for what was meant as a url, as ``s3:/bucket``."""
    if is_url(dst):
        return str(dst)
    if is_remote(text := os.fspath(dst)):
        raise ConfigError(f"{text!r} names no server; write a url as s3://bucket/name, a path with a colon as ./name.")
    return Path(local_path(text))


def _check_apart(src: Path | str, dst: Path | str) -> None:
    """Raise ConfigError where the destination is the source, or holds it, or lies in a folder that is converted."""
    text = os.fspath(src)
    fixed = re.match(r"[^*?\[{]*", text)
    is_pattern = fixed is not None and fixed[0] != text and not Path(local_path(text)).exists()
    folder = fixed[0].rpartition("/")[0] or "." if is_pattern and fixed is not None else text
    if is_url(text) or is_url(dst):
        here, there = (f"{str(one).rstrip('/')}/" for one in (folder, dst))
        overlap = here.startswith(there) or (there.startswith(here) and not is_pattern)
    else:
        inner, outer = Path(local_path(folder)).resolve(), Path(dst).resolve()
        overlap = inner.is_relative_to(outer) or (outer.is_relative_to(inner) and not is_pattern)
    if overlap:
        raise ConfigError(f"{dst} and {src} lie one inside the other; choose a destination outside the source.")


def _await_library(name: str, *, parallel: bool) -> float:
    """Return when ``name`` is imported, here or where workers come from: the seconds that it took, of nobody's data."""
    start = time.monotonic()
    if parallel:
        await_server()
    else:
        with suppress(Exception):  # told of where it is needed
            import_module(name)
    return time.monotonic() - start


def _sizes(job: Job, source: SampleSet) -> NDArray[np.int64]:
    """int64[n]: what each sample takes in a shard; of images that are encoded again, as some of them say."""
    payload, reencoder = source.sizes(), job.reencoder
    if reencoder is not None and (reencoder.resize, reencoder.quality) != (None, None):
        before = after = 1
        for position in np.unique(np.linspace(0, len(source) - 1, _TRIED, dtype=np.int64)).tolist():
            try:
                sample = source[position]
                after += _payload(reencoder(sample, source.columns))
            except (DataError, OSError):
                continue  # it is met again, and told of, where it is converted
            before += _payload(sample)
        payload = np.ceil(payload * (after / before)).astype(np.int64)
    return stored_sizes(job.target.format, payload, len(source.columns))


def _check_largest(job: Job, sizes: Sequence[NDArray[np.int64]], room: int) -> None:
    """Raise TooLargeError if a sample is larger than a shard, unless those are passed over: before anything is written.

    ``sizes`` are not exact, so the largest are put to the test.
    """
    for one, stored in zip(job.sets, () if job.skip else sizes, strict=False):
        large = np.flatnonzero(stored > room)
        if not large.size:
            continue
        with tempfile.TemporaryDirectory(prefix="infobatch-convert-") as folder:
            writer = job.target.open(Path(folder), one.columns)
            try:
                for position in large[np.argsort(-stored[large], kind="stable")][:_LARGEST].tolist():
                    sample, place = read(job, one, position)
                    with suppress(DataError):  # it is met again, and told of, where it is converted
                        if not isinstance(sample, DataError):
                            add(writer, one.columns, sample, place)
            except TooLargeError as error:
                error.add_note("Nothing is written. To leave out what is too large: --on-error skip.")
                raise
            finally:
                writer.abort()


def _payload(sample: Sample) -> int:
    return sum(len(value.data) if isinstance(value, Encoded) else 8 for value in sample.values())
