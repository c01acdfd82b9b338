"""Runs that are killed (kill -9) at any moment, again and again, go on as if they had not been."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from ddp_scripts.kill_points import POINTS
from ddp_scripts.launch import start

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


@pytest.mark.slow
def test_runs_killed_at_every_labelled_point_go_on_as_if_they_had_not_been(tmp_path):
    reports = crash(tmp_path, "--rounds", 1, "--extra", 1, "--seed", 0, seconds=240)
    assert {label for report in reports for label in report["labels"]} == set(POINTS)
    assert sum(report["kills"] for report in reports) >= len(POINTS)
    assert sum(report["losses"] for report in reports) == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_200_kills_lose_nothing(tmp_path, seed):
    reports = crash(tmp_path, "--kills", 200 // SHARES, "--seed", seed, seconds=1800)
    assert [(report["kills"], report["losses"]) for report in reports] == [(200 // SHARES, 0)] * SHARES
