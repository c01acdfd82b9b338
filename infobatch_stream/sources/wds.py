"""WebDataset tars read by index: a map-style dataset with webdataset's own per-sample stages."""

import copy
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from glob import glob
from pathlib import Path
from typing import Any, NoReturn, Self
from urllib.parse import urlparse

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from infobatch_stream.errors import ConfigError, DataError, MissingExtraError
from infobatch_stream.sources.base import Pool, fingerprint
from infobatch_stream.sources.tar_index import AnyPath, TarIndex, load_index

__all__ = ["IndexedWebDataset", "WdsSource"]

_INDEXES, _FILES = 256, 128  # kept open per process; the usual limit of open files is 1024
_GAP = 2**20  # bytes between a sample's members that are read along with them rather than skipped
_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tzst|gz|bz2|xz|zst|lz4|lzma|z)$", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_FIXED = "every sample has a fixed index; filter when the shards are written, or wrap the dataset in a Subset"
_LENGTH = "an epoch's length follows from the scores; InfoBatchLoader(epochs=) sets the number of epochs"


def _refused(name: str, advice: str) -> Callable[..., NoReturn]:
    """A method that stands where webdataset has a stage that works on a stream, and says what to do here."""

    def stage(self: object, *args: object, **kwargs: object) -> NoReturn:
        raise ConfigError(
            f"IndexedWebDataset has no {name}(): samples are read by index, not as a stream. Instead: {advice}."
        )

    stage.__name__ = name
    stage.__doc__ = f"Raises ConfigError. Instead: {advice}."
    return stage


class IndexedWebDataset(Dataset[Any]):
    """Samples of local, uncompressed WebDataset tars by index 0..N-1, in the order (shard, row).

    ``urls``: a path or `file:` url, with brace expansion; or a glob; or a folder (its *.tar, sorted); or an
    iterable of these. Opening reads the headers of each shard once and keeps an index of it beside the shard or,
    where that cannot be written, in ``cache_dir`` (default: infobatch-stream in $XDG_CACHE_HOME or ~/.cache).

    A sample is the dict that webdataset 1.0.2 yields: `__key__`, `__url__`, `__local_path__`, and bytes by
    extension, in tar order; then what the stages make of it. Each stage (`decode`, `map`, ...) is webdataset's own
    and returns a new dataset. The object holds no scores or epochs, survives fork and pickle (as far as the
    functions in its stages do), and may be read from several threads.

    Raises DataError for shards that are missing, damaged, compressed, not local, or hold no sample.
    """

    def __init__(self, urls: AnyPath | Iterable[AnyPath], *, cache_dir: AnyPath | None = None) -> None:
        try:
            import webdataset  # noqa: F401  # asked for here, not in the middle of an epoch
        except ImportError as error:
            raise MissingExtraError.of("webdataset", "wds") from error
        self._shards = _Shards(_expand(urls), cache_dir)
        self._stages: tuple[Callable[[Iterator[Any]], Iterator[Any]], ...] = ()

    @property
    def urls(self) -> list[str]:
        """The shards, one url or path each, in the order of the samples."""
        return list(self._shards.urls)

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """int64[S]: samples per shard."""
        return self._shards.sizes.copy()

    def __len__(self) -> int:
        """N, the number of samples."""
        return int(self._shards.ends[-1])

    def __getitem__(self, index: int) -> Any:
        """Sample ``index`` (from the end if negative), after all stages.

        Raises IndexError, and DataError, naming the shard, if it cannot be read or a stage drops the sample; what
        a stage raises passes unchanged.
        """
        number = operator.index(index)
        size = len(self)
        if not -size <= number < size:
            raise IndexError(f"sample {number} of a dataset of {size}")
        sample = self._shards.read(number % size)
        key, url = sample["__key__"], sample["__url__"]
        stream: Iterator[Any] = iter([sample])
        for stage in self._stages:
            stream = stage(stream)
        for result in stream:
            return result
        raise DataError(
            f"A stage dropped sample {number} (key {key!r} in {url}): a function returned None, or a handler "
            "passed over an exception. Every index needs a sample: return a stand-in, or let the exception pass."
        )

    def decode(self, *args: Any, **kwargs: Any) -> Self:
        """As webdataset's `decode`: decode fields by extension."""
        return self._with("decode", *args, **kwargs)

    def xdecode(self, *args: Any, **kwargs: Any) -> Self:
        """As webdataset's `xdecode`: decode fields by patterns."""
        return self._with("xdecode", *args, **kwargs)

    def map(self, *args: Any, **kwargs: Any) -> Self:
        """As webdataset's `map`: apply a function to the sample."""
        return self._with("map", *args, **kwargs)

    def map_dict(self, *args: Any, **kwargs: Any) -> Self:
        """As webdataset's `map_dict`: apply a function to each of the named fields."""
        return self._with("map_dict", *args, **kwargs)

    def map_tuple(self, *args: Any, **kwargs: Any) -> Self:
        """As webdataset's `map_tuple`: apply a function to each entry of a tuple."""
        return self._with("map_tuple", *args, **kwargs)

    def to_tuple(self, *args: Any, **kwargs: Any) -> Self:
        """As webdataset's `to_tuple`: the named fields, as a tuple."""
        return self._with("to_tuple", *args, **kwargs)

    def rename(self, *args: Any, **kwargs: Any) -> Self:
        """As webdataset's `rename`: new names for fields."""
        return self._with("rename", *args, **kwargs)

    def rename_keys(self, *args: Any, **kwargs: Any) -> Self:
        """As webdataset's `rename_keys`: new names for fields by patterns."""
        return self._with("rename_keys", *args, **kwargs)

    def extract_keys(self, *args: Any, **kwargs: Any) -> Self:
        """As webdataset's `extract_keys`: the fields that match patterns, as a tuple."""
        return self._with("extract_keys", *args, **kwargs)

    shuffle = _refused("shuffle", "InfoBatchLoader(shuffle=, shuffle_window=)")
    batched = _refused("batched", "InfoBatchLoader(batch_size=, collate_fn=)")
    listed = _refused("listed", "InfoBatchLoader(batch_size=, collate_fn=list)")
    unbatched = _refused("unbatched", "leave it out, samples are single here")
    unlisted = _refused("unlisted", "leave it out, samples are single here")
    select = _refused("select", _FIXED)
    slice = _refused("slice", _FIXED)
    rsample = _refused("rsample", f"{_FIXED}; a policy of InfoBatchLoader decides what an epoch skips")
    compose = _refused("compose", "map(function) for each per-sample stage")
    append = _refused("append", "map(function) for each per-sample stage")
    repeat = _refused("repeat", _LENGTH)
    with_epoch = _refused("with_epoch", _LENGTH)
    with_length = _refused("with_length", _LENGTH)
    mcached = _refused("mcached", "leave it out, the system keeps shards that fit in memory")
    lmdb_cached = _refused("lmdb_cached", "leave it out, local shards are read by index already")
    log_keys = _refused("log_keys", "map(function) with a function that logs sample['__key__']")

    def _with(self, name: str, *args: Any, **kwargs: Any) -> Self:
        """A copy with webdataset's stage ``name`` behind the others."""
        from webdataset.compat import FluidInterface

        # webdataset's methods end in self.compose(filter): one that hands the filter back gives us exactly theirs.
        recorder = FluidInterface()
        recorder.compose = lambda *filters: filters
        result = copy.copy(self)
        result._stages = self._stages + getattr(recorder, name)(*args, **kwargs)
        return result


