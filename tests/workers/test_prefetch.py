"""Which shards are downloaded in advance, in which order, and the threads and locks by which that happens."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.ddp.children import Child
from support.ddp.launch import environment, wait_for

from infobatch_stream import DataError, SoftPruning
from infobatch_stream.planning.epoch_plan import EpochPlan
from infobatch_stream.planning.lookahead import Lookahead, shards_in_window
from infobatch_stream.sources.remote.single_flight import lock_path, single_flight
from infobatch_stream.workers.prefetch import THREADS, Prefetcher

# ---- what is seen


def plan_of(seed, sizes, **options):
    scores = np.random.default_rng(seed).random(int(sizes.sum()), dtype=np.float32)
    return EpochPlan(
        scores, SoftPruning(), seed=seed, epoch=1, shard_sizes=sizes, **{"global_batch": 8, "window": 50, **options}
    )


def shards_of(entries, sizes):
    return set(np.searchsorted(np.cumsum(sizes), entries.index, side="right").tolist())


def fetched(ahead, place, now, later):
    ahead.queue(place, later)
    return ahead.fetch(now)


def flat(groups):
    return [shard for group in groups for shard in group]


@pytest.mark.parametrize("capacity", [None, 9])
@pytest.mark.parametrize("ahead", [0, 1, 3, 64])
@pytest.mark.parametrize("seed", range(3))
def test_steps_are_those_of_the_plan_and_shards_come_in_the_order_of_need(seed, ahead, capacity):
    random = np.random.default_rng(seed)
    sizes = random.integers(0, 30, 25)
    plan = plan_of(seed, sizes, lanes=2)
    first, world = int(random.integers(plan.steps)), 2
    for rank in range(world):
        steps = [plan.step(step, rank, world) for step in range(first, plan.steps)]
        needs = [shards_of(entries, sizes) for entries in steps]
        told = set()
        upcoming = list(Lookahead(sizes, ahead, capacity).steps(plan, first, rank, world))
        assert len(upcoming) == len(steps)
        for place, (one, entries) in enumerate(zip(upcoming, steps, strict=True)):
            for name in ("index", "weight", "record"):
                assert np.array_equal(getattr(one.entries, name), getattr(entries, name))
            assert sorted(flat(one.shards)) == sorted(needs[place])
            view = set().union(*needs[place : place + ahead + 1])
            assert set(one.readahead) <= view - needs[place]
            if capacity is not None:
                assert len(one.readahead) + len(needs[place]) <= max(capacity, len(needs[place]))
            if ahead and capacity is None and place >= 8:  # by then the view is as wide as it gets
                assert view <= told | set(one.readahead) | needs[place]
            told |= set(one.readahead) | needs[place]
            when = {shard: next(n for n, need in enumerate(needs[place:]) if shard in need) for shard in one.readahead}
            assert [when[shard] for shard in one.readahead] == sorted(when.values())


def test_a_step_shares_shards_with_the_one_before_first():
    sizes = np.full(40, 20)
    plan = plan_of(0, sizes, window=400)
    first, second = list(Lookahead(sizes, 8).steps(plan, 0, 0, 1))[:2]
    shared = set(flat(first.shards)) & set(flat(second.shards))
    assert shared
    assert list(map(set, second.shards)) == [shared, set(flat(second.shards)) - shared]


def test_shards_without_a_kept_sample_are_never_seen():
    sizes = np.full(30, 10)
    scores = np.repeat(np.arange(30, dtype=np.float32), 10)
    plan = EpochPlan(scores, SoftPruning(0.99), seed=0, epoch=1, global_batch=8, shard_sizes=sizes, window=50)
    upcoming = list(Lookahead(sizes, 64).steps(plan, 0, 0, 1))
    seen = set().union(*({*flat(one.shards), *one.readahead} for one in upcoming))
    kept = set().union(*(shards_of(plan.step(step), sizes) for step in range(plan.steps)))
    assert seen == kept
    assert len(kept) < 30


def test_a_window_lies_in_so_many_shards():
    sizes = np.full(100, 20)
    scores = np.full(2000, np.nan, np.float32)
    plan = EpochPlan(scores, SoftPruning(), seed=0, epoch=0, global_batch=8, shard_sizes=sizes, window=200)
    assert shards_in_window(sizes, plan, 200, 1) == 11
    assert shards_in_window(sizes, plan, 200, 4) == 44
    assert shards_in_window(sizes, plan, 2**16, 1) == 100


# ---- threads


class Source:
    """Of which shards come when the test lets them: all that were asked for are in ``asked``, in order."""

    capacity = None

    def __init__(self, bad=(), seconds=0.0):
        self.asked, self.bad, self.seconds = [], set(bad), seconds
        self.gate = threading.Semaphore(0)
        self.gated = set()
        self.at_once = self.most = 0
        self.lock = threading.Lock()

    def ensure_local(self, shard):
        with self.lock:
            self.asked.append(shard)
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        if shard in self.gated:
            assert self.gate.acquire(timeout=10)
        time.sleep(self.seconds)
        with self.lock:
            self.at_once -= 1
        if shard in self.bad:
            raise DataError(f"no shard {shard}")

    def __getstate__(self):
        return {}

    def __setstate__(self, state):
        self.__init__()


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "infobatch-prefetch"]


def settle(condition, seconds=5):
    """Return when ``condition()`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    settle(lambda: not threads())


def test_what_a_batch_waits_for_is_here_when_it_goes_on_and_the_rest_comes_by_itself():
    source = Source(seconds=0.002)
    ahead = Prefetcher(source)
    assert fetched(ahead, (0, 0), ((5, 3), (8, 1)), (2, 9, 4)) == {}
    assert {5, 3, 8, 1} <= set(source.asked)
    settle(lambda: {2, 9, 4} <= set(source.asked))
    settle(lambda: not threads())
    before = list(source.asked)
    assert fetched(ahead, (0, 1), ((5, 2, 4),), ()) == {}
    assert source.asked == before  # known to be here
    assert source.most <= THREADS + 1


def test_nothing_is_begun_ahead_while_a_batch_waits():
    source = Source()
    ahead = Prefetcher(source)
    source.gated = {0, 20}
    fetched(ahead, (0, 0), (), (20,))  # under way before
    settle(lambda: source.asked == [20])
    waiting = threading.Thread(target=fetched, args=(ahead, (0, 1), ((0,),), (21, 22)))
    waiting.start()
    settle(lambda: 0 in source.asked)
    source.gate.release()
    source.gate.release()
    waiting.join(5)
    settle(lambda: {21, 22} <= set(source.asked))
    assert source.asked.index(0) < min(source.asked.index(21), source.asked.index(22))


def test_only_what_was_under_way_goes_on_while_a_batch_waits():
    source = Source()
    source.gated = {0}
    ahead = Prefetcher(source)
    waiting = threading.Thread(target=fetched, args=(ahead, (0, 0), ((0,),), tuple(range(20, 30))))
    waiting.start()
    settle(lambda: source.asked == [0])
    time.sleep(0.05)
    assert source.asked == [0]
    source.gate.release()
    waiting.join(5)
    settle(lambda: len(source.asked) == 11)
    assert sorted(source.asked[1:]) == list(range(20, 30))


def test_a_group_is_complete_before_the_next_is_begun():
    source = Source()
    source.gated = {1, 2}
    ahead = Prefetcher(source)
    waiting = threading.Thread(target=fetched, args=(ahead, (0, 0), ((1, 2), (3, 4)), ()))
    waiting.start()
    settle(lambda: {1, 2} <= set(source.asked))
    source.gate.release()
    time.sleep(0.05)
    assert set(source.asked) == {1, 2}
    source.gate.release(3)
    waiting.join(5)
    assert {3, 4} <= set(source.asked)


def test_failures_of_a_batch_are_told_and_others_are_left_to_who_reads():
    source = Source(bad=(3, 7))
    ahead = Prefetcher(source)
    failed = fetched(ahead, (0, 0), ((1, 3),), (7, 8))
    assert {shard: str(error) for shard, error in failed.items()} == {3: "no shard 3"}
    settle(lambda: {7, 8} <= set(source.asked))
    assert list(fetched(ahead, (0, 1), ((7,),), ())) == [7]


def test_another_epoch_or_an_earlier_step_forgets_what_was_wanted_later():
    for place in ((1, 0), (0, 3), (0, 0)):
        source = Source()
        source.gated = {10, 11}
        ahead = Prefetcher(source)
        fetched(ahead, (0, 3), (), (10, 11, 12, 13))
        settle(lambda source=source: len(source.asked) == 2)
        fetched(ahead, place, (), (14,))
        source.gate.release(2)
        settle(lambda source=source: 14 in source.asked)
        settle(lambda: not threads())
        assert sorted(source.asked) == [10, 11, 14]


def test_a_dropped_one_ends_after_the_downloads_under_way():
    source = Source()
    source.gated = {0, 1}
    ahead = Prefetcher(source)
    fetched(ahead, (0, 0), (), tuple(range(30)))
    settle(lambda: len(source.asked) == THREADS)
    del ahead
    source.gate.release(2)
    settle(lambda: not threads())
    assert len(source.asked) <= THREADS


def test_a_pickled_one_begins_anew():
    ahead = Prefetcher(Source())
    fetched(ahead, (0, 0), ((1, 2),), (3,))
    again = pickle.loads(pickle.dumps(ahead))
    assert fetched(again, (0, 0), ((1,),), (3,)) == {}
    settle(lambda: sorted(again._source.asked) == [1, 3])


def forked(pipe):
    source = Source()
    source.gated = {0}
    ahead = Prefetcher(source)
    fetched(ahead, (0, 0), (), (0, *range(1, 5)))
    settle(lambda: 0 in source.asked)
    pipe.send("begun")
    child = os.fork()
    if not child:
        inner = fetched(ahead, (0, 1), ((7, 8),), (9,))
        settle(lambda: {7, 8, 9} <= set(source.asked))
        os._exit(0 if inner == {} else 1)
    source.gate.release()
    pipe.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_one_begins_anew():
    with Child(forked) as run:
        assert run.hears() == "begun"
        assert run.hears() == 0


def test_a_thread_that_waits_for_ever_keeps_no_process_alive():
    code = (
        "import time\nfrom infobatch_stream.workers.prefetch import Prefetcher\n"
        "class Source:\n    capacity = None\n    ensure_local = lambda self, shard: time.sleep(1000)\n"
        "ahead = Prefetcher(Source())\nahead.queue((0, 0), (1, 2, 3))\nahead.fetch(())\nprint('end')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


# ---- single flight


def hold(pipe, file):
    with single_flight(file) as broken:
        pipe.send(broken)
        if pipe.recv() == "fail":
            raise DataError("it is no good")


def test_one_at_a_time_whether_threads_or_processes(tmp_path):
    file, within, most, found = tmp_path / "file", [0], [0], Counter()

    def work():
        with single_flight(file) as broken:
            within[0] += 1
            most[0] = max(most[0], within[0])
            time.sleep(0.002)
            within[0] -= 1
            found[broken] += 1

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (most, found) == ([1], {False: 8})
    assert list(tmp_path.iterdir()) == []
    with Child(hold, file) as run:
        assert run.hears() is False
        entered = threading.Event()
        waiting = threading.Thread(target=lambda: single_flight(file).__enter__() is None or entered.set())
        waiting.daemon = True
        waiting.start()
        assert not entered.wait(0.1)
        run.tell("end")
        assert entered.wait(5)


def test_those_who_wait_hear_of_a_failure_and_the_next_tries_anew(tmp_path):
    file, heard = tmp_path / "file", []

    def wait():
        try:
            with single_flight(file):
                heard.append("mine")
        except DataError as error:
            heard.append(str(error))

    with pytest.raises(DataError), single_flight(file):
        waiting = [threading.Thread(target=wait) for _ in range(3)]
        for thread in waiting:
            thread.start()
        time.sleep(0.1)
        raise DataError("it is no good")
    for thread in waiting:
        thread.join(5)
    assert heard == ["it is no good"] * 3
    wait()
    assert heard[-1] == "mine"
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_known(tmp_path):
    file = tmp_path / "file"
    code = (
        "import sys, time, pathlib\nfrom infobatch_stream.sources.remote.single_flight import single_flight\n"
        "with single_flight(pathlib.Path(sys.argv[1])):\n    pathlib.Path(sys.argv[2]).touch()\n    time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, file, tmp_path / "in"], env=environment()) as process:
        wait_for([tmp_path / "in"])
        os.kill(process.pid, signal.SIGKILL)
    assert lock_path(file).exists()
    for broken in (True, False):
        with single_flight(Path(file)) as found:
            assert found is broken
