"""Ranks that are forks of one process which has imported everything, so that a launch takes tenths of a second.

The process that launches must have one thread: it makes no process group, opens no store and no DataLoader. What needs
one of these is asked of a child (`asked`).
"""

import ctypes
import faulthandler
import multiprocessing
import os
import select
import signal
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = 20  # seconds for which a rank waits for the others
DEADLINE = 60  # after which ranks are taken to hang
_FORK = multiprocessing.get_context("fork")
_DIES_WITH_PARENT, _ADOPTS = 1, 36  # of prctl(2)


def prctl(option, value):
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class Launch:
    """``action(rank, *args)``, begun on ``world`` ranks, of which ``local`` are on a node.

    The ranks and their workers are a process group of the system. What a rank writes to stderr is in
    ``folder/<name>-<rank>.err``. Attributes: group: its number. ranks: the processes.
    """

    def __init__(self, folder, name, world, action, *args, local=None):
        self._folder, self._name, self._world = Path(folder), name, world
        self.group, self.ranks = 0, []
        self._ready, writing = os.pipe()
        prctl(_ADOPTS, 1)  # workers of a killed rank become children of this process, which sees them end
        try:
            for rank in range(world):
                place = (self._folder, name, rank, world, local or world, self.group, writing)
                process = _FORK.Process(target=_rank, args=(place, action, args))
                process.start()
                self.ranks.append(process)
                self.group = self.group or process.pid
                with suppress(OSError):  # it does so itself too; neither knows who is first
                    os.setpgid(process.pid, self.group)
        finally:
            os.close(writing)

    def wait_until_begun(self):
        """Until every rank has met the others, or one is gone."""
        end, seen = time.monotonic() + DEADLINE, 0
        while seen < self._world and (left := end - time.monotonic()) > 0:
            if select.select([self._ready], [], [], left)[0]:
                found = os.read(self._ready, self._world)
                if not found:
                    return
                seen += len(found)

    def wait_until_ended(self, seconds=DEADLINE):
        """Or are taken to hang. (Not by Process.join, which waits for the workers of a killed rank too.)"""
        end = time.monotonic() + seconds
        while any(process.is_alive() for process in self.ranks) and time.monotonic() < end:
            time.sleep(0.002)

    def wait(self, seconds=DEADLINE):
        """The exit codes of the ranks, negative for signals. Raises TimeoutError when they hang, and ends them."""
        self.wait_until_ended(seconds)
        os.close(self._ready)
        if any(process.is_alive() for process in self.ranks):
            for process in self.ranks:
                with suppress(OSError):
                    os.kill(process.pid, signal.SIGUSR1)  # they write where they are
            time.sleep(1)
            self.kill_all()
            raise TimeoutError(f"ranks hang in {self._name}:\n{self.said()}")
        return [process.exitcode for process in self.ranks]

    def kill_all(self):
        with suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)

    def workers(self, rank):
        """The pids of the DataLoader workers of ``rank`` that live now."""
        pid = self.ranks[rank].pid
        with suppress(OSError):
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return []

    def left(self):
        """The processes of it that are still there; those that ended are reaped."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with suppress(OSError, IndexError):
                state, parent, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(group) != self.group:
                    continue
                if state == "Z" and int(parent) == os.getpid():
                    with suppress(ChildProcessError):
                        os.waitpid(int(entry.name), 0)
                elif state != "Z":
                    found.append(int(entry.name))
        return found

    def said(self):
        """What the ranks wrote to stderr."""
        files = sorted(self._folder.glob(f"{self._name}-*.err"))
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in files)


def _rank(place, action, args):
    folder, name, rank, world, local, group, ready = place
    prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    with suppress(OSError):
        os.setpgid(0, group)
    stderr = os.open(folder / f"{name}-{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stderr, 2)
    faulthandler.register(signal.SIGUSR1)
    os.environ.update(LOCAL_WORLD_SIZE=str(local), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    if world > 1:
        rendezvous = f"file://{folder}/{name}.rendezvous"
        dist.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
        )
    os.write(ready, b".")
    os.close(ready)
    action(rank, *args)
    if world > 1:
        dist.barrier()  # whoever is first would take the others' connections away
        dist.destroy_process_group()


def asked(question, *args):
    """What ``question(*args)`` gives in a child: threads that it starts are none of this process's."""
    ours, theirs = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_answer, args=(theirs, question, args))
    process.start()
    theirs.close()
    try:
        if not ours.poll(DEADLINE):
            raise TimeoutError(f"no answer to {question.__name__}{args}")
        good, found = ours.recv()
    finally:
        process.kill()
        process.join()
        ours.close()
    if not good:
        raise found
    return found


def _answer(pipe, question, args):
    try:
        pipe.send((True, question(*args)))
    except Exception as error:
        pipe.send((False, AssertionError(f"{type(error).__name__}: {error}")))
    time.sleep(DEADLINE)  # killed when the answer is there
