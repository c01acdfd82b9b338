"""What several test files share."""

import gc
import os
import shutil
import subprocess
import sys
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


@pytest.fixture
def few_open_files(monkeypatch):
    """End shared memory with its test: streaming does so at exit, and each dataset opens that of all before it."""
    ends = []
    monkeypatch.setattr("streaming.base.shared.memory.atexit", SimpleNamespace(register=ends.append))
    yield
    gc.collect()
    for end in ends:
        with suppress(BufferError):
            end()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of 4 MDS shards of 12 samples; not to be changed."""
    from ddp_scripts.data import write_mds

    return write_mds(tmp_path_factory.mktemp("mds") / "shards")


@pytest.fixture
def own(shards, tmp_path):
    """A copy of it that may be damaged."""
    return Path(shutil.copytree(shards, tmp_path / "own"))
