"""Any dataset with a length and items: samples without shards."""

from collections.abc import Sized
from typing import Any, Protocol

from torch.utils.data import TensorDataset

from infobatch_stream.sources.base import Pool, fingerprint

__all__ = ["MapStyle", "MapStyleSource"]


class MapStyle(Sized, Protocol):
    """What PyTorch calls a map-style dataset."""

    def __getitem__(self, index: int, /) -> Any:
        """Sample ``index``."""


class MapStyleSource:
    """A map-style dataset. All that can be told of it is its length, and so that is its fingerprint."""

    shard_sizes = None
    is_remote = False
    capacity = None
    mixing: dict[str, Any] = {}  # noqa: RUF012 - never written

    def __init__(self, dataset: MapStyle) -> None:
        self._dataset = dataset
        self.num_samples = len(dataset)
        self.draws = type(dataset) is not TensorDataset
        self.fingerprint = fingerprint("map", [self.num_samples])

    def pool(self, epoch: int) -> Pool | None:
        """None: each sample once."""
        return None

    def bring(self, shard: int) -> None:
        """Never called: there are no shards."""
        raise NotImplementedError

    def read(self, index: int) -> Any:
        """``dataset[index]``."""
        return self._dataset[index]

    def read_many(self, indices: list[int]) -> list[Any]:
        """All at once by the dataset's own ``__getitems__`` where it has one, else one by one."""
        several = getattr(self._dataset, "__getitems__", None)
        return list(several(indices)) if callable(several) else [self._dataset[index] for index in indices]
