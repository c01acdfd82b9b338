"""Any dataset with a length and items: samples without shards."""

from collections.abc import Callable
from typing import Any

from torch.utils.data import IterableDataset, Subset, TensorDataset

from infobatch_stream.augmentation import each_read, sample_read
from infobatch_stream.formats.fingerprint import fingerprint
from infobatch_stream.planning.shape import Pool
from infobatch_stream.sources.base import SourceType, name_sample

__all__ = ["MAP_STYLE", "MapStyleSource", "map_fingerprint"]


def map_fingerprint(num_samples: int) -> str:
    """The fingerprint of a map-style dataset: only its length is known of it."""
    return fingerprint("map", [num_samples])


class MapStyleSource:
    """A map-style dataset."""

    shard_sizes = None
    is_remote = False
    capacity = None
    mixing: dict[str, Any] = {}  # noqa: RUF012 - never written

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.num_samples: int = len(dataset)
        self.draws = type(dataset) is not TensorDataset
        self.fingerprint = map_fingerprint(self.num_samples)

    def pool(self, epoch: int) -> Pool | None:
        """None: each sample once."""
        return None

    def ensure_local(self, shard: int) -> None:
        """Never called: there are no shards."""
        raise NotImplementedError

    def by_ranges(self, indices: list[int]) -> None:
        """Nothing is remote."""

    def read(self, index: int) -> Any:
        """``dataset[index]``."""
        sample_read(index)
        return self._dataset[index]

    def read_many(self, indices: list[int]) -> list[Any]:
        """All at once by the dataset's own ``__getitems__`` where it has one, else one by one."""
        several = _several(self._dataset)
        if several is None:
            return self._read_each(indices)
        try:
            return list(several(indices))
        except Exception as error:
            which = next(([index] for index in indices if self._fails(index, type(error))), indices)
            name_sample(error, which, self._dataset)
            raise

    def _read_each(self, indices: list[int]) -> list[Any]:
        dataset, samples = self._dataset, []
        index = -1
        try:
            for index in each_read(indices):
                samples.append(dataset[index])
        except Exception as error:
            name_sample(error, [index], dataset)
            raise
        return samples

    def _fails(self, index: int, kind: type[Exception]) -> bool:
        """Whether it is this sample that cannot be read, as far as reading it alone tells."""
        try:
            self._dataset[index]
        except Exception as error:
            return type(error) is kind
        return False


def _several(dataset: Any) -> Callable[[list[int]], Any] | None:
    """What reads several samples of ``dataset`` at once. A Subset has a method for it, which may be but a loop."""
    inner = dataset
    while type(inner) is Subset:
        inner = inner.dataset
    several = getattr(inner, "__getitems__", None)
    return getattr(dataset, "__getitems__", None) if callable(several) else None


def _accepts(dataset: Any) -> bool:
    """Whether it has items and a length. (An IterableDataset inherits ``__getitem__``, which only raises.)"""
    has_items = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    return has_items and not isinstance(dataset, IterableDataset)


MAP_STYLE = SourceType(_accepts, lambda dataset, *_: MapStyleSource(dataset))
