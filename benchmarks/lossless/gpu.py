"""The lossless study on a GPU, where no network is: pack a folder, carry it there, and run it.

    python -m benchmarks.lossless pack FOLDER --images IDX --packages SITE-PACKAGES          # here: wheels and data
    pip install --no-index --no-deps --target libraries FOLDER/wheels/*.whl                  # there
    PYTHONPATH=libraries python -m benchmarks.lossless.gpu FOLDER/data lossless.jsonl --minutes 9

There it takes torch and NumPy. A process for each task and seed, side by side; each finished run is a line at once.
"""

import argparse
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.lossless.tables import MAIN, TABLES
from benchmarks.lossless.tasks import FAMILIES, TASKS
from benchmarks.lossless.training import on_one_thread

__all__ = ["LIMIT", "SIZED_FOR_GPUS", "WHEELS", "main", "pack"]

LIMIT = 64 << 20  # bytes of the folder
SIZED_FOR_GPUS = [tasks[1] for tasks in FAMILIES.values() if len(tasks) > 1]
WHEELS = ("zarr", "numcodecs", "donfig", "google-crc32c", "pyyaml", "packaging", "typing-extensions", "msgpack")
_TABLE = "12 epochs"


def pack(folder: Path, sources: dict[str, Path]) -> int:
    """Put wheels, and the samples of the tasks that are sized for GPUs, into ``folder``; how many bytes that is.

    sources: by task. Raises ValueError when it is more than `LIMIT`.
    """
    for name in SIZED_FOR_GPUS:
        data = TASKS[name].data
        if not (there := folder / "data" / data.name).exists():  # of another task
            there.mkdir(parents=True)
            data.pack(sources[name], there, TASKS[name].samples)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*download, "--dest", str(folder / "wheels"), *WHEELS], check=True)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > LIMIT:
        raise ValueError(f"{folder} has {size >> 20} MiB, more than {LIMIT >> 20}; take fewer samples.")
    return size


def main(arguments: Iterable[str] | None = None) -> None:
    """Run what is missing of the main rows, until the time is over; what is not finished by then is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="Folder that pack made.")
    parser.add_argument("results", type=Path, help="Where runs are added.")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="The first seed, of the table's own.")
    parser.add_argument("--tasks", nargs="+", default=SIZED_FOR_GPUS, choices=list(TASKS))
    parser.add_argument("--epochs", type=int, default=TABLES[_TABLE].epochs)
    given = parser.parse_args(None if arguments is None else list(arguments))
    until = time.monotonic() + 60 * given.minutes
    spawn = multiprocessing.get_context("spawn")
    first = TABLES[_TABLE].first + given.first
    running = []
    for seed in range(first, first + given.seeds):  # whole seeds first, if the device is too small for all
        for name in given.tasks:
            todo = {
                "task": TASKS[name],
                "names": MAIN,
                "folder": given.data / TASKS[name].data.name,
                "device": "cuda" if torch.cuda.is_available() else "cpu",
                "epochs": given.epochs,
                "results": given.results,
                "curve": False,
            }
            running.append(spawn.Process(target=on_one_thread, args=(seed, todo)))
            running[-1].start()
    for process in running:
        process.join(max(0.0, until - time.monotonic()))
    for process in running:
        process.terminate()
        process.join()
    failed = [process.exitcode for process in running if process.exitcode not in (0, -15)]
    if failed:
        sys.exit(f"{len(failed)} of {len(running)} processes failed; their errors are above.")


if __name__ == "__main__":
    main()
