"""Tries the README's commands on fresh environments of several Pythons, and prints a table. Not part of the suite.

    python tests/install_matrix.py python3.11 python3.12 /opt/python3.13/bin/python --installers bundled uv > table.md

Each row is one command in an environment of its own, by the pip that the Python brings, by the newest pip, or by uv.
An environment takes 7 GB, one at a time; downloads are kept in a cache that is empty at the start, so the first row of
each Python shows what they take. "Looked at" are files that pip fetched and did not install.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("demo", "tests")
_FETCHED = re.compile(r"^\s+(?:Downloading|Using cached) ([^\s/]+?)(?:\.metadata)? \(", re.M)
_QUICK = "tests/policies tests/store/test_score_store.py tests/sources/test_mds.py tests/sources/test_webdataset.py"
"""What is run of the tests, if not all: it takes the store, MDS and tars."""


@dataclass(frozen=True)
class Row:
    """One command in one environment. looked_at: files that were fetched and not installed, None if nobody counts."""

    python: str
    installer: str
    command: str
    install_seconds: float
    run_seconds: float
    packages: int
    looked_at: int | None
    outcome: str

    def __str__(self) -> str:
        looked_at = "" if self.looked_at is None else str(self.looked_at)
        return (
            f"| {self.python} | {self.installer} | {self.command} | {self.install_seconds:.0f} | {self.packages} | "
            f"{looked_at} | {self.run_seconds:.0f} | {self.outcome} |"
        )


def readme_command(name: str) -> str:
    """The line that follows the marker of ``name`` in the README."""
    match = re.search(rf"<!-- ci: {name} -->\n```sh\n(.*)\n", (ROOT / "README.md").read_text())
    assert match, name
    return match[1]


def shell(command: str, environment: dict[str, str], folder: Path) -> tuple[float, str, int]:
    """Seconds, output and exit code of ``command``."""
    started = time.monotonic()
    done = subprocess.run(
        ["bash", "-euc", command],
        env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        print("\n".join(done.stdout.splitlines()[-30:]), file=sys.stderr)
    return time.monotonic() - started, done.stdout, done.returncode


def try_pip(python: str, name: str, newest: bool, scratch: Path, all_tests: bool) -> Row:
    """The README's command ``name`` by pip."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        source = clone(Path(folder))
        subprocess.run([python, "-m", "venv", f"{folder}/env"], check=True)
        environment = {
            **os.environ,
            "PATH": f"{folder}/env/bin:{os.environ['PATH']}",
            "PIP_CACHE_DIR": f"{scratch}/pip",
        }
        if newest:
            shell("pip install --upgrade pip", environment, source)
        installer = shell("pip --version", environment, source)[1].split(" from ")[0]
        install, run = readme_command(name).split(" && ")
        install_seconds, said, code = shell(install, environment, source)
        installed = re.findall(r"^Successfully installed (.*)", said, re.M)
        packages = len(installed[-1].split()) if installed else 0
        fetched = len(set(_FETCHED.findall(said)))
        seconds = 0.0
        if code == 0:
            seconds, _, code = shell(shortened(run, all_tests), environment, source)
        looked_at = max(0, fetched - packages + 1)  # the project itself is installed, not fetched
        return Row(version(python), installer, name, install_seconds, seconds, packages, looked_at, outcome(code))


def try_uv(python: str, name: str, scratch: Path, all_tests: bool) -> Row:
    """The README's command ``name`` by uv."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        source = clone(Path(folder))
        environment = {**os.environ, "UV_PYTHON": python, "UV_CACHE_DIR": f"{scratch}/uv"}
        installer = shell("uv --version", environment, source)[1].split(" (")[0]
        options, run = re.fullmatch(r"uv run (--all-extras|--extra all) (.*)", readme_command(f"uv-{name}")).groups()
        install_seconds, said, code = shell(f"uv sync {options}", environment, source)
        packages = len(re.findall(r"^ \+ ", said, re.M))
        seconds = 0.0
        if code == 0:
            seconds, _, code = shell(f"uv run {options} {shortened(run, all_tests)}", environment, source)
        return Row(version(python), installer, name, install_seconds, seconds, packages, None, outcome(code))


def shortened(run: str, all_tests: bool) -> str:
    """``run``, but of the tests only some unless ``all_tests``."""
    return f"{run} -q {_QUICK}" if run == "pytest" and not all_tests else run


def clone(folder: Path) -> Path:
    """What is committed, in a folder of its own: where a reader of the README stands."""
    subprocess.run(["git", "clone", "--quiet", ROOT, folder / "clone"], check=True)
    return folder / "clone"


def version(python: str) -> str:
    return subprocess.run([python, "-V"], capture_output=True, text=True, check=True).stdout.split()[1]


def outcome(code: int) -> str:
    return "passed" if code == 0 else f"exit code {code}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="+", help="interpreters to try")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument(
        "--installers", nargs="+", choices=["bundled", "newest", "uv"], default=["bundled", "newest", "uv"]
    )
    parser.add_argument("--all-tests", action="store_true", help="the whole of `pytest`, not some files")
    options = parser.parse_args()
    if "uv" in options.installers and not shutil.which("uv"):
        parser.error("there is no uv on the PATH: pip install uv, or name other --installers")
    print("| Python | by | command | seconds to install | packages | looked at | seconds to run | |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="install-") as folder:
        for python in options.pythons:
            for installer in options.installers:
                for name in options.commands:
                    if installer == "uv":
                        row = try_uv(python, name, Path(folder), options.all_tests)
                    else:
                        row = try_pip(python, name, installer == "newest", Path(folder), options.all_tests)
                    print(row, flush=True)


if __name__ == "__main__":
    main()
