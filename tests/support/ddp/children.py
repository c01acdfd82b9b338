"""Real processes that begin at once: forked from a server that has imported torch and the package already."""

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

from support.paths import TESTS

SECONDS = 60  # after which a process is taken to hang
_FORKS = multiprocessing.get_context("forkserver")


class Child:
    """A process that runs ``act(link, *arguments)`` in a session of its own; what that returns or raises is `result`.

    link: a multiprocessing Connection, on which it may tell something, and be told.
    """

    def __init__(self, act, *arguments):
        # With paths of the server's own, since Python 3.11 does not hand sys.path on to what it preloads.
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), before]))
        _FORKS.set_forkserver_preload(["support.ddp.victims"])
        self._scratch = tempfile.mkdtemp()  # for what a killed process leaves of multiprocessing's
        self._link, theirs = _FORKS.Pipe()
        try:
            self._process = _FORKS.Process(target=_main, args=(theirs, self._scratch, act, arguments))
            self._process.start()
        finally:
            theirs.close()
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before
        self.pid = self._process.pid

    def hears(self, seconds=SECONDS):
        """The next word of the process; AssertionError when it ends, or takes too long."""
        wait([self._link, self._process.sentinel], seconds)
        if not self._link.poll(0):
            raise AssertionError(f"no word; exit code {self._process.exitcode}")
        return self._link.recv()

    def heard(self):
        """All words until the process's end."""
        words = []
        with suppress(AssertionError, EOFError, ConnectionResetError):
            while True:
                words.append(self.hears())
        return words

    def tell(self, word=None):
        self._link.send(word)

    def result(self, seconds=SECONDS):
        """What ``act`` returned, once it has: its last word."""
        kind, value = self.hears(seconds)
        assert kind == "returned", value
        self.ends()
        return value

    def signal(self, number, *, group=False):
        (os.killpg if group else os.kill)(self.pid, number)

    def ends(self, seconds=SECONDS):
        """The exit code, once there is one: negative, the signal that ended it."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, "hung"
        return self._process.exitcode

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # and its workers
        self._process.join(SECONDS)
        self._process.close()
        self._link.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


def _main(link, scratch, act, arguments):
    os.setsid()
    # Whoever started the tests may have ignored it, and whoever started the server, as convert does, have it blocked.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    tempfile.tempdir = multiprocessing.current_process()._config["tempdir"] = scratch
    try:
        value = act(link, *arguments)
    except Exception as error:
        link.send(("raised", (type(error).__name__, str(error), getattr(error, "__notes__", []))))
        raise SystemExit(1) from None
    link.send(("returned", value))


def until(holds, seconds=SECONDS):
    """Wait until ``holds()``."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def members(session):
    """The processes, but for those that are dead, of a session: a process and its workers."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            # pid (name) state parent group session ...
            state, _, _, its = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its) == session and state not in "ZX":
                found.append(int(entry.name))
    return found


def shared_memory(pids):
    """What processes ``pids`` have left in /dev/shm: torch names its segments by process."""
    owners = tuple(f"torch_{pid}_" for pid in pids)
    return [file.name for file in Path("/dev/shm").iterdir() if file.name.startswith(owners)]
