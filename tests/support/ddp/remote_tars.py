"""Shards on servers: what tests put there, and what processes do that read them.

``remote_tars.py URLS CACHE OUT`` under torchrun: train an epoch, and note how that went.
"""

import io
import json
import os
import random
import sys
import tarfile
from pathlib import Path

from infobatch_stream.sources.remote import download, retry
from infobatch_stream.sources.remote.shard_cache import ShardCache


def write_tars(folder, shards=4, samples=8, size=4000):
    """Tars of samples with ``size`` random bytes, the same ones at every call; -> their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    draws = random.Random(0)
    paths = [folder / f"s{shard}.tar" for shard in range(shards)]
    for shard, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for i in range(shard * samples, (shard + 1) * samples):
                for name, data in ((f"{i:05}.bin", draws.randbytes(size)), (f"{i:05}.cls", b"%d" % i)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return paths


def be_quick(timeout=5.0):
    """Pauses and patience for tests."""
    retry.PAUSE, download.TIMEOUT = 0.01, timeout


def ensure_all(link, urls, folder, limit=None, rounds=1):
    """Download the shards, several times in an order of its own; -> how many bytes each had."""
    be_quick()
    cache = ShardCache(folder, limit)
    sizes = {}
    link.send("begins")
    for number in range(rounds):
        for url in random.Random(number * os.getpid()).sample(urls, len(urls)):
            sizes[url] = Path(cache.ensure_local(url)).stat().st_size if limit is None else len(read(cache, url))
    return sizes


def read(cache, url):
    """The bytes of a shard that may be removed at any time."""
    for _ in range(50):
        try:
            return Path(cache.ensure_local(url)).read_bytes()
        except FileNotFoundError:
            continue
    raise AssertionError(f"{url} was always gone")


def peak_of_download(link, url, place, environment):
    """Bytes that Python had at most while it downloaded, once all is imported."""
    import tracemalloc

    os.environ.update(environment)  # a child's is that of the first test that had one
    be_quick()
    download.download(url, Path(place))
    tracemalloc.start()
    download.download(url, Path(place))
    return tracemalloc.get_traced_memory()[1]


def number_of(sample):
    """Stage."""
    return int(sample["cls"])


def train(urls, cache, out):
    """In a rank: train one epoch on remote shards, and leave in OUT what was read."""
    from infobatch_stream import IndexedWebDataset, InfoBatchLoader
    from support.ddp.data import loss_of
    from support.ddp.launch import note_error, process_group

    be_quick()
    with process_group() as (rank, _):
        try:
            dataset = IndexedWebDataset(urls, cache_dir=cache).map(number_of)
            loader = InfoBatchLoader(
                dataset, out / "scores.zarr", batch_size=4, epochs=1, num_workers=1, multiprocessing_context="fork"
            )
            seen = []
            for numbers, picks in loader:
                assert numbers.tolist() == picks.index.tolist()
                loader.update(loss_of(picks.index), picks)
                seen += numbers.tolist()
            loader.commit()
        except Exception as error:
            note_error(out, rank, error)
            raise
        (out / f"seen-{rank}").write_text(json.dumps(seen))


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
