"""ordered_map: results in order, few items in flight, and no worker that outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from infobatch_stream._pool import default_workers, ordered_map
from infobatch_stream.errors import ConfigError, DataError


def act(base: int, item: object) -> object:
    match item:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "refuse":
            raise DataError("refused")
        case "pid":
            return os.getpid()
        case int():
            time.sleep(0.02 * (item % 3))
            return base + item
    return item


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_are_in_the_order_of_the_items(workers):
    assert list(ordered_map(partial(act, 100), range(40), workers)) == list(range(100, 140))
    assert list(ordered_map(partial(act, 100), [], workers)) == []


def test_one_worker_is_this_process():
    assert list(ordered_map(partial(act, 0), ["pid"], 1)) == [os.getpid()]
    assert os.getpid() not in set(ordered_map(partial(act, 0), ["pid"] * 4, 2))
    assert 1 <= default_workers() <= 8


def test_items_are_taken_as_results_are(monkeypatch):
    taken = []
    results = ordered_map(partial(act, 0), (taken.append(k) or k for k in range(100)), 2, ahead=3)
    assert next(results) == 0
    assert len(taken) == 6
    assert next(results) == 1
    assert len(taken) == 7
    results.close()
    assert len(taken) == 7


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_come_in_their_turn(workers):
    results = ordered_map(partial(act, 0), [1, 2, "refuse", 3], workers)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(DataError, match="refused"):
        next(results)


def test_errors_of_the_items_end_the_workers():
    def items():
        yield 1
        raise DataError("no more")

    with pytest.raises(DataError, match="no more"):
        list(ordered_map(partial(act, 0), items(), 2))


def test_a_worker_that_is_killed_is_told():
    with pytest.raises(ConfigError, match=r"One of 2 worker processes was killed.*--workers"):
        list(ordered_map(partial(act, 0), [1, 2, "die", 3], 2))


def workers_of(place: Path) -> list[int]:
    return [int(file.name) for file in place.iterdir()] if place.exists() else []


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def hold(place: str, item: int) -> None:
    Path(place, str(os.getpid())).touch()
    time.sleep(60)


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    code = (
        "import sys; from functools import partial; sys.path.insert(0, sys.argv[1]); from test_pool import hold;"
        "from infobatch_stream._pool import ordered_map;"
        "list(ordered_map(partial(hold, sys.argv[2]), range(4), 2))"
    )
    command = [sys.executable, "-c", code, Path(__file__).parent, tmp_path]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while len(workers_of(tmp_path)) < 2 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    deadline = time.monotonic() + 10
    while any(map(is_running, workers_of(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers_of(tmp_path)) == 2
    assert not any(map(is_running, workers_of(tmp_path)))
