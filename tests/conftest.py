"""What several test files share."""

import os
import subprocess
import sys
from pathlib import Path

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
