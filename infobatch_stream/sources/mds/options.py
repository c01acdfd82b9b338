"""What a StreamingDataset was made with, and what its subclass overrides, that does not apply under a loader."""

import warnings
from collections.abc import Callable
from inspect import signature
from typing import TYPE_CHECKING, Any

from infobatch_stream.errors import ConfigError
from infobatch_stream.sources.mds.remote_index import local_dir

if TYPE_CHECKING:
    from streaming import Stream, StreamingDataset

__all__ = ["check_options"]

_INSTEAD = {
    "predownload": "it counts samples; InfoBatchLoader(predownload=) counts steps",
    "partition_algo": "the loader's plan says which rank gets what",
    "num_canonical_nodes": "use InfoBatchLoader(canonical_nodes=)",
    "shuffle_algo": "use InfoBatchLoader(shuffle=, shuffle_window=)",
    "shuffle_block_size": "use InfoBatchLoader(shuffle_window=)",
    "batching_method": "a batch mixes the streams, so their samples need one shape, or a collate_fn that takes several",
}
_BYPASSED = {
    "__iter__": "samples are read by index, so do in __getitem__ what is to be done with each",
    "__len__": "all num_samples samples are read; with fewer, wrap the dataset in a torch.utils.data.Subset",
    "state_dict": "use the loader's state_dict()",
    "load_state_dict": "use the loader's load_state_dict()",
    "resample_streams": "it is asked only where streams are mixed (proportion, repeat, choose, epoch_size)",
}


def check_options(dataset: "StreamingDataset", batch_size: int | None, shuffle: bool) -> None:
    """Warn, once, of what of ``dataset`` is not used; batch_size, shuffle: the loader's.

    Raises ConfigError for what cannot be had.
    """
    if dataset.replication is not None and dataset.replication > 1:
        raise ConfigError(
            f"StreamingDataset(replication={dataset.replication}) does not work here: the ranks would get different "
            "samples. Leave it out, and give the loader process_group=, the group of ranks over which data is split, "
            f"for example init_device_mesh('cuda', (ranks // {dataset.replication}, {dataset.replication}), "
            "mesh_dim_names=('data', 'model'))['data'].get_group()."
        )
    _check_hashes(dataset)
    mixed = any(stream.choose != n for stream, n in zip(dataset.streams, dataset.samples_per_stream, strict=True))
    unused = [f"{name}={getattr(dataset, name)!r} ({_INSTEAD[name]})" for name in _given(dataset)]
    if dataset.batch_size not in (None, batch_size) and batch_size is not None:
        unused.append(f"batch_size={dataset.batch_size} (the loader's is used: {batch_size})")
    if dataset.shuffle and not shuffle:
        unused.append("shuffle=True (the loader has shuffle=False)")
    if not mixed and dataset.shuffle_seed != _default("shuffle_seed"):
        unused.append(f"shuffle_seed={dataset.shuffle_seed} (use InfoBatchLoader(seed=))")
    if dataset.cache_limit and not any(stream.remote for stream in dataset.streams):
        unused.append("cache_limit (nothing is downloaded: shards without a remote are never removed)")
    name = type(dataset).__name__
    if unused:
        _warn(f"these options of {name} do not apply: {'; '.join(unused)}.")
    bypassed = [f"{hook} ({instead})" for hook, instead in _BYPASSED.items() if _overrides(dataset, hook)]
    if mixed:
        bypassed = [text for text in bypassed if not text.startswith("resample_streams")]
    if bypassed:
        _warn(f"these methods that {name} overrides are not called: {'; '.join(bypassed)}.")


def _given(dataset: "StreamingDataset") -> list[str]:
    """The options without effect that are not as they are by default."""
    usual = {name: _default(name) for name in _INSTEAD}
    usual["predownload"] = 8 * dataset.batch_size if dataset.batch_size is not None else 64
    if hasattr(dataset, "_unique_worker_world"):  # it was iterated over, which fills these in
        del usual["num_canonical_nodes"], usual["shuffle_block_size"]
    return [name for name, value in usual.items() if getattr(dataset, name) != value]


def _default(name: str) -> Any:
    from streaming import StreamingDataset

    return signature(StreamingDataset).parameters[name].default


def _overrides(dataset: "StreamingDataset", hook: str) -> bool:
    from streaming import StreamingDataset

    mine: Callable[..., Any] = getattr(type(dataset), hook)
    return mine is not getattr(StreamingDataset, hook) or hook in vars(dataset)


def _check_hashes(dataset: "StreamingDataset") -> None:
    """Raise ConfigError if what is to come has no checksum of the kind asked for: streaming says so when it comes."""
    from streaming.base.dataset import _ShardState
    from streaming.base.hashing import is_hash

    here = (dataset._shard_states.numpy() == int(_ShardState.LOCAL)).tolist()
    for is_here, shard, number in zip(here, dataset.shards, dataset.stream_per_shard.tolist(), strict=True):
        stream = dataset.streams[number]
        algorithm = stream.validate_hash
        if not algorithm or not (_may_come(dataset, stream, is_here) or _is_to_be_unpacked(stream, shard)):
            continue  # what was here from the start is not checked
        for file in (packed or raw for raw, packed in shard.file_pairs):
            if algorithm in file.hashes and is_hash(algorithm):
                continue
            there = ", ".join(name for name in file.hashes if is_hash(name))
            remedy = "Give one that it has, or leave validate_hash out: then the quickest of them is used."
            raise ConfigError(
                f"validate_hash={algorithm!r}: index.json has no such checksum of {file.basename} (it has: "
                f"{there or 'none'}). {remedy if there else 'Leave validate_hash out: only sizes are checked then.'}"
            )


def _may_come(dataset: "StreamingDataset", stream: "Stream", is_here: bool) -> bool:
    """Whether a shard may have to be downloaded. Under a limit one that is here may be removed before."""
    return bool(stream.remote) and (bool(dataset.cache_limit) or not is_here)


def _is_to_be_unpacked(stream: "Stream", shard: Any) -> bool:
    return bool(shard.compression) and not all(
        local_dir(stream).joinpath(raw.basename).exists() for raw, _ in shard.file_pairs
    )


def _warn(text: str) -> None:
    warnings.warn(f"InfoBatchLoader: {text}", RuntimeWarning, stacklevel=6)  # whoever makes the loader
