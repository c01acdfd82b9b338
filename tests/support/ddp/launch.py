"""Starting processes from a test, and what each of them runs."""

import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Self

import torch

from support.paths import TESTS

HERE = Path(__file__).parent
SECONDS = 180  # after which a run is taken to hang
_PR_SET_PDEATHSIG = 1


def environment():
    """This process's, with the tests importable and all warnings but those of other libraries shown."""
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def start(script, *args, seconds=SECONDS):
    """Run one process of ``script``."""
    _run([sys.executable, HERE / script, *map(str, args)], seconds)


def torchrun(script, *args, processes=2, seconds=SECONDS):
    """Run ``script`` in several processes."""
    run = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "0", "--nproc-per-node"]
    _run([sys.executable, *run, str(processes), HERE / script, *map(str, args)], seconds)


def _run(command, seconds):
    with _started(command, environment()) as process:
        code, output = _ended(process, time.monotonic() + seconds)
    assert code is not None, f"hung for {seconds} s:\n{output}"
    assert code == 0, output


def _started(command, env):
    # In a session of their own, so that all are gone when one of them hangs.
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True
    )


def _ended(process, deadline):
    """(exit code, output); None when it had to be killed."""
    try:
        output, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    return process.returncode, output


@contextmanager
def process_group(seconds=30):
    """In a process that torchrun started: (rank, world size). Waiting for others ends with an error in time."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    yield torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.distributed.barrier()  # whoever is first would take the others' connections away
    torch.distributed.destroy_process_group()  # without it, gloo's threads may abort the process at its end


def end_with_parent():
    """Have the kernel kill this process when its parent ends: torchrun's ranks are in sessions of their own."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def wait_for(files, seconds=SECONDS):
    """Return when all the files are there."""
    deadline = time.monotonic() + seconds
    while missing := [file for file in files if not file.exists()]:
        assert time.monotonic() < deadline, f"{missing} did not come in {seconds} s"
        time.sleep(0.01)


# ---- several nodes


@dataclass(frozen=True)
class Node:
    """Where ranks run. enter: goes before a command; interface: of its network; here: folder that is local to it."""

    enter: list[str]
    interface: str
    here: str


def note_error(out, rank, error):
    """Have the test know of it, and when it was."""
    (out / f"error-{rank}.json").write_text(json.dumps([type(error).__name__, str(error), time.monotonic()]))


def error_of_rank(out, rank):
    """[type, text, time], or None."""
    file = out / f"error-{rank}.json"
    return json.loads(file.read_text()) if file.exists() else None


@dataclass
class Run:
    """One run of a `Crew`: ``out`` is where its ranks leave what they found."""

    out: Path
    ranks: int
    seconds: float

    def pid(self, rank):
        wait_for([self.out / f"pid-{rank}"])
        return int((self.out / f"pid-{rank}").read_text())

    def wait(self):
        """How each rank ended: {"code", "time" (monotonic), "error": [type, text, time] or None}."""
        files = [self.out / f"end-{rank}.json" for rank in range(self.ranks)]
        wait_for(files, self.seconds + 10)  # the crew kills what takes longer than ``seconds``
        return [
            {"error": error_of_rank(self.out, rank), **json.loads(file.read_text())} for rank, file in enumerate(files)
        ]

    def found(self):
        """What each rank found, all of which have ended well."""
        ends = self.wait()
        logs = "\n".join(f"rank {rank}:\n{(self.out / f'log-{rank}').read_text()}" for rank in range(self.ranks))
        assert [end["code"] for end in ends] == [0] * self.ranks, logs
        return [torch.load(self.out / f"{rank}.pt", weights_only=False) for rank in range(self.ranks)]


