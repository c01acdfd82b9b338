"""Ranks without the seconds that Python needs to import torch: a process that has done so forks them.

It reads requests from its standard input, one JSON line each (see launch.Nodes.begin), and ends with it.
"""

import faulthandler
import gc
import json
import os
import select
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from infobatch_stream.store import bootstrap
from support.ddp.faults import CASES
from support.ddp.launch import end_with_parent, note_error, process_group


def be_rank(request, environ):
    """In the process that was forked: run the case, and leave; as any script would, with to_the_end=True."""
    end_with_parent()
    os.environ.update({name: str(value) for name, value in environ.items()})
    out, rank = Path(request["out"]), environ["RANK"]
    log = os.open(out / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((nowhere, log, log)):
        os.dup2(file, number)
    faulthandler.register(signal.SIGUSR1)
    bootstrap._RUN = os.urandom(8).hex()  # as in a process that was started
    options = dict(request["options"])
    leave = sys.exit if options.pop("to_the_end", False) else os._exit  # it takes half a second
    try:
        with process_group(options.pop("timeout", 30)):
            found = CASES[request["case"]](out, Path(request["here"]), rank, **options)
            torch.save(found, out / f"{rank}.pt")
    except BaseException as error:
        note_error(out, rank, error)
        traceback.print_exc()
        sys.stderr.flush()
        leave(1)
    leave(0)


def fork(request, children):
    for environ in request["ranks"]:
        pid = os.fork()
        if not pid:
            be_rank(request, environ)
        place = Path(request["out"], f"pid-{environ['RANK']}")
        place.with_suffix(".new").write_text(str(pid))
        place.with_suffix(".new").rename(place)
        children[pid] = (request, environ["RANK"], time.monotonic() + request["seconds"])


def note_end(request, rank, status):
    place = Path(request["out"], f"end-{rank}.json")
    facts = {"code": os.waitstatus_to_exitcode(status), "time": time.monotonic()}
    place.with_suffix(".new").write_text(json.dumps(facts))
    place.with_suffix(".new").rename(place)


def main():
    end_with_parent()
    gc.freeze()  # else each rank copies all pages when it collects
    children = {}
    requests = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115 - for select
    while True:
        if select.select([requests], [], [], 0.01)[0]:
            line = requests.readline()
            if not line:
                break
            fork(json.loads(line), children)
        for pid, (request, rank, deadline) in list(children.items()):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                note_end(request, rank, status)
                del children[pid]
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
