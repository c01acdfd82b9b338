"""The lossless study: it trains what is missing, and its pages say what the runs say."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel
from support.idx_files import write_idx

from benchmarks.lossless import families, gpu
from benchmarks.lossless import page as pages
from benchmarks.lossless.page import Difference, against_peers, pairs, steps_table, table, write
from benchmarks.lossless.runs import Run, read
from benchmarks.lossless.tables import CONSTANT, LONG, MAIN, PAIRS, SHORT, STUDY, TABLES, TIME
from benchmarks.lossless.tasks import FAMILIES, TASKS
from benchmarks.lossless.training import schedule, train, train_missing
from benchmarks.lossless.variants import ALL, FULL, Growing


def noise(folder):
    """Idx files as Fashion-MNIST has them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 300), ("t10k", 50)):
        write_idx(folder / f"{split}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{split}-labels-idx1-ubyte", rng.integers(0, 10, count, dtype=np.uint8))
    return folder


@pytest.fixture
def images(tmp_path):
    """A folder for each task, with few samples of noise."""

    def prepare(name):
        folder = tmp_path / name
        folder.mkdir()
        TASKS[name].data.prepare(noise(tmp_path / "idx"), folder, TASKS[name].tiny, 50)
        return folder

    return prepare


@pytest.mark.usefixtures("few_open_files")  # of StreamingDatasets
@pytest.mark.filterwarnings("ignore:[\\s\\S]*NumPy array is not writable:UserWarning")  # MDS gives such arrays
def test_the_study_runs_and_what_is_there_is_not_trained_again(tmp_path, images):
    results, folder = tmp_path / "results.jsonl", images("fashion-mnist")

    def train_all(names):
        for seed in range(2):
            train_missing(TASKS["fashion-mnist"], names, seed, folder, "cpu", 5, results, curve=True)

    train_all([FULL])
    assert [run.variant for run in read(results)] == [FULL] * 2
    names = [FULL, *(name for name in TABLES[STUDY].rows if name.endswith("50 %"))]
    train_all(names)
    before = results.read_text()
    runs = {run.variant: run for run in read(results)}
    assert sorted(runs) == sorted(names)
    assert len(read(results)) == 2 * len(names)
    assert all(len(run.accuracy) == (3 if "fewer" in name else 5) for name, run in runs.items())
    assert all(run.saved == pytest.approx(0.5, abs=0.11) for name, run in runs.items() if name != FULL)
    assert runs[FULL].saved == 0
    train_all(names)
    assert results.read_text() == before
    page = tmp_path / "page.md"
    page.write_text("# Page\n<!-- fashion-mnist -->\nold\n<!-- end -->\nrest\n")
    pages.report(read(results), page)
    text = page.read_text()
    assert "old" not in text
    assert text.endswith("<!-- end -->\nrest\n")
    assert all(f"| {name} | 2 |" in text for name in names)
    assert (tmp_path / "lossless-fashion-mnist.png").exists()


@pytest.mark.usefixtures("few_open_files")
@pytest.mark.filterwarnings("ignore:[\\s\\S]*NumPy array is not writable:UserWarning")
def test_constant_steps_and_the_control_make_as_many_steps_as_full_data(tmp_path, images):
    first, results, page = TABLES[CONSTANT].first, tmp_path / "results.jsonl", tmp_path / "page.md"
    names = [FULL, "budget 40 %", "even, constant steps 50 %", "fewer epochs, smaller batches 50 %"]
    folder = images("fashion-mnist-resnet8")
    for seed in (first, first + 1):
        train_missing(TASKS["fashion-mnist-resnet8"], names, seed, folder, "cpu", 4, results, curve=False)
    runs = {run.variant: run for run in read(results)}
    assert [runs[name].steps for name in names] == [8, 6, 8, 8]  # of 256 samples, 128 a step
    assert [runs[name].saved > 0.3 for name in names] == [False, True, True, True]
    assert all(len(run.accuracy) == len(run.test_loss) == 1 for run in runs.values())
    page.write_text(f"<!-- fashion-mnist-resnet8, {CONSTANT} -->\n<!-- end -->\n")
    pages.report(read(results), page)
    assert all(f"\n| {name} | " in page.read_text() for name in names)