class WdsSource:
    """An `IndexedWebDataset` as a `Source`. Samples come from ``dataset[i]``, so a subclass may override that."""

    def __init__(self, dataset: IndexedWebDataset) -> None:
        self.dataset = dataset

    @property
    def num_samples(self) -> int:
        """N."""
        return int(self.shard_sizes.sum())

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """int64[S], samples per shard; 0 for a shard without samples."""
        return self.dataset.shard_sizes

    @property
    def fingerprint(self) -> str:
        """Digest of the shards' file names and their numbers of samples; the folders do not matter."""
        names = [ascii(Path(url).name) for url in self.dataset.urls]
        return fingerprint("wds", zip(names, self.shard_sizes.tolist(), strict=True))

    def pool(self, epoch: int) -> Pool | None:
        """None: each sample once."""
        return None

    def read(self, index: int) -> Any:
        """Sample ``index``; errors are those of `IndexedWebDataset.__getitem__`."""
        return self.dataset[index]

    def read_many(self, indices: list[int]) -> list[Any]:
        """The samples ``indices``, in that order; the first that cannot be read raises."""
        return [self.dataset[index] for index in indices]


class _Shards:
    """The raw samples of a list of shards. Holds a few numbers per shard; indexes and files open when needed."""

    def __init__(self, urls: list[str], cache_dir: AnyPath | None) -> None:
        self.urls = urls
        self.paths = [_local_path(url) for url in urls]
        self._cache_dir = cache_dir
        self._stamps: list[tuple[int, int]] = []
        sizes = []
        for path in self.paths:
            index = load_index(path, cache_dir)
            sizes.append(len(index))
            self._stamps.append(index.stamp)
        self.sizes = np.array(sizes, np.int64)
        self.ends = np.cumsum(self.sizes)
        if self.ends[-1] == 0:
            raise DataError(f"There is no sample in {len(urls)} shard(s), the first {urls[0]}; check the path.")
        self._open_caches()

    def _open_caches(self) -> None:
        # Of the files' position nothing is shared, since pread is told where to read: so files that are open at
        # a fork serve both processes, and several threads. An evicted file stays open until its readers are done.
        self._index = lru_cache(_INDEXES)(partial(load_index, cache_dir=self._cache_dir))
        self._file = lru_cache(_FILES)(_ShardFile)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_index", "_file")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_caches()

    def read(self, number: int) -> dict[str, Any]:
        """Sample ``number``, 0 <= number < N, as webdataset yields it before any stage."""
        shard = int(self.ends.searchsorted(number, side="right"))
        path, stamp = self.paths[shard], self._stamps[shard]
        index: TarIndex = self._index(path)
        if index.stamp != stamp:
            _refuse_changed(path)
        row = number - int(self.ends[shard] - self.sizes[shard])
        sample: dict[str, Any] = {"__key__": index.key(row), "__url__": self.urls[shard]}
        for extension, payload in self._file(path, stamp).read(index.members(row)):
            sample[extension] = payload
            sample["__local_path__"] = path  # webdataset has it behind the first field
        return sample


