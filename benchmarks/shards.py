"""The data that loaders are compared on: the same samples as MDS, WebDataset, LitData and plain files.

Samples are bytes that do not compress, the same in every run. They are written into the folder that BENCHMARK_DATA
names, and stay there; without one, into a temporary folder that is removed.
"""

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from benchmarks.measure import in_child
from infobatch_stream.convert import write_shards

__all__ = [
    "LARGE",
    "SMALL",
    "TINY",
    "Files",
    "Load",
    "find_wids",
    "has_litdata",
    "staged",
    "wids_index",
    "workspace",
    "write",
]


@dataclass(frozen=True)
class Load:
    """``count`` samples of ``size`` bytes in shards of ``shard`` bytes, loaded in batches of ``batch``."""

    name: str
    size: int
    count: int
    batch: int
    shard: int

    def __getitem__(self, index: int) -> bytes:
        """Sample ``index``."""
        noise = _noise()
        start = index * 7919 % (len(noise) - self.size)  # a prime, so that few samples begin at the same place
        return noise[start : start + self.size]

    def __iter__(self) -> Iterator[bytes]:
        """All samples."""
        return (self[index] for index in range(self.count))


SMALL = Load("800 B", 800, 100_000, 256, 1 << 24)
LARGE = Load("100 KB", 100_000, 6_000, 64, 1 << 26)
TINY = {SMALL: Load("800 B", 800, 600, 16, 1 << 18), LARGE: Load("100 KB", 100_000, 120, 8, 1 << 22)}


@cache
def _noise() -> bytes:
    return np.random.default_rng(0).bytes(1 << 24)


@contextmanager
def workspace() -> Iterator[Path]:
    """The folder for shards: BENCHMARK_DATA, or a temporary one."""
    if kept := os.environ.get("BENCHMARK_DATA"):
        folder = Path(kept).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="infobatch-benchmark-") as folder:
        yield Path(folder)


def write(format: str, load: Load, root: Path) -> Path:
    """The folder below ``root`` with ``load`` as "mds", "wds", "litdata" or "files"; written unless it is there.

    "mds-bare" and "wds-bare" are without checksums.
    """
    folder = root / f"{format}-{load.size}x{load.count}"
    if folder.exists():
        return folder
    print(f"writing {load.count:,} samples of {load.name} as {format}", file=sys.stderr)
    match format:
        case "mds" | "wds":
            write_shards(({"data": sample} for sample in load), folder, format, shard_bytes=load.shard)
        case "mds-bare" | "wds-bare":
            samples = ({"data": sample} for sample in load)
            write_shards(samples, folder, format[:3], shard_bytes=load.shard, hashes=())
            for index in folder.glob("*.index.npz"):
                index.unlink()  # it is made again, without
        case "files":
            with staged(folder) as new:
                for index, sample in enumerate(load):
                    file = _file(new, index)
                    file.parent.mkdir(exist_ok=True)
                    file.write_bytes(sample)
        case "litdata":
            with staged(folder) as new:
                in_child(_optimize, load, new)  # it sets up much that is to die with its process
        case _:
            raise ValueError(format)
    return folder


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder that becomes ``folder`` once it is complete."""
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as name:
        new = Path(name, "new")
        new.mkdir()
        yield new
        new.rename(folder)


def _optimize(load: Load, folder: Path) -> None:
    # It empties its caches before and after, which by default are TMPDIR/chunks and TMPDIR/data, whoever's they are.
    own = folder.with_name("caches")
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(own / "chunks")
    os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = str(own / "data")
    os.environ["LITDATA_CACHE_DIR"] = str(own / "read")
    from litdata import optimize

    optimize(
        fn=load.__getitem__, inputs=list(range(load.count)), output_dir=str(folder), chunk_bytes=load.shard,
        num_workers=1, verbose=False,
    )  # fmt: skip


class Files(Dataset[bytes]):
    """The ``count`` samples that `write` made as "files"."""

    def __init__(self, folder: Path, count: int) -> None:
        self._files = [str(_file(folder, index)) for index in range(count)]

    def __len__(self) -> int:
        """How many there are."""
        return len(self._files)

    def __getitem__(self, index: int) -> bytes:
        """The content of one."""
        with open(self._files[index], "rb") as file:  # noqa: PTH123 - half the time of Path.open
            return file.read()


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index // 1000:04}" / f"{index:08}.bin"


def has_litdata() -> bool:
    """Whether LitData is installed; if not, says on stderr that its figures are left out."""
    if importlib.util.find_spec("litdata") is not None:
        return True
    print("litdata is not installed: its figures are left out", file=sys.stderr)
    return False


def find_wids() -> bool:
    """Whether wids can be imported, from the folder that WIDS_PATH names too; if not, says so on stderr.

    webdataset 1.0 has no wids any more. To have it: ``pip download webdataset==0.2.111 --no-deps``, unpack the folder
    ``wids`` of that wheel (and not ``webdataset``) into a folder of its own, and set WIDS_PATH to that.
    """
    path = os.environ.get("WIDS_PATH")
    if path and path not in sys.path:
        sys.path.append(path)  # behind all others
    try:
        from wids import ShardListDataset  # noqa: F401
    except ImportError:
        print(
            "wids cannot be imported (see benchmarks/shards.py, WIDS_PATH): its figures are left out", file=sys.stderr
        )
        return False
    return True


def wids_index(folder: Path, root: Path, samples: dict[str, int]) -> Path:
    """Write the index that wids opens for the tars in ``folder`` with so many ``samples`` each."""
    shards = [
        {"url": str(folder / name), "nsamples": count, "filesize": (folder / name).stat().st_size}
        for name, count in samples.items()
    ]
    file = root / f"{folder.name}.wids.json"
    file.write_text(json.dumps({"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}))
    return file
