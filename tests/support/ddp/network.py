"""Two machines on one: each with a network, a host name and mounts of its own, joined by a cable (a veth pair).

Nothing has a name outside: the namespaces live as long as the process that keeps each, and that one ends when its
standard input does, so nothing stays behind even when the test is killed.
"""

import os
import subprocess
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Self

import pytest

from support.ddp.launch import Nodes

_CABLE = "cable"
_NOWHERE = "02:00:00:00:00:01"  # nobody has this address
_SECONDS = 20


class NoNetworkError(Exception):
    """Namespaces cannot be made on this machine."""


class Network:
    """Two nodes, 0 and 1. On each, ``here`` is a folder of its own, which other processes see as ``folders[node]``."""

    interface = _CABLE

    def __init__(self, place: Path) -> None:
        self.here = place / "here"
        self.folders = [place / f"node{node}" for node in (0, 1)]
        self.addresses = ["10.203.0.1", "10.203.0.2"]
        self._keepers: list[subprocess.Popen[bytes]] = []
        for folder in (self.here, *self.folders):
            folder.mkdir(parents=True)
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        spaces = ["unshare", "--net", "--mount", "--uts"]
        self._user: list[str] = []
        if os.geteuid() != 0:
            outer = self._keep(["unshare", "--user", "--map-root-user"], "true")
            self._user = ["--user", "--preserve-credentials"]
            spaces = ["nsenter", "--target", str(outer), *self._user, *spaces]
        for node, folder in enumerate(self.folders):
            self._keep(
                spaces,
                f'hostname machine{node}; ip link set lo up && mount --bind "$1" "$2"',
                str(folder),
                str(self.here),
            )
        self._nodes = [keeper.pid for keeper in self._keepers[-2:]]
        self.run(0, *f"ip link add {_CABLE} type veth peer name {_CABLE} netns {self._nodes[1]}".split())
        for node, address in enumerate(self.addresses):
            self.run(node, *f"ip address add {address}/24 dev {_CABLE}".split())
            self.run(node, *f"ip link set {_CABLE} up".split())

    def _keep(self, spaces: list[str], prepare: str, *arguments: str) -> int:
        script = f"{prepare} && echo ready && exec cat"
        keeper = subprocess.Popen(
            [*spaces, "sh", "-c", script, "sh", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._keepers.append(keeper)
        if keeper.stdout.readline() != b"ready\n":
            raise NoNetworkError(keeper.communicate(timeout=_SECONDS)[1].decode().strip())
        return keeper.pid

    def enter(self, node: int) -> list[str]:
        """What to put before a command that is to run on ``node``."""
        return ["nsenter", "--target", str(self._nodes[node]), *self._user, "--net", "--mount", "--uts"]

    def run(self, node: int, *command: str) -> None:
        """A command without output; NoNetworkError when it fails."""
        done = subprocess.run(
            [*self.enter(node), *command], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        if done.returncode:
            raise NoNetworkError(f"{' '.join(command)}: {done.stderr.strip()}")

    def cut(self, how: str) -> None:
        """Down: both ends see that there is no link. Silent: what is sent is lost, and nobody is told."""
        if how == "down":
            self.run(1, *f"ip link set {_CABLE} down".split())
        else:
            for node, other in ((0, 1), (1, 0)):
                far = self.addresses[other]
                self.run(node, *f"ip neighbour replace {far} lladdr {_NOWHERE} dev {_CABLE} nud permanent".split())

    def restore(self) -> None:
        """Undo `cut`."""
        self.run(1, *f"ip link set {_CABLE} up".split())
        for node, other in ((0, 1), (1, 0)):
            self.run(node, *f"ip neighbour flush to {self.addresses[other]} nud all".split())

    def close(self) -> None:
        """End the namespaces. Processes that still run there keep theirs."""
        for keeper in reversed(self._keepers):
            keeper.communicate(timeout=_SECONDS)
        self._keepers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@cache
def network_is_possible():
    """Whether this machine lets us make namespaces."""
    try:
        with tempfile.TemporaryDirectory() as folder, Network(Path(folder, "tried")):
            return True
    except (NoNetworkError, OSError):
        return False


@contextmanager
def nodes_of(kind, folder):
    """(Nodes, Network or None), of two networks or of this machine's own; skips where namespaces cannot be made."""
    if kind == "loopback":
        with Nodes.on_loopback(folder) as nodes:
            yield nodes, None
        return
    try:
        network = Network(folder / "network")
    except (NoNetworkError, OSError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    with network, Nodes.on_network(network) as nodes:
        yield nodes, network
