"""Runs that are killed (kill -9) at any moment, again and again, go on as if they had not been."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.ddp.kill_points import POINTS
from support.ddp.launch import start

pytestmark = pytest.mark.ddp
SHARES = 2  # commands that work side by side


def crash(tmp_path, *args, seconds):
    """The reports of the shares. A loss fails the command, which then tells of the experiment."""

    def share(number):
        report = tmp_path / f"{number}.json"
        start("crash.py", *args, "--share", f"{number}/{SHARES}", "--report", report, seconds=seconds)
        return json.loads(report.read_text())

    with ThreadPoolExecutor() as threads:
        return list(threads.map(share, range(SHARES)))


# Of two nodes, of the history, and of a store that is replaced: the least that says whether the experiments still work.
SOME = ["one node committed, one not", "committed, the history not", "between the renames"]


def test_runs_killed_at_some_labelled_points_go_on_as_if_they_had_not_been(tmp_path):
    labels = [word for label in SOME for word in ("--label", label)]
    report = tmp_path / "report.json"
    start("crash.py", "--rounds", 1, "--extra", 0, "--seed", 2, *labels, "--report", report, seconds=240)
    found = json.loads(report.read_text())
    assert set(SOME) <= set(found["labels"])
    assert found["losses"] == 0


def test_a_process_comes_by_every_labelled_point_where_it_can(tmp_path):
    """Else a point whose function has changed would be one at which nobody is killed."""
    start("passing.py", tmp_path, seconds=60)
    passed = json.loads((tmp_path / "passed.json").read_text())
    elsewhere = {label for label, point in POINTS.items() if point.who in ("second", "two nodes", "several ranks")}
    assert set(POINTS) - set(passed) == elsewhere


@pytest.mark.slow(short="test_runs_killed_at_some_labelled_points_go_on_as_if_they_had_not_been")
def test_runs_killed_at_every_labelled_point_go_on_as_if_they_had_not_been(tmp_path):
    reports = crash(tmp_path, "--rounds", 1, "--extra", 1, "--seed", 0, seconds=240)
    assert {label for report in reports for label in report["labels"]} == set(POINTS)
    assert sum(report["kills"] for report in reports) >= len(POINTS)
    assert sum(report["losses"] for report in reports) == 0


@pytest.mark.slow(short="test_runs_killed_at_some_labelled_points_go_on_as_if_they_had_not_been")
@pytest.mark.parametrize("seed", [1, 2])
def test_200_kills_lose_nothing(tmp_path, seed):
    reports = crash(tmp_path, "--kills", 200 // SHARES, "--seed", seed, seconds=1800)
    assert sum(report["kills"] for report in reports) >= 200
    assert sum(report["losses"] for report in reports) == 0
