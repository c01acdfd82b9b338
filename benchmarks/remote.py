"""Shards at a server with a narrow line: how soon the first batch is there, and what comes in the first seconds."""

import math
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from benchmarks.contender import Contender, Epochs, infobatch, named, others
from benchmarks.measure import Spread, in_turn, ratio
from benchmarks.report import Figure
from benchmarks.shards import LARGE, TINY, Load, workspace, write
from infobatch_stream import IndexedWebDataset
from tests.support.servers import FaultyServer, s3_environment

TITLE = "Loading remote shards, nothing here at the start"
LOAD = replace(LARGE, count=26_800, batch=256)  # 40 shards of 64 MiB
RATE = 50e6  # bytes per second, of all connections together
WINDOW = 30.0  # seconds
BARE = ", without checksums"
_WORKERS = 2


@dataclass(frozen=True)
class Start:
    """first: seconds to the first batch. samples: that came within the `WINDOW`."""

    first: float
    samples: int


def run(tiny: bool) -> list[Figure]:
    """Compare InfoBatchLoader with StreamingDataset's own iteration, over the same shards at the same server."""
    load, rate, window = (TINY[LARGE], 4e6, 2.0) if tiny else (LOAD, RATE, WINDOW)
    with workspace() as root:
        folders = {format: write(format, load, root) for format in ("mds", "wds", "mds-bare", "wds-bare")}
        for format in ("wds", "wds-bare"):
            IndexedWebDataset(folders[format])  # has the indexes made that lie beside the shards
        with _server(root, rate) as url:
            mds, bare = (f"{root.name}/{folders[format].name}" for format in ("mds", "mds-bare"))
            tars, bare_tars = (
                [f"{url}/{root.name}/{file.parent.name}/{file.name}" for file in sorted(folders[format].glob("*.tar"))]
                for format in ("wds", "wds-bare")
            )
            block = _entries_of_first_batch(load)
            makers: dict[str, tuple[Any, ...]] = {
                "InfoBatchLoader, MDS": (_ours, url, f"s3://{mds}", load),
                "InfoBatchLoader, WebDataset": (_ours_wds, tars, load),
                f"InfoBatchLoader, MDS{BARE}": (_ours, url, f"s3://{bare}", load),
                f"InfoBatchLoader, WebDataset{BARE}": (_ours_wds, bare_tars, load),
                "StreamingDataset": (_streaming, url, f"s3://{mds}", load, {}),
                "StreamingDataset, predownload of one batch, blocks of 65,536": (
                    _streaming, url, f"s3://{mds}", load, {"predownload": load.batch, "shuffle_block_size": 65536},
                ),
                f"StreamingDataset, blocks of {block:,} only": (
                    _streaming, url, f"s3://{mds}", load, {"predownload": load.batch, "shuffle_block_size": block},
                ),
            }  # fmt: skip
            contenders: dict[str, Callable[[], Any]] = {
                name: partial(_once, window, *maker) for name, maker in makers.items()
            }
            found = in_turn(contenders, rounds=1 if tiny else 3, warmup=0)
    return [*_against_download(found, load, rate), *_figures(found, load, window)]


def _against_download(found: dict[str, list[Any]], load: Load, rate: float) -> Iterator[Figure]:
    shards = math.ceil(_entries_of_first_batch(load) * load.size / load.shard)
    seconds = shards * load.shard / rate
    for name in ("InfoBatchLoader, MDS", "InfoBatchLoader, WebDataset"):
        for which in (name, f"{name}{BARE}"):
            yield Figure(
                target=4,
                what=f"time to the first batch: {which}, against the download of the shards that it needs",
                value=Spread.of([start.first / seconds for start in found[which]]),
                unit="x",
                limit=f"{shards} shards of {load.shard >> 20} MiB at {rate / 1e6:.0f} MB/s: {seconds:.1f} s",
                bound=1.1,
                at="most",
            )


