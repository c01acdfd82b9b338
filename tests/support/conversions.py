"""Sources for conversions, what is made of them, and how one is broken off."""

from pathlib import Path

import fsspec
import numpy as np
import pytest

from infobatch_stream import IndexedWebDataset
from infobatch_stream.convert import convert


def write_images(src, count, sizes):
    """``count`` files in 4 classes, of a number of bytes out of the range ``sizes``; nobody decodes them."""
    rng = np.random.default_rng(1)
    for number in range(count):
        path = src / f"class{number % 4}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.bytes(int(rng.integers(*sizes))))
    return src


def contents(folder):
    """Name -> bytes of all that is in ``folder``, but for indexes, which hold the times of their shards."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.suffix != ".npz"
    }


def images_in(folder):
    dataset = IndexedWebDataset(str(folder))
    return [dataset[k]["jpg"] for k in range(len(dataset))]


def stop_after(src, dst, shards, **options):
    """Break off a conversion when so many shards are done."""
    seen = []

    def watch(now):
        seen.append(now)
        if len(seen) == shards:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        convert(src, dst, "wds", shard_bytes=200 << 10, on_progress=watch, **options)
    assert "--resume" in caught.value.__notes__[0]


def fetched(url):
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {path[len(root) + 1 :]: fs.cat_file(path) for path in fs.find(root) if not path.endswith(".npz")}