@pytest.mark.usefixtures("few_open_files")
@pytest.mark.filterwarnings("ignore:[\\s\\S]*NumPy array is not writable:UserWarning")
def test_fewer_epochs_end_within_an_epoch_when_the_samples_are_spent(images):
    folder = images("cnn-cpu")  # 300 samples, 64 a step
    run = train(TASKS["cnn-cpu"], "fewer epochs 70 %", 0, folder, "cpu", 5)  # one and a half epochs
    assert run.steps == 5 + 3
    assert run.trained == [300, 300 + 3 * 64]
    assert len(run.accuracy) == 1


@pytest.mark.usefixtures("few_open_files")
@pytest.mark.filterwarnings("ignore:[\\s\\S]*NumPy array is not writable:UserWarning")
@pytest.mark.parametrize("name", ["even, smooth 0.8, constant steps 50 %", "growing, constant steps 50 %"])
def test_the_ideas_skip_half(images, name):
    run = train(TASKS["cnn-cpu"], name, 0, images("cnn-cpu"), "cpu", 8)
    assert run.saved == pytest.approx(0.5, abs=0.05)
    shares = np.diff([0, *run.trained]) / 300
    assert (shares[0] > 0.85) == (shares[-1] < 0.2) == isinstance(ALL[name].policy, Growing)


def test_on_a_machine_without_streamingdataset_packed_samples_train_side_by_side_until_the_time_is_over(tmp_path):
    task = TASKS["cnn-cpu"]
    packed = tmp_path / "data" / task.data.name
    packed.mkdir(parents=True)
    task.data.pack(noise(tmp_path / "idx"), packed, 200)
    arguments = [tmp_path / "data", tmp_path / "results.jsonl", "--tasks", "cnn-cpu", "--epochs", "8", "--seeds", "2"]
    gpu.main([*map(str, arguments), "--minutes", "5"])
    found = {(run.variant, run.seed) for run in read(tmp_path / "results.jsonl")}
    assert found == {(name, TABLES[SHORT].first + seed) for name in MAIN for seed in range(2)}
    before = (tmp_path / "results.jsonl").read_text()
    gpu.main([*map(str, arguments), "--minutes", "0", "--first", "2"])
    assert (tmp_path / "results.jsonl").read_text() == before


def test_texts_of_a_package_are_either_for_training_or_for_testing(tmp_path):
    for number in range(40):
        package = tmp_path / "packages" / f"package{number}"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"# {number:03d}\n" * 20)
        (package / "test_it.py").write_text("never read")
    task = TASKS["gpt-cpu"]
    train_, test = task.data.read(tmp_path / "packages")
    names = [{bytes(sample["data"])[2:5] for sample in samples} for samples in (train_, test)]
    assert len(names[0]) > len(names[1]) > 0
    assert not names[0] & names[1]
    inputs, labels = task.data.plain(train_[:3])
    assert inputs.shape == labels.shape == (3, 48)
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    model = task.model().eval()
    changed = inputs.clone()
    changed[:, 20:] = 0
    assert torch.allclose(model(inputs)[:, :20], model(changed)[:, :20], atol=1e-5)  # it does not look ahead
    assert not torch.allclose(model(inputs)[:, 20:], model(changed)[:, 20:], atol=1e-5)


def test_tables_and_questions_name_variants_that_there_are_and_seeds_are_of_one_table():
    assert {name for table in TABLES.values() for name in table.rows} <= ALL.keys()
    assert {name for pair in PAIRS for name in pair} <= ALL.keys()
    assert {task for tasks in FAMILIES.values() for task in tasks} <= TASKS.keys()
    assert all(after - before >= 100 for before, after in pairwise(table.first for table in TABLES.values()))


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
    rows = table(RUNS, TABLES[STUDY].rows).splitlines()
    assert rows[2] == "| full data | 3 | 91.00 ± 1.00 |  |  | 133 |  |"
    assert rows[3].startswith("| budget 50 % | 3 | 91.07 ± 1.12 | +0.07 (-0.56 to +0.69) | 50.0 % | 67 | 49.3 % |")
    peers = against_peers(RUNS, ["50 %"], ["budget"]).splitlines()
    assert peers[2].startswith("| budget 50 % | +1.07 (")
    assert peers[2].endswith(" |  |  | 0.99 |")


