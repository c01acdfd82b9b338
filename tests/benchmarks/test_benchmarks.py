"""Every benchmark runs, at sizes that say nothing; and the page that is made of what they find."""

import importlib
import subprocess
import sys

import pytest
from support.paths import ROOT

from benchmarks.__main__ import NAMES, write_page
from benchmarks.measure import Spread, in_turn, ratio
from benchmarks.report import Figure, load, page, save

FIGURES = [
    Figure(1, "fast", Spread(3.0, 2.0, 4.0), "x", "a peer", bound=2),
    Figure(1, "slow", Spread(30.0, 30.0, 30.0), "ms", "a limit", bound=20, at="most", note="the disk"),
    Figure(0, "context", Spread(1234.5, 1000.0, 2000.0), "us", ""),
]


QUICK = (
    "planning",
    "order",
    "step_time",
)  # the others take three minutes: pytest -m slow tests/benchmarks/test_benchmarks.py


@pytest.mark.ddp
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_a_benchmark_runs(name, tmp_path):
    command = [sys.executable, "-m", "benchmarks", name, "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    _, figures = load(tmp_path / "results" / f"{name}.json")
    assert figures
    assert all(figure.value.low <= figure.value.median <= figure.value.high for figure in figures)
    text = (tmp_path / "RESULTS.md").read_text()
    assert all(f"| {figure.what} |" in text for figure in figures)


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_can_be_imported_and_has_a_title(name):  # the slow ones are rarely run
    assert importlib.import_module(f"benchmarks.{name}").TITLE


def test_the_page_says_of_each_target_whether_it_is_reached():
    text = page({"one": ("a machine", FIGURES)}, {"one": "One"}, {"one": ["results/one.png"]})
    assert "1 of 2 bounds are reached" in text
    assert "| 1 | fast | 3 x (2 to 4) | at least 2 x | a peer | reached |" in text
    assert "| 1 | slow | 30 ms | at most 20 ms | a limit | **not reached** |" in text
    assert "|  | context | 1,234 us (1,000 to 2,000) |  |  |  |" in text
    assert "slow: the disk" in text
    assert "![One](results/one.png)" in text


def test_figures_are_read_as_they_were_saved(tmp_path):
    save(tmp_path / "results" / "order.json", FIGURES)
    assert load(tmp_path / "results" / "order.json")[1] == FIGURES
    write_page(tmp_path)
    assert "fast" in (tmp_path / "RESULTS.md").read_text()


def test_contenders_take_turns_and_the_warm_up_does_not_count():
    calls = []
    found = in_turn({name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}, rounds=2)
    assert "".join(calls) == "ababab"
    assert found == {"a": [3, 5], "b": [4, 6]}


def test_a_ratio_is_taken_round_by_round():
    assert ratio([2.0, 9.0, 8.0], [1.0, 3.0, 8.0]) == Spread(2.0, 1.0, 3.0)