def _entries_of_first_batch(load: Load) -> int:
    """How many entries stand before the last that our first batch may hold: a block as large opens as many shards."""
    return int((2 * 65536 * load.batch) ** 0.5)


def _figures(found: dict[str, list[Any]], load: Load, window: float) -> Iterator[Figure]:
    streaming = [start.first for start in found["StreamingDataset"]]
    best = "StreamingDataset, predownload of one batch, blocks of 65,536"
    for name in ("InfoBatchLoader, MDS", "InfoBatchLoader, WebDataset"):
        mine = [start.first for start in found[name]]
        yield Figure(
            target=6,
            what=f"time to the first batch: {name}",
            value=ratio(mine, streaming),
            unit="x",
            limit=f"{named('mosaicml-streaming')}: StreamingDataset(shuffle=True) in a DataLoader, 2 workers",
            bound=0.5,
            at="most",
            note=f"{load.count:,} samples of {load.name} in shards of {load.shard >> 20} MiB, batches of {load.batch}, "
            f"2 workers, a line of {RATE / 1e6:.0f} MB/s; from before the dataset is opened, with an empty folder.",
        )
        yield Figure(
            target=0,
            what=f"time to the first batch: {name}, against the best setting that mixes as widely",
            value=ratio(mine, [start.first for start in found[best]]),
            unit="x",
            limit=best,
        )
    for name, starts in found.items():
        yield Figure(0, f"{name}: first batch", Spread.of([start.first for start in starts]), "s", "")
    for name, starts in found.items():
        samples = Spread.of([start.samples / window for start in starts])
        yield Figure(0, f"{name}: in the first {window:.0f} s", samples, "samples/s", "")


@contextmanager
def _server(root: Path, rate: float) -> Iterator[str]:
    """The url of a server, in a process of its own, of what is in ``root``: of its folder's name as a bucket."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, root.parent, rate), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send(None)
        process.join()


def _serve(pipe: Any, source: Path, rate: float) -> None:
    with FaultyServer(source, rate) as server:
        pipe.send(server.url)
        pipe.recv()


def _once(window: float, make: Callable[..., Epochs], *args: Any) -> Start:
    here = Path(tempfile.mkdtemp(prefix="infobatch-benchmark-local-"))
    try:
        with Contender(_starting, window, make, here, *args) as contender:
            return contender()
    finally:
        shutil.rmtree(here)


def _starting(window: float, make: Callable[..., Epochs], *args: Any) -> Callable[[], Start]:
    def start() -> Start:
        begin, first, samples = time.perf_counter(), None, 0
        for batch in make(*args)():
            now = time.perf_counter() - begin
            first = now if first is None else first
            if now > window:
                break
            samples += len(batch)
        assert first is not None
        return Start(first, samples)

    return start


def _mds(here: Path, url: str, remote: str, load: Load, **options: Any) -> Any:
    from streaming import StreamingDataset

    os.environ.update(s3_environment(url))
    return StreamingDataset(remote=remote, local=str(here / "shards"), batch_size=load.batch, **options)


def _ours(here: Path, url: str, remote: str, load: Load) -> Epochs:
    return infobatch(_mds(here, url, remote, load), load.batch, _WORKERS)


def _ours_wds(here: Path, tars: list[str], load: Load) -> Epochs:
    return infobatch(IndexedWebDataset(tars, cache_dir=here / "shards"), load.batch, _WORKERS)


def _streaming(here: Path, url: str, remote: str, load: Load, options: dict[str, Any]) -> Epochs:
    dataset = _mds(here, url, remote, load, shuffle=True, **options)
    for stream in dataset.streams:
        # Else both workers, forked, go on with the connection that index.json came by: one waits for what the other
        # got until it times out, after 60 s, or reads a shard with the bytes of another.
        stream._downloader.clean_up()
    loader = DataLoader(dataset, batch_size=load.batch, num_workers=_WORKERS, collate_fn=list, drop_last=True)
    return others(loader, load.batch)
