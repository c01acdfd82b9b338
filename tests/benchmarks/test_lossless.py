"""The lossless study: it trains what is missing side by side, and its page says what the runs say."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ttest_rel
from support.idx_files import write_idx

from benchmarks import lossless
from benchmarks.lossless import Run, done, schedule
from benchmarks.lossless_page import Difference, against_peers, pairs, steps_table, table, write
from benchmarks.lossless_variants import ALL, CONSTANT, FULL, PAIRS, TABLES, VARIANTS


def noise(folder):
    """Idx files as Fashion-MNIST has them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 300), ("t10k", 50)):
        write_idx(folder / f"{split}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{split}-labels-idx1-ubyte", rng.integers(0, 10, count, dtype=np.uint8))
    return folder


@pytest.mark.usefixtures("few_open_files")  # of StreamingDatasets
@pytest.mark.filterwarnings("ignore:[\\s\\S]*NumPy array is not writable:UserWarning")  # MDS gives such arrays
def test_the_study_runs_and_what_is_there_is_not_trained_again(tmp_path):
    results = tmp_path / "results.jsonl"
    lossless.TASKS["fashion-mnist"].prepare(noise(tmp_path / "idx"), tmp_path, tiny=True)

    def train(names):
        for seed in range(2):
            lossless.side_by_side("fashion-mnist", names, seed, tmp_path, "cpu", 5, results)

    train([FULL])
    assert [run.variant for run in done(results)] == [FULL] * 2
    names = [FULL, *(name for name in VARIANTS if name.endswith("50 %"))]
    train(names)
    before = results.read_text()
    runs = {run.variant: run for run in done(results)}
    assert sorted(runs) == sorted(names)
    assert len(done(results)) == 2 * len(names)
    assert all(len(run.accuracy) == (2 if "fewer" in name else 5) for name, run in runs.items())
    assert all(run.saved == pytest.approx(0.5, abs=0.11) for name, run in runs.items() if name != FULL)
    assert runs[FULL].saved == 0
    train(names)
    assert results.read_text() == before
    page = tmp_path / "page.md"
    page.write_text("# Page\n<!-- fashion-mnist -->\nold\n<!-- end -->\nrest\n")
    lossless.report(results, page)
    text = page.read_text()
    assert "old" not in text
    assert text.endswith("<!-- end -->\nrest\n")
    assert all(f"| {name} | 2 |" in text for name in names)
    assert (tmp_path / "lossless-fashion-mnist.png").exists()


@pytest.mark.usefixtures("few_open_files")
@pytest.mark.filterwarnings("ignore:[\\s\\S]*NumPy array is not writable:UserWarning")
def test_constant_steps_and_the_control_make_as_many_steps_as_full_data(tmp_path):
    first, results, page = TABLES[CONSTANT].first, tmp_path / "results.jsonl", tmp_path / "page.md"
    names = [FULL, "budget 40 %", "even, constant steps 50 %", "fewer epochs, smaller batches 50 %"]
    lossless.TASKS["fashion-mnist-resnet8"].prepare(noise(tmp_path / "idx"), tmp_path, tiny=True)
    for seed in (first, first + 1):
        lossless.side_by_side("fashion-mnist-resnet8", names, seed, tmp_path, "cpu", 4, results, curve=False)
    runs = {run.variant: run for run in done(results)}
    assert [runs[name].steps for name in names] == [8, 6, 8, 8]  # of 256 samples, 128 a step
    assert [runs[name].saved > 0.3 for name in names] == [False, True, True, True]
    assert all(len(run.accuracy) == len(run.test_loss) == 1 for run in runs.values())
    page.write_text(f"<!-- fashion-mnist-resnet8, {CONSTANT} -->\n<!-- end -->\n")
    lossless.report(results, page)
    assert all(f"\n| {name} | " in page.read_text() for name in names)


def test_tables_and_questions_name_variants_that_there_are():
    assert {name for table in TABLES.values() for name in table.rows} <= ALL.keys()
    asked = {name for pair in PAIRS for name in pair}
    assert {name for name in asked if name.endswith(("40 %", "50 %", "steps", "soft"))} <= set(TABLES[CONSTANT].rows)


