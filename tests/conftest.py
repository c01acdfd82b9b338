"""What several test files share."""

import ctypes
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

import infobatch_stream

# Makes the package importable without running its __init__, which imports torch.
_BARE = """
import sys, types
package = types.ModuleType("infobatch_stream")
package.__path__ = [sys.argv.pop(1)]
sys.modules["infobatch_stream"] = package
"""

_NEW_MOUNTS = 0x20000  # CLONE_NEWNS of Linux's sched.h
_PRIVATE = 0x4000 | 0x40000  # MS_REC | MS_PRIVATE of its mount.h
_BIND = 0x1000  # MS_BIND

LONG = {
    "accelerate", "benchmarks", "cifar", "composer", "contrastive", "conversion_runs", "crash", "ddp", "demo",
    "destinations", "download", "elastic", "faults", "foreign_files", "fsdp", "imagenet", "index_command", "leaks",
    "lightning", "lossless", "lost_nodes", "lost_processes", "manual", "mds", "node_rules", "nodes", "notebook",
    "other_losses", "packaging", "pages", "pool", "prefetch", "ray_train", "readers", "readers_real", "remote_mds",
    "remote_report", "remote_webdataset", "report_browser", "resume", "resumed", "roundtrip_tables", "run_lock",
    "scores_commands", "seeing", "signals", "store_machine", "timm", "transformers", "trl", "unlock", "verify",
}  # fmt: skip
"""What is tested in the files that take longest; `long`, so that what a change broke is soon known."""

LONGEST = [
    "manual", "lightning", "conversion_runs", "cifar", "ddp", "accelerate", "fsdp", "lossless", "trl",
    "elastic", "imagenet", "transformers",
]  # fmt: skip
"""Files that take minutes each, the longest first: begun last, one of them would keep one process busy at the end.

Not so Ray's: beside others it takes ten minutes or more, and alone half of one. So it comes last.
"""


def pytest_configure(config):
    """Let runs be as short as a test needs, although users are warned of those that prune nothing."""
    for warned in ("nothing can be pruned", "a step of this epoch holds"):
        config.addinivalue_line("filterwarnings", f"ignore:InfoBatchLoader. {warned}:RuntimeWarning")


@pytest.hookimpl(tryfirst=True)  # before those that are `long` are left out
def pytest_collection_modifyitems(items):
    """Mark what is `long`, and begin with what takes longest."""
    for item in items:
        if item.path.stem.removeprefix("test_") in LONG:
            item.add_marker(pytest.mark.long)
    places = {name: place for place, name in enumerate(LONGEST)} | {"ray_train": len(LONGEST) + 1}
    items.sort(key=lambda item: places.get(item.path.stem.removeprefix("test_"), len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def alone(request, tmp_path_factory):
    """Give the tests a /dev/shm of their own, and each worker of ``pytest -n 2`` a TMPDIR too.

    Through these all StreamingDatasets of a machine find each other, and tests remove there what others left.
    TMPDIR has a short name, for sockets.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(request.config, "workerinput"):
        if (
            libc.unshare(_NEW_MOUNTS)
            or libc.mount(b"none", b"/", None, _PRIVATE, None)
            or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, None)
        ):
            _exit_beside_others()
        yield
        return
    temporary = os.fsencode(tmp_path_factory.mktemp("t"))
    if (
        libc.unshare(_NEW_MOUNTS)
        or libc.mount(b"none", b"/", None, _PRIVATE, None)
        or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, None)
        or libc.mount(temporary, b"/mnt", None, _BIND, None)
    ):
        pytest.exit(f"pytest -n needs root: /dev/shm of its own: {os.strerror(ctypes.get_errno())}; leave -n out.")
    os.environ["TMPDIR"] = tempfile.tempdir = "/mnt"
    yield


def _exit_beside_others():
    """Without a /dev/shm of our own: do not start where tests would remove what another program has there."""
    shared = Path("/dev/shm")
    if found := [path.name for path in shared.glob("[0-9][0-9][0-9][0-9][0-9][0-9]_*")] if shared.is_dir() else []:
        pytest.exit(
            f"/dev/shm holds {sorted(found)[0]}, of a StreamingDataset that is in use, or was killed. These tests "
            "would remove it: wait for that program, or call streaming.base.util.clean_stale_shared_memory(); or run "
            "as root."
        )


@pytest.fixture(scope="session")
def bare_python():
    """Run code in a new Python whose ``infobatch_stream`` is the package's folder, without its __init__; -> stdout."""

    def run(code, *arguments):
        done = subprocess.run(
            [sys.executable, "-c", _BARE + code, str(Path(infobatch_stream.__file__).parent), *map(str, arguments)],
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # so that the code may fork
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def no_stale_shared_memory():
    """Of StreamingDatasets, neither before a module's tests nor after them."""
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    yield
    clean_stale_shared_memory()


@pytest.fixture(scope="module")
def no_old_objects():
    """Take all objects there are, those of the libraries, out of collections, which cost a second each with them."""
    import streaming  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture
def few_open_files(no_old_objects, monkeypatch):
    """End shared memory with its test: streaming does so at exit, and each dataset opens that of all before it."""
    ends = []
    monkeypatch.setattr("streaming.base.shared.memory.atexit", SimpleNamespace(register=ends.append))
    yield
    if ends:
        gc.collect()
    for end in ends:
        with suppress(BufferError):
            end()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of 4 MDS shards of 12 samples; not to be changed."""
    from support.ddp.data import write_mds

    return write_mds(tmp_path_factory.mktemp("mds") / "shards")


@pytest.fixture
def own(shards, tmp_path):
    """A copy of it that may be damaged."""
    return Path(shutil.copytree(shards, tmp_path / "own"))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder of 10 MDS shards of 12 samples; not to be changed."""
    from support.ddp.data import write_mds

    return Path(write_mds(tmp_path_factory.mktemp("mds") / "many", first=1000, samples=120))
