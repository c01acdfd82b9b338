"""WebDataset tars read by index: a map-style dataset with webdataset's own per-sample stages."""

import copy
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, Self

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from infobatch_stream._urls import AnyPath
from infobatch_stream.errors import ConfigError, DataError, MissingExtraError
from infobatch_stream.sources.remote.shard_cache import ShardCache
from infobatch_stream.sources.urls import expand_shards
from infobatch_stream.sources.webdataset.shards import TarShards

__all__ = ["IndexedWebDataset", "need_webdataset"]

_FIXED = "every sample has a fixed index; filter when the shards are written, or wrap the dataset in a Subset"
_LENGTH = "an epoch's length follows from the scores; InfoBatchLoader(epochs=) sets the number of epochs"


def _refused(name: str, advice: str) -> Callable[..., NoReturn]:
    """A method that stands where webdataset has a stage that works on a stream, and says what to do here."""

    def stage(self: object, *args: object, **kwargs: object) -> NoReturn:
        raise ConfigError(
            f"{type(self).__name__} has no {name}(): samples are read by index, not as a stream. Instead: {advice}."
        )

    stage.__name__ = name
    stage.__doc__ = f"Raises ConfigError. Instead: {advice}."
    return stage


def need_webdataset() -> None:
    """Raise MissingExtraError now rather than in the middle of an epoch."""
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of("webdataset", "wds") from error


class IndexedWebDataset(Dataset[Any]):
    """Samples of uncompressed WebDataset tars by index 0..N-1, in the order (shard, row).

    A sample is the dict that webdataset 1.0.2 yields: `__key__`, `__url__`, `__local_path__`, and the bytes of each
    member by extension, in tar order. Stages (`decode`, `map`, ...) are webdataset's own; each returns a new dataset.

    Opening indexes each shard once. The index of a local shard is kept beside it or, where that cannot be written, in
    ``cache_dir``. For a remote shard ``<url>.index.npz`` is downloaded; where there is none, the shard itself, to index
    it. Indexes stay in the cache.

    Remote shards are downloaded to ``cache_dir`` when a sample of them is read, once for all processes of a machine.
    Cached shards are not revalidated. If you rewrite a shard, give it a new name or clear the cache.

    The dataset holds no scores or epochs. It survives fork and pickle, as far as the functions in its stages do, and
    may be read from several threads.

    Args:
        urls: A path, a url of any protocol that fsspec knows (s3://, gs://, hf://, https://), a glob, or a folder (its
            *.tar, sorted); or an iterable of these. Braces are expanded. A web server has no globs and folders.
        cache_dir: Folder for remote shards and indexes. Default: infobatch-stream in $XDG_CACHE_HOME or ~/.cache.
        cache_limit: Most bytes of remote shards in ``cache_dir``, as a number or as "200gb" (powers of 1024). The least
            recently read shards are removed. None: no limit.

    Raises:
        ConfigError: For braces that do not match, no url at all, or a ``cache_limit`` that is smaller than a shard.
        DataError: For shards that are missing, damaged, compressed, out of reach, or hold no sample.
        MissingExtraError: If webdataset, or for a url fsspec, is not installed.
    """

    def __init__(
        self,
        urls: AnyPath | Iterable[AnyPath],
        *,
        cache_dir: AnyPath | None = None,
        cache_limit: int | str | None = None,
    ) -> None:
        need_webdataset()
        self._open(TarShards(expand_shards(urls), ShardCache(cache_dir, cache_limit)))

    def _open(self, shards: TarShards) -> None:
        self._shards = shards
        self._stages: tuple[Callable[[Iterator[Any]], Iterator[Any]], ...] = ()

    @property
    def urls(self) -> list[str]:
        """The shards, one url or path each, in the order of the samples."""
        return list(self._shards.urls)

    @property
    def is_remote(self) -> bool:
        """Whether there is a shard for which `ensure_local` may have something to do."""
        return self._shards.is_remote

    @property
    def capacity(self) -> int | None:
        """How many shards the cache keeps at least under its limit, whichever they are; None if all."""
        return self._shards.capacity

    def ensure_local(self, shard: int) -> None:
        """Return when shard number ``shard`` is local. Any thread or process may call it.

        Under a ``cache_limit`` it may be removed again.

        Args:
            shard: 0..S-1, in the order of `urls`.

        Raises:
            DataError: If it cannot be downloaded.
        """
        self._shards.tars[shard].ensure_local()

    def close(self) -> None:
        """Close the files of shards that a cache_limit may remove; they are opened again when they are read."""
        self._shards.close()

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """int64[S]: samples per shard."""
        return self._shards.sizes

    @property
    def shard_probes(self) -> list[int]:
        """A checksum of parts of each shard: shards that were written anew in another order differ in it."""
        return self._shards.probes

    def __len__(self) -> int:
        """N, the number of samples."""
        return self._shards.ends[-1]

    def __getitem__(self, index: int) -> Any:
        """Sample ``index``, after all stages. What a stage raises passes unchanged.

        Args:
            index: -N..N-1; negative ones count from the end.

        Raises:
            IndexError: If there is no such sample.
            DataError: If the shard, which it names, cannot be read, or a stage drops the sample.
        """
        number = operator.index(index)
        size = len(self)
        if not -size <= number < size:
            raise IndexError(f"sample {number} of a dataset of {size}")
        return self._staged(number, self._shards.read(number % size))

    def _staged(self, number: int, sample: dict[str, Any]) -> Any:
        """What the stages make of ``sample``, which is sample ``number``."""
        if not self._stages:
            return sample
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

    def _read_together(self, indices: list[int]) -> list[dict[str, Any] | None]:
        """Samples before the stages, of 0..N-1 in ascending order; None for those that ``self[index]`` has to read.

        Large ones are left out where there are stages: a batch of videos need not fit in memory if the frames that the
        stages make of them do.
        """
        if type(self).__getitem__ is not IndexedWebDataset.__getitem__:
            return [None] * len(indices)
        try:
            return self._shards.read_many(indices, large=not self._stages)
        except Exception:  # raised again where its sample is read, which then is known
            return [None] * len(indices)

    def readahead(self, indices: Iterable[int]) -> None:
        """Have the system read samples of local shards ahead.

        Args:
            indices: 0..N-1, in the order in which they will be read.
        """
        self._shards.readahead(indices)

    def decode(self, *args: Any, **kwargs: Any) -> Self:
        """As webdataset's `decode`: decode fields by extension.

        It unpickles `pkl`, `pickle` and `pyd`, which can run any code: for shards that you do not trust set
        WDS_SECURE=1 in the environment, and webdataset raises instead.
        """
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
