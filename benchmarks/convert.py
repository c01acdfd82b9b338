"""Conversion: against copying the same files, and of as many files as ImageNet has."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.measure import Spread, drop_cache, in_turn, ratio
from benchmarks.report import Figure
from benchmarks.shards import staged, workspace

TITLE = "Conversion"
CLASSES = 1000
IMAGENET = 1_281_167
SMALL, LARGE = 500, 100_000  # bytes of a file
WORKERS = 2


def run(tiny: bool) -> list[Figure]:
    """Copy and convert files of 100 KB in turn; then convert 1,281,167 small ones."""
    with workspace() as root:
        large = _tree(root, 300 if tiny else 30_000, LARGE)
        small = _tree(root, 1000 if tiny else IMAGENET, SMALL)
        return [*_against_copying(root, large, 1 if tiny else 3), *_of_imagenets_number(root, small)]


def _tree(root: Path, count: int, size: int) -> Path:
    """``count`` files of ``size`` bytes that do not compress, in class folders; written unless they are there."""
    folder = root / f"tree-{size}x{count}"
    if folder.exists():
        return folder
    print(f"writing {count:,} files of {size:,} bytes", file=sys.stderr)
    rng = np.random.default_rng(0)
    data = rng.bytes(size + 4096)
    with staged(folder) as new:
        for number in range(count):
            if number < CLASSES:
                (new / f"n{number:08d}").mkdir(parents=True)
            at = int(rng.integers(4096))
            (new / f"n{number % CLASSES:08d}" / f"{number:08d}.jpg").write_bytes(data[at : at + size])
    return folder


def _against_copying(root: Path, tree: Path, rounds: int) -> list[Figure]:
    total = sum(file.stat().st_size for file in tree.rglob("*.jpg"))
    how: dict[str, Callable[[Path], list[str]]] = {
        "cp": lambda out: ["cp", "-r", str(tree), str(out)],
        **{
            f"{format}, {workers} workers": partial(_convert, tree, format, workers)
            for format in ("mds", "wds")
            for workers in ((WORKERS,) if rounds == 1 else (1, WORKERS))
        },
    }
    found = in_turn(
        {name: partial(_rate, tree, total, root, command) for name, command in how.items()},
        rounds,
        warmup=int(rounds > 1),
    )
    figures = [
        Figure(
            target=10,
            what=f"{format.upper()}, files of 100 KB, {WORKERS} workers: bytes per second",
            value=ratio(found[f"{format}, {WORKERS} workers"], found["cp"]),
            unit="x",
            limit="cp -r of the same tree",
            bound=0.8,
            note="Both in new processes, from a cold cache, and until all is written to the disk (sync -f); "
            "the start of Python and the scan of the tree are counted.",
        )
        for format in ("mds", "wds")
    ]
    return figures + [
        Figure(0, f"Files of 100 KB: {name}", Spread.of([rate / 1e6 for rate in rates]), "MB/s", "")
        for name, rates in found.items()
    ]


def _convert(tree: Path, format: str, workers: int, out: Path) -> list[str]:
    command = [sys.executable, "-m", "infobatch_stream.tools", "convert", str(tree), str(out)]
    return [*command, "--format", format, "--workers", str(workers)]


def _rate(tree: Path, total: int, root: Path, command: Callable[[Path], list[str]]) -> float:
    """Bytes per second of a command that writes what is in ``tree`` to a new folder, all of it to the disk."""
    drop_cache(tree)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        out = Path(folder, "out")
        start = time.perf_counter()
        subprocess.run(command(out), check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["sync", "-f", str(folder)], check=True)
        return total / (time.perf_counter() - start)


def _of_imagenets_number(root: Path, tree: Path) -> list[Figure]:
    count = int(tree.name.rpartition("x")[2])
    figures = []
    for format in ("mds", "wds"):
        with tempfile.TemporaryDirectory(dir=root) as folder:
            command = _convert(tree, format, WORKERS, Path(folder, "out"))
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, used = os.wait4(process.pid, 0)  # with what it waited for itself
            process.returncode = os.waitstatus_to_exitcode(status)
            took = time.perf_counter() - start
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command)
        name = f"{format.upper()}, {count:,} files of {SMALL} bytes, {WORKERS} workers"
        figures += [
            Figure(10, f"{name}: minutes", Spread.of([took / 60]), "min", "minutes", bound=10, at="most"),
            Figure(0, f"{name}: files per second", Spread.of([count / took]), "", ""),
            Figure(
                0,
                f"{name}: memory of the main process",
                Spread.of([used.ru_maxrss / 1024]),
                "MiB",
                "",
                note="Most of it are imported libraries.",
            ),
        ]
    return figures
