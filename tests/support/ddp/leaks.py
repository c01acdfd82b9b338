"""Train many short epochs, in several ways, and note at the end of each epoch what the process and its workers hold.

    leaks.py KIND FOLDER TEMPORARY [EPOCHS]

KIND: map, wds or mds. FOLDER: with the shards in it; gets facts.json: for each way one object an epoch.
TEMPORARY: an empty folder for temporary files.
"""

import gc
import json
import os
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from infobatch_stream import InfoBatchLoader
from support.ddp.data import Noisy, loss_of, wds

EPOCHS = 50
# reload: no workers; the state of each epoch is saved, and loaded again.
WAYS = {
    "persistent": {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": "fork"},
    "fresh": {"num_workers": 2, "persistent_workers": False, "multiprocessing_context": "fork"},
    "threads": {"num_threads": 2},
    "reload": {},
}


def dataset_of(kind, folder):
    if kind == "map":
        return Noisy(96)
    if kind == "wds":
        return wds(folder / "shards")
    from streaming import StreamingDataset

    return StreamingDataset(local=str(folder / "shards"), batch_size=8)


def read(file):
    """Nothing, of a thread or process that has just ended."""
    with suppress(OSError):
        return Path(file).read_text()
    return ""


def children():
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in read(task / "children").split()]


def resident(pid):
    """KiB."""
    return next((int(line.split()[1]) for line in read(f"/proc/{pid}/status").splitlines() if "VmRSS:" in line), 0)


def count(folder):
    with suppress(OSError):
        return len(list(Path(folder).iterdir()))
    return 0


def facts(workers):
    """workers: of this way so far, the living among them."""
    gc.collect()
    maps = read("/proc/self/maps").splitlines()
    living = [pid for pid in children() if pid in workers]
    pool = sum(thread.name.startswith("asyncio_") for thread in threading.enumerate())  # Zarr's: up to a fixed size
    # torch names its segments by process; those of other processes on this machine are none of ours.
    owners = tuple(f"torch_{pid}_" for pid in (os.getpid(), *workers))
    return {
        "descriptors": count("/proc/self/fd"),
        "descriptors of workers": sum(count(f"/proc/{pid}/fd") for pid in living),
        "mapped segments": sum("/dev/shm/" in line for line in maps),
        "left segments": sum(path.name.startswith(owners) for path in Path("/dev/shm").iterdir()),
        "maps of the store": sum("scores.zarr" in line for line in maps),
        "threads": count("/proc/self/task") - pool,
        "children": len(children()),
        "temporary files": len(list(Path(os.environ["TMPDIR"]).rglob("*"))),
        "resident": resident("self"),
        "resident in workers": sum(map(resident, living)),
    }


def train(dataset, way, store, epochs):
    found, workers, others = [], set(), set(children())
    with InfoBatchLoader(dataset, store, batch_size=8, epochs=epochs, **WAYS[way]) as loader:
        for epoch in range(epochs):
            for _, picks in loader:
                loader.update(loss_of(picks.index, epoch), picks)
                workers.update(set(children()) - others)
            loader.peek()
            state = loader.state_dict()
            if way == "reload":
                loader.load_state_dict(state)
            found.append(facts(workers))
    return found


def main(kind, folder, temporary, epochs=EPOCHS):
    folder = Path(folder)
    os.environ["TMPDIR"] = tempfile.tempdir = temporary
    dataset = dataset_of(kind, folder)
    enlarge = [sys.intern(f"a string {i}") for i in range(400_000)]
    del enlarge  # Python's table of strings grows in large steps, of which one in mid-run would be taken for a leak
    gc.collect()
    gc.freeze()  # what the libraries made; else each collection takes a quarter of a second
    found = {way: train(dataset, way, folder / way / "scores.zarr", int(epochs)) for way in WAYS}
    (folder / "facts.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
