"""WebDataset tars as a source of samples."""

from contextlib import AbstractContextManager, suppress
from typing import Any

import numpy as np

from infobatch_stream._urls import base_name
from infobatch_stream.augmentation import each_read, sample_read
from infobatch_stream.errors import DataError
from infobatch_stream.formats.fingerprint import fingerprint
from infobatch_stream.planning.shape import Pool
from infobatch_stream.sources.base import SourceType, name_sample
from infobatch_stream.sources.webdataset.dataset import IndexedWebDataset

__all__ = ["WEBDATASET", "WdsSource"]


class WdsSource:
    """An `IndexedWebDataset` as a `Source`. Samples come from ``dataset[i]``, so a subclass may override that."""

    mixing: dict[str, Any] = {}  # noqa: RUF012 - never written

    def __init__(self, dataset: IndexedWebDataset) -> None:
        self.dataset = dataset
        self.shard_sizes = dataset.shard_sizes
        self.num_samples = int(dataset.shard_sizes.sum())
        self.is_remote = dataset.is_remote

    @property
    def fingerprint(self) -> str:
        """Digest of the shards' file names, numbers of samples and probes; the folders do not matter."""
        names = [ascii(base_name(url)) for url in self.dataset.urls]
        return fingerprint("wds", zip(names, self.shard_sizes.tolist(), self.dataset.shard_probes, strict=True))

    @property
    def draws(self) -> bool:
        """Whether there are stages, or methods of a subclass."""
        return type(self.dataset) is not IndexedWebDataset or bool(self.dataset._stages)

    @property
    def capacity(self) -> int | None:
        """How many shards this machine keeps at least, under a limit; None if all."""
        return self.dataset.capacity

    def ensure_local(self, shard: int) -> None:
        """Return when shard number ``shard`` is local; errors are those of `IndexedWebDataset.ensure_local`."""
        self.dataset.ensure_local(shard)

    def by_ranges(self, indices: list[int]) -> AbstractContextManager[None] | None:
        """Download of these samples alone what is not here; within, they are read. None where that is of no use."""
        return None if self.capacity is not None else self.dataset._shards.by_ranges(indices)

    def pool(self, epoch: int) -> Pool | None:
        """None: each sample once."""
        return None

    def read(self, index: int) -> Any:
        """Sample ``index``; errors are those of `IndexedWebDataset.__getitem__`."""
        sample_read(index)
        return self.dataset[index]

    def read_many(self, indices: list[int]) -> list[Any]:
        """The samples, in the order of ``indices``, read in the order of the shards; one that cannot be read raises."""
        samples: list[Any] = [None] * len(indices)
        places = np.argsort(indices, kind="stable").tolist()
        ordered = [indices[place] for place in places]
        with suppress(DataError):  # raised again where it is read, if the user lets it
            self.dataset.readahead(ordered)
        try:
            together = self.dataset._read_together(ordered)
            for place, index, raw in zip(places, each_read(ordered), together, strict=True):
                samples[place] = self.dataset[index] if raw is None else self.dataset._staged(index, raw)
        except Exception as error:
            name_sample(error, [index], self.dataset)
            raise
        finally:
            self.dataset.close()
        return samples


WEBDATASET = SourceType(lambda dataset: isinstance(dataset, IndexedWebDataset), lambda dataset, *_: WdsSource(dataset))