class Torchrun:
    """One run of ``script OUT HERE ARGS`` by torchrun, with two ranks on each node."""

    def __init__(self, nodes, script, out, *args):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self._nodes = out, len(nodes.nodes)
        options = f"--nnodes {self._nodes} --nproc-per-node 2 --max-restarts 0"
        master = f"--master-addr {nodes.address} --master-port {nodes.port()}"
        run = [sys.executable, "-m", "torch.distributed.run", *options.split(), *master.split(), "--node-rank"]
        self._agents = [
            _started(
                [*node.enter, *run, str(number), str(HERE / script), str(out), node.here, *map(str, args)],
                nodes.environment(node),
            )
            for number, node in enumerate(nodes.nodes)
        ]
        nodes._agents += self._agents

    def ended(self, seconds=SECONDS):
        """(exit code, output) of the torchrun of each node."""
        deadline = time.monotonic() + seconds
        return [_ended(agent, deadline) for agent in self._agents]

    def wait(self, seconds=SECONDS):
        """As `Run.wait`; the exit codes are those of torchrun, which ends after its ranks."""
        codes = [code for code, _ in self.ended(seconds)]
        return [{"code": codes[rank // 2], "error": error_of_rank(self.out, rank)} for rank in range(2 * self._nodes)]


@dataclass
class Nodes:
    """Two nodes (or what looks like them), on which runs are started."""

    nodes: list[Node]
    address: str  # of node 0
    _crews: list[subprocess.Popen] = field(default_factory=list)
    _agents: list[subprocess.Popen] = field(default_factory=list)

    @classmethod
    def on_loopback(cls, folder):
        """All on this machine; only the folders are the nodes' own."""
        return cls([Node([], "lo", str(folder / "node{node}")) for _ in (0, 1)], "127.0.0.1")

    @classmethod
    def on_network(cls, network):
        nodes = [Node(network.enter(number), network.interface, str(network.here)) for number in (0, 1)]
        return cls(nodes, network.addresses[0])

    def begin(self, case, out, ranks=(2, 2), seconds=SECONDS, **options):
        """Start ``case`` with ``ranks[j]`` ranks on node j; more nodes than there are share this machine."""
        out.mkdir(parents=True, exist_ok=True)
        port, first, world = self.port(), 0, sum(ranks)
        for crew in self.make_ready():
            # On loopback one crew does the work of all nodes.
            mine = range(len(ranks)) if len(self._crews) == 1 else [self._crews.index(crew)]
            members = [
                {
                    "RANK": first + sum(ranks[:node]) + local,
                    "WORLD_SIZE": world,
                    "LOCAL_RANK": local,
                    "LOCAL_WORLD_SIZE": ranks[node],
                    "GROUP_RANK": node,
                    "GROUP_WORLD_SIZE": len(ranks),
                    "MASTER_ADDR": self.address,
                    "MASTER_PORT": port,
                }
                for node in mine
                for local in range(ranks[node])
            ]
            here = self.nodes[mine[0] if len(self._crews) > 1 else 0].here
            request = {
                "case": case,
                "out": str(out),
                "here": here,
                "ranks": members,
                "options": options,
                "seconds": seconds,
            }
            crew.stdin.write(json.dumps(request) + "\n")
            crew.stdin.flush()
        return Run(out, world, seconds)

    def run(self, case, out, **options):
        """What each rank found."""
        return self.begin(case, out, **options).found()

    def make_ready(self):
        """Have the processes that `begin` needs, so that they start while others work."""
        if not self._crews:
            nodes = self.nodes if self.nodes[0].enter else self.nodes[:1]
            self._crews = [
                subprocess.Popen(
                    [*node.enter, sys.executable, str(HERE / "crew.py")],
                    stdin=subprocess.PIPE,
                    text=True,
                    env={**self.environment(node), "OPENBLAS_NUM_THREADS": "1"},  # it forks
                    start_new_session=True,
                )
                for node in nodes
            ]
        return self._crews

    def environment(self, node):
        return {**environment(), "GLOO_SOCKET_IFNAME": node.interface}

    def port(self):
        """A free one, of those that the kernel gives to nobody by itself (see ip_local_port_range)."""
        while True:
            with socket.socket() as probe, suppress(OSError):
                probe.bind(("", port := 10000 + secrets.randbelow(20000)))
                return port

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_):
        for agent in self._agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)  # their ranks end with them
                agent.communicate()
        for crew in self._crews:
            crew.stdin.close()
        for crew in self._crews:
            try:
                crew.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(crew.pid, signal.SIGKILL)
                crew.wait()