class _ShardFile:
    """A shard open for reading, closed with its last reference."""

    def __init__(self, path: str, stamp: tuple[int, int]) -> None:
        self._fd = -1
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stat = os.fstat(self._fd)
        except OSError as error:
            raise DataError(
                f"Shard {path} cannot be read ({error.strerror}); it could when the dataset was opened."
            ) from error
        if (stat.st_size, stat.st_mtime_ns) != stamp:
            _refuse_changed(path)
        if hasattr(os, "posix_fadvise"):
            # Reading ahead fetches what the next random read does not want.
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self._fd >= 0:
            close(self._fd)

    def read(self, members: list[tuple[str, int, int]]) -> Iterator[tuple[str, bytes]]:
        """Extension and payload of each of ``members`` (extension, offset, length), ascending in the file."""
        if not members:
            return
        start, (_, last, length) = members[0][1], members[-1]
        if last + length - start - sum(length for _, _, length in members) > _GAP:
            for extension, offset, length in members:
                yield extension, self._pread(offset, length)
            return
        block = self._pread(start, last + length - start)
        for extension, offset, length in members:
            yield extension, block[offset - start : offset - start + length]

    def _pread(self, offset: int, length: int) -> bytes:
        data = b""
        while len(data) < length:  # one call gives 2 GiB at most
            try:
                part = os.pread(self._fd, length - len(data), offset + len(data))
            except OSError as error:
                raise DataError(f"Shard {self._path} cannot be read at {offset:,} ({error.strerror}).") from error
            if not part:
                raise DataError(
                    f"Shard {self._path} was cut short after it was indexed: {length:,} bytes expected at "
                    f"{offset:,}, {len(data):,} found. Restore the shard and open the dataset again."
                )
            data = data + part if data else part
        return data


def _expand(urls: AnyPath | Iterable[AnyPath]) -> list[str]:
    """The shards meant by ``urls``, in order."""
    from braceexpand import braceexpand

    expanded: list[str] = []
    for item in [urls] if isinstance(urls, str | os.PathLike) else urls:
        if not isinstance(item, str | os.PathLike):
            raise ConfigError(f"urls must be a path or url, or an iterable of them, as str or Path; found {item!r}.")
        text = os.fspath(item)
        _local_path(text)  # the braces in a pipe's command are not ours to expand
        try:
            patterns = list(braceexpand(text))
        except ValueError as error:
            raise ConfigError(f"The braces in {text!r} do not match; write 'train-{{000..099}}.tar'.") from error
        for pattern in patterns:
            expanded.extend(_find(pattern))
    if not expanded:
        raise ConfigError("urls is empty; name at least one tar file.")
    return expanded


def _find(pattern: str) -> list[str]:
    path = _local_path(pattern)
    if Path(path).is_dir():
        found = [str(file) for file in Path(path).glob("*.tar")]
    elif re.search(r"[*?[]", path) and not Path(path).exists():
        found = glob(path)  # noqa: PTH207  # Path.glob takes no absolute pattern
    else:
        return [pattern]
    if not found:
        raise DataError(f"There is no shard at {pattern}: a folder must hold *.tar, a glob must match files.")
    return sorted(found)


def _local_path(url: str) -> str:
    """The path that ``url`` names; DataError for what cannot be read by index."""
    if url.startswith("pipe:"):
        why, remedy = "is the output of a command", "Write it to a local tar file"
    elif _SCHEME.match(url) and not url.startswith("file:"):
        why, remedy = "is not local", "Copy it to a local disk"
    elif _COMPRESSED.search(url):
        why, remedy = "is compressed", "Decompress it"
    else:
        return urlparse(url).path if url.startswith("file:") else url
    raise DataError(
        f"{url!r} {why}; only local, uncompressed tar files can be read by index. "
        f"{remedy}, or convert it with `infobatch-stream convert`."
    )


def _refuse_changed(path: str) -> NoReturn:
    raise DataError(
        f"Shard {path} changed (size or time) after the dataset was opened, so an index may mean another sample "
        "now. Open the dataset again, with a new score store if the samples are others."
    )