def runs_of(variant, accuracies, seconds, saved):
    pairs = enumerate(zip(accuracies, seconds, strict=True))
    return [Run("t", variant, n, "cpu", 1, [a], [10], [0.0], s, saved) for n, (a, s) in pairs]


RUNS = [
    *runs_of(FULL, [90.0, 91.0, 92.0], [100.0, 200.0, 100.0], 0.0),
    *runs_of("budget 50 %", [90.1, 90.8, 92.3], [50.0, 100.0, 52.0], 0.5),
    *runs_of("fewer epochs 50 %", [89.0, 90.0, 91.0], [50.0, 100.0, 50.0], 0.5),
]


def test_an_interval_is_that_of_the_paired_differences():
    first, second = dict(enumerate([90.1, 90.8, 92.3])), dict(enumerate([90.0, 91.0, 92.0]))
    found = Difference.of(first, second | {7: 50.0})  # a seed that only one has does not count
    wanted = ttest_rel(list(first.values()), list(second.values())).confidence_interval()
    assert (found.low, found.high, found.pairs) == (pytest.approx(wanted.low), pytest.approx(wanted.high), 3)


def test_a_row_says_accuracy_difference_and_what_was_saved():
    rows = table(RUNS, VARIANTS).splitlines()
    assert rows[2] == "| full data | 3 | 91.00 ± 1.00 |  |  | 133 |  |"
    assert rows[3].startswith("| budget 50 % | 3 | 91.07 ± 1.12 | +0.07 (-0.56 to +0.69) | 50.0 % | 67 | 49.3 % |")
    peers = against_peers(RUNS, ["50 %"], ["budget"]).splitlines()
    assert peers[2].startswith("| budget 50 % | +1.07 (")
    assert peers[2].endswith(" |  |  | 0.99 |")


def test_a_row_of_constant_steps_says_each_seed_and_steps_and_two_variants_are_paired():
    rows = steps_table([replace(run, task="spam", steps=run.seed and 7) for run in RUNS], VARIANTS).splitlines()
    assert rows[0].split(" | ")[3] == "seeds 0, 1, 2"
    assert rows[2] == "| full data | 91.00 |  | 90.00 / 91.00 / 92.00 | 5 |  |"  # 1 of 32 for 10 samples; 7 and 7
    assert rows[3].startswith("| budget 50 % | 91.07 | +0.07 (-0.56 to +0.69) | 90.10 / 90.80 / 92.30 | 5 | 50.0 % |")
    questions = [("budget 50 %", "fewer epochs 50 %"), ("budget 50 %", "budget 40 %")]
    assert pairs(RUNS, questions).splitlines()[2:] == [
        "| budget 50 % | fewer epochs 50 % | 3 | +1.07 (+0.44 to +1.69) |"
    ]


@pytest.mark.parametrize("name", lossless.TASKS)
def test_by_the_root_rule_a_step_that_stands_for_4_times_as_many_samples_is_twice_as_large(name):
    task = lossless.TASKS[name]
    by_weights = 1 if task.adaptive else 4  # times as large a step that the weights alone make
    assert task.rate(0.25) * by_weights == pytest.approx(2 * task.rate(1.0))
    assert task.rate(1.0) == task.peak


def test_a_page_without_the_place_for_a_table_is_refused(tmp_path):
    (tmp_path / "page.md").write_text("<!-- spam -->\nand no end\n")
    with pytest.raises(ValueError, match="no lines '<!-- spam -->'"):
        write(tmp_path / "page.md", "spam", "text")


def test_the_learning_rate_rises_and_falls_to_0():
    rates = [schedule(progress) for progress in np.linspace(0, 1, 101)]
    assert max(rates) == pytest.approx(1, abs=0.01)
    assert rates[-1] == pytest.approx(0)
    assert np.abs(np.diff(rates)).max() < 0.08