def test_a_row_of_constant_steps_says_each_seed_and_steps_and_two_variants_are_paired():
    rows = steps_table(
        [replace(run, task="spam", steps=run.seed and 7) for run in RUNS], TABLES[STUDY].rows
    ).splitlines()
    assert rows[0].split(" | ")[3] == "seeds 0, 1, 2"
    assert rows[2] == "| full data | 91.00 |  | 90.00 / 91.00 / 92.00 | 5 |  |"  # 1 of 32 for 10 samples; 7 and 7
    assert rows[3].startswith("| budget 50 % | 91.07 | +0.07 (-0.56 to +0.69) | 90.10 / 90.80 / 92.30 | 5 | 50.0 % |")
    questions = [("budget 50 %", "fewer epochs 50 %"), ("budget 50 %", "budget 40 %")]
    assert pairs(RUNS, questions).splitlines()[2:] == [
        "| budget 50 % | fewer epochs 50 % | 3 | +1.07 (+0.44 to +1.69) |"
    ]


def test_over_families_more_is_better_and_a_loss_is_in_percent_of_full_datas():
    name = "even, constant steps 50 %"
    runs = [
        Run(task, variant, TABLES[SHORT].first + seed, "cpu", 1, [90 + gain + seed], [10], [], 60.0, saved, [loss])
        for task in ("gpt-cpu", "spam")
        for seed in range(3)
        for variant, gain, saved, loss in ((FULL, 0, 0.0, 2.0), (name, 0.5 + 0.1 * seed, 0.5, 1.98))
    ]
    rows = families.against_full(runs, SHORT).splitlines()
    assert rows[0] == "| variant | samples skipped | GPT, AdamW | text CNN, AdamW |"
    assert rows[2] == "| full data |  | loss 2.000, 3 seeds | 91.00 %, 3 seeds |"
    gaps = "+1.00 (+1.00 to +1.00) | +0.60 (+0.35 to +0.85)"
    assert rows[3] == f"| {name} | 50 % | {gaps} |"
    assert "| 50 % | +1.00 (+1.00 to +1.00) | +1.00 (+1.00 to +1.00) |" in families.against_full(
        runs, SHORT, by_loss=True
    )
    asked = families.questions(runs, SHORT, [(name, FULL), (FULL, "budget 50 %")]).splitlines()
    assert asked[2:] == [f"| {name} | full data |  |  | {gaps} |  |"]
    assert families.against_full(runs, LONG).count("\n") == 2  # no row
    assert families.seconds(runs, [SHORT]).splitlines()[2] == "| 12 epochs, hours | 0.0 | 0.0 | 0.1 | 0.1 | 0.0 |"


def test_the_page_of_families_has_its_tables_and_a_plot_of_accuracy_over_time(tmp_path):
    runs = [
        Run(
            "spam", name, TABLES[table].first + seed, "cpu", 1, [80.0, 90.0], [5, 9], [], 8.0, 0.1, [1.0], 4, [5.0, 8.0]
        )
        for table in (SHORT, TIME)
        for name in TABLES[table].rows
        for seed in range(2)
    ]
    page = tmp_path / "page.md"
    places = [SHORT, LONG, f"{SHORT}, questions", "hours"]
    page.write_text("".join(f"<!-- {place} -->\nold\n<!-- end -->\n" for place in places))
    families.report(runs, page)
    text = page.read_text()
    assert "old" not in text
    assert all(f"\n| {name} | " in text for name in TABLES[SHORT].rows)
    assert (tmp_path / "time-to-accuracy.png").stat().st_size > 5000


@pytest.mark.parametrize("name", TASKS)
def test_by_the_root_rule_a_step_that_stands_for_4_times_as_many_samples_is_twice_as_large(name):
    task = TASKS[name]
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
