"""The labelled moments at which crash.py kills a process: functions of the library, replaced in the process that dies.

A point's ``install(strike)`` makes the library call ``strike()`` whenever it is at that moment.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infobatch_stream import _files, run
from infobatch_stream.store import bootstrap, layout, mapped_array, replicated
from infobatch_stream.store import score_store as store
from infobatch_stream.store.bootstrap import Bootstrap
from infobatch_stream.store.header import read_header
from infobatch_stream.store.history import History
from infobatch_stream.store.replicated import ReplicatedStore
from infobatch_stream.store.run_lock import RunLock
from infobatch_stream.store.score_store import ScoreStore
from infobatch_stream.store.staging import StagedStore


def small_blocks():
    """So that 44 samples are many blocks."""
    mapped_array._BLOCK, bootstrap.BLOCK, replicated.BLOCK = 5, 7, 7


def before(holder, name, when=lambda *_, **__: True):
    return _around(holder, name, when, first=True)


def after(holder, name, when=lambda *_, **__: True):
    return _around(holder, name, when, first=False)


def _around(holder, name, when, first):
    def install(strike):
        true = getattr(holder, name)

        def wrapped(*args, **kwargs):
            if first and when(*args, **kwargs):
                strike()
            found = true(*args, **kwargs)
            if not first and when(*args, **kwargs):
                strike()
            return found

        setattr(holder, name, wrapped)

    return install


def within(holder, name, inner):
    """The moment ``inner``, of those that come during calls of ``holder.name``; it tells by the arguments when."""

    def install(strike):
        true, calls = getattr(holder, name), []

        def wrapped(*args, **kwargs):
            calls.append(args)
            try:
                return true(*args, **kwargs)
            finally:
                calls.pop()

        setattr(holder, name, wrapped)
        inner(calls)(strike)

    return install


def header_points(state):
    """While the header that says ``state`` is written."""

    def renaming(calls):
        return before(Path, "replace", lambda *_: bool(calls) and calls[-1][1].state == state)

    def renamed(calls):
        return before(_files, "sync", lambda path: path.is_dir() and bool(calls) and calls[-1][1].state == state)

    return {
        f"{state}: temporary file written": Point(within(store, "write_header", renaming)),
        f"{state}: renamed": Point(within(store, "write_header", renamed)),
        f"{state}: on the disk": Point(after(store, "write_header", lambda _, new: new.state == state)),
    }


def blocks(state):
    """Between two blocks of the copy of the scores (``apply``) or of the clearing of pending."""

    def install(strike):
        true = mapped_array.MappedArray._blocks

        def wrapped(self):
            for block in true(self):
                if read_header(self._path).state == state:
                    strike()
                yield block

        mapped_array.MappedArray._blocks = wrapped

    return install


def _scores_flushed(strike):
    true = store.np.memmap.flush

    def flush(self):
        true(self)
        if "/scores/" in str(self.filename) and read_header(Path(self.filename).parents[2]).state == "apply":
            strike()

    store.np.memmap.flush = flush


def _one_node_ahead(strike):
    """The second node is about to commit; the first one has."""
    true = ScoreStore.commit

    def commit(self, *args, **options):
        other = self.path.with_name("scores-0.zarr")
        end = time.monotonic() + 5
        while True:
            found = read_header(other)
            if (found.state, found.epoch) == ("ready", self.epoch + 1):
                break
            assert time.monotonic() < end
            time.sleep(0.001)
        strike()
        true(self, *args, **options)

    ScoreStore.commit = commit


def _old_half_removed(strike):
    true = shutil.rmtree

    def rmtree(path, *args, **kwargs):
        if ".old-" in str(path) and Path(path).exists():
            Path(path, "scores", "c", "0").unlink()
            strike()
        true(path, *args, **kwargs)

    shutil.rmtree = rmtree


def _token(strike):
    plain = ScoreStore.token

    def put(self, bits):
        plain.fset(self, bits)
        strike()

    ScoreStore.token = plain.setter(put)


@dataclass(frozen=True)
class Point:
    """One labelled moment.

    who: "leader" of a node, "any" rank, or "second", the leader of the second node. opens: how the run has to begin to
    come there: "continue", "checkpoint", or None for either. lost: the second node has lost its store. aside: only
    where a store is replaced or copied. most: how often an epoch, or an opening, comes there at least.
    """

    install: Any
    who: str = "leader"
    opens: str | None = None
    lost: bool = False
    aside: bool = False
    most: int = 1


COMMIT = {
    "before the merge": Point(before(ReplicatedStore, "merge"), who="any"),
    "between chunks of the merge": Point(after(ScoreStore, "put_pending"), who="two nodes", most=12),
    "before the commit": Point(before(ScoreStore, "commit")),
    "in the history before the commit": Point(before(History, "_record")),
    "history before the commit written": Point(after(History, "before")),
    "before the flush of the losses": Point(before(ScoreStore, "flush")),
    **header_points("apply"),
    "in the copy of the scores": Point(blocks("apply"), most=9),
    "scores flushed": Point(_scores_flushed),
    **header_points("reset"),
    "in the clearing of the losses": Point(blocks("reset"), most=9),
    **header_points("ready"),
    "committed, the history not": Point(before(History, "after")),
    "one node committed, one not": Point(_one_node_ahead, who="second"),
    "committed, not all ranks know": Point(before(ScoreStore, "refresh"), who="any"),
}
OPENING = {
    "marker file shown": Point(after(bootstrap, "make_held"), who="several ranks"),
    "stores looked at": Point(after(Bootstrap, "_look")),
    "in the staged store": Point(after(layout, "_write_shard"), opens="checkpoint", most=2),
    "staged store whole": Point(before(StagedStore, "place"), opens="checkpoint"),
    "between the renames": Point(
        after(Path, "rename", lambda _, to: ".old-" in str(to)), opens="checkpoint", aside=True
    ),
    "staged store renamed": Point(after(Path, "rename", lambda here, _: ".new-" in str(here)), opens="checkpoint"),
    "old store half removed": Point(_old_half_removed, opens="checkpoint", aside=True),
    "copy to a new node": Point(
        after(StagedStore, "fill"), who="second", opens="continue", lost=True, aside=True, most=7
    ),
    "copy of a checkpoint to a node": Point(
        after(StagedStore, "fill"), who="second", opens="checkpoint", aside=True, most=14
    ),
    "run lock taken": Point(after(RunLock, "acquire")),
    "token written": Point(_token, most=2),
}
STATE = {
    "losses merged for a state": Point(before(run, "pack"), who="any", most=2),
    "checkpoint written, not renamed": Point(before(Path, "rename", lambda _, to: to.suffix == ".pt"), who="saver"),
}
POINTS = {**COMMIT, **OPENING, **STATE}
