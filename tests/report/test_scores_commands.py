"""The commands that look at a score store: inspect, export, simulate. They change nothing, also beside a run."""

import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from support import commands
from support.ddp.launch import environment
from support.histories import COUNT, DATA, loader, losses, train

from infobatch_stream import (
    BudgetPruning,
    FullData,
    InfoBatchLoader,
    KakurenboPruning,
    OrderPruning,
    QuantilePruning,
    ScoreStore,
    SetaPruning,
    SoftPruning,
)
from infobatch_stream.errors import StoreError
from infobatch_stream.report.simulation import recommend, scores_of, simulate, usual_policies
from infobatch_stream.report.snapshot import Snapshot
from infobatch_stream.store.history import epochs, training


def run(*arguments, code=0):
    """What a command prints, when its exit code is ``code``."""
    found, out, err = commands.run(*arguments)
    assert found == code, out + err
    return out + err


@pytest.fixture
def path(tmp_path):
    train(loader(tmp_path / "s.zarr", 8))
    return tmp_path / "s.zarr"


def files(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


# inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_says_what_the_store_holds_and_changes_nothing(path):
    before = files(path)
    text, found = run("inspect", path), json.loads(run("inspect", path, "--json"))
    assert files(path) == before
    rows = epochs(path)
    saved = 1 - sum(row.trained for row in rows) / (8 * COUNT)
    assert found["saved"] == pytest.approx(saved)
    assert f"{saved:.1%} of the samples" in text
    assert (found["epoch"], found["num_samples"], found["never_seen"], found["in_use_by"]) == (8, COUNT, 0, None)
    assert [one["kept"] for one in found["epochs"]] == [row.kept for row in rows]
    assert all(f"{row.kept:,}" in text for row in rows)
    assert sum(found["last_trained"].values()) == COUNT
    assert sum(found["scores"]["histogram"]) == COUNT


def test_inspect_of_a_running_epoch_counts_what_it_recorded_and_names_the_process(tmp_path):
    going = loader(tmp_path / "s.zarr")
    for (x, _), picks in going:
        going.update(losses(x, 0), picks)
        if going.step == 5:
            break
    going._run.scores.recorder.flush()
    found = json.loads(run("inspect", tmp_path / "s.zarr", "--json"))
    assert found["recorded_in_this_epoch"] == 5 * 32
    assert found["never_seen"] == COUNT
    assert "process" in found["in_use_by"]
    assert "never seen" in run("inspect", tmp_path / "s.zarr")


def test_inspect_of_a_store_without_history_says_so(tmp_path):
    ScoreStore.create(tmp_path / "s.zarr", 4, scores=np.array([1, np.nan, 2, 0], np.float32), epoch=3)
    found = json.loads(run("inspect", tmp_path / "s.zarr", "--json"))
    assert (found["saved"], found["last_trained"], found["never_seen"]) == (None, None, 1)
    assert "not known" in run("inspect", tmp_path / "s.zarr")


@pytest.mark.parametrize("command", ["inspect", "simulate", "export"])
def test_what_is_no_store_is_an_error_that_says_so(tmp_path, command):
    options = ["-o", tmp_path / "out.csv"] if command == "export" else []
    assert "not a score store" in run(command, tmp_path / "nothing.zarr", *options, code=1)
    assert not (tmp_path / "out.csv").exists()


RUNNING = """
import sys
from support.histories import loader, train
for turn in range(100):
    train(loader(sys.argv[1], 8, existing="overwrite" if turn else "error"))
"""


def test_what_is_read_beside_a_run_is_of_one_epoch(tmp_path):
    path = tmp_path / "s.zarr"
    with subprocess.Popen([sys.executable, "-c", RUNNING, path], env=environment()) as process:
        try:
            while not path.exists():
                assert process.poll() is None
                time.sleep(0.01)
            seen, told = set(), []
            end = time.monotonic() + 60
            while len(seen) < 6 and time.monotonic() < end:
                try:
                    found = Snapshot.take(path)
                except StoreError as error:
                    told.append(str(error))
                    continue
                seen.add(found.epoch)
                assert [one.number for one in found.epochs] in ([*range(found.epoch)], [*range(found.epoch - 1)])
                assert found.never_seen == (0 if found.epoch else COUNT)
                if found.training is not None:
                    assert found.training.last.max() == found.epoch - 1
                    assert (found.training.times >= 1).all()
        finally:
            process.kill()
    assert len(seen) >= 6
    assert all(re.search("not a score store|committed to 5 times|another store", text) for text in told), told


# export ----------------------------------------------------------------------------------------------------------


def test_a_table_has_a_row_for_each_sample(path, tmp_path):
    run("export", path, "-o", tmp_path / "t.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pydict()
    assert table["index"] == list(range(COUNT))
    assert np.array_equal(np.array(table["score"], np.float32), ScoreStore.open(path, "r").scores)
    assert table["trained"] == training(path, 8).times.tolist()
    run("export", path, "-o", tmp_path / "t.csv")
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["trained"]) for row in rows] == table["trained"]
    assert [float(row["mean_loss"]) for row in rows] == pytest.approx(table["mean_loss"])


def test_the_hardest_are_those_whose_losses_are_the_highest_on_average(path, tmp_path):
    run("export", path, "-o", tmp_path / "t.parquet", "--hardest", "7")
    found = pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pydict()
    size = DATA.tensors[0].sum(1) ** 2
    assert found["index"] == torch.argsort(size, descending=True)[:7].tolist()
    assert found["mean_loss"] == sorted(found["mean_loss"], reverse=True)


def test_samples_that_were_never_seen_have_no_score(tmp_path):
    ScoreStore.create(tmp_path / "s.zarr", 3, scores=np.array([1, np.nan, 2], np.float32))
    run("export", tmp_path / "s.zarr", "-o", tmp_path / "t.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pydict() == {"index": [0, 1, 2], "score": [1, None, 2]}


def test_a_name_that_says_no_format_needs_one(path, tmp_path):
    assert "--format parquet" in run("export", path, "-o", tmp_path / "t.txt", code=1)
    run("export", path, "-o", tmp_path / "t.txt", "--format", "csv")
    assert (tmp_path / "t.txt").read_text().startswith('"index"')


@pytest.mark.parametrize("command", ["export", "report"])
@pytest.mark.parametrize(("out", "text"), [("no/such/x.csv", "there is no folder"), ("folder.csv", "is a folder")])
def test_a_place_that_cannot_be_written_is_named_as_the_user_named_it(path, tmp_path, command, out, text):
    (tmp_path / "folder.csv").mkdir()
    said = run(command, path, "-o", tmp_path / out, code=1)
    assert text in said
    assert str(tmp_path / out) in said
    assert ".new" not in said
    assert sorted(one.name for one in tmp_path.iterdir()) == ["folder.csv", "s.zarr"]


def test_a_file_beside_it_that_has_a_name_like_one_in_the_making_stays(path, tmp_path):
    (tmp_path / ".t.csv.new").write_text("precious")
    run("export", path, "-o", tmp_path / "t.csv")
    assert (tmp_path / ".t.csv.new").read_text() == "precious"


@pytest.mark.parametrize(("command", "begin"), [("export", b'"index"'), ("report", b"<!")])
def test_a_pipe_is_written_to_and_of_a_link_the_file_that_it_leads_to(path, tmp_path, command, begin):
    os.mkfifo(tmp_path / "pipe.csv")
    with (tmp_path / "told").open("wb") as told:  # not a pipe again, which would be full when nobody reads it
        reader = subprocess.Popen(["cat", tmp_path / "pipe.csv"], stdout=told)
        run(command, path, "-o", tmp_path / "pipe.csv")
        assert reader.wait(60) == 0
    assert (tmp_path / "told").read_bytes().startswith(begin)
    assert (tmp_path / "pipe.csv").is_fifo()
    run(command, path, "-o", "/dev/null", *(["--format", "csv"] if command == "export" else []))
    assert not Path("/dev/null").is_file()
    (tmp_path / "there").mkdir()
    (tmp_path / "link.csv").symlink_to("there/target.csv")
    for before in (None, "old"):
        if before:
            (tmp_path / "there/target.csv").write_text(before)
        run(command, path, "-o", tmp_path / "link.csv")
        assert (tmp_path / "link.csv").is_symlink()
        assert (tmp_path / "there/target.csv").read_bytes().startswith(begin)
    assert [one.name for one in (tmp_path / "there").iterdir()] == ["target.csv"]


def test_without_a_file_it_has_the_name_of_the_store_in_this_folder(path, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run("export", path, "--format", "csv")
    assert f"{COUNT} samples in s.parquet" in run("export", "../s.zarr")
    assert sorted(file.name for file in (tmp_path / "here").iterdir()) == ["s.csv", "s.parquet"]


def test_an_export_that_fails_leaves_the_file_that_was_there(path, tmp_path):
    (tmp_path / "t.csv").write_text("mine")
    (path / "history" / "recorded" / "zarr.json").write_text("{")
    assert "cannot be read" in run("export", path, "-o", tmp_path / "t.csv", code=1)
    assert [file.name for file in tmp_path.iterdir() if "t.csv" in file.name] == ["t.csv"]
    assert (tmp_path / "t.csv").read_text() == "mine"


# simulate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(
    "policy",
    [
        *(SoftPruning(0.6), QuantilePruning(), BudgetPruning(0.4), FullData()),
        *(SetaPruning(), OrderPruning(), KakurenboPruning()),
    ],
    ids=repr,
)
def test_with_the_scores_policy_and_seed_of_a_run_it_keeps_what_the_run_kept(tmp_path, policy, constant):
    run_ = loader(tmp_path / "s.zarr", 10, policy=policy, seed=5, constant_steps=constant)
    train(run_)
    (found,) = simulate([policy], scores_of(ScoreStore.open(tmp_path / "s.zarr", "r")), epochs=10, seed=5)
    rows = epochs(tmp_path / "s.zarr")
    assert found.kept == [row.kept for row in rows]
    assert found.saved == pytest.approx(run_.stats["saved"])


def test_of_a_run_of_some_of_the_samples_it_keeps_what_the_run_kept(tmp_path):
    include = np.arange(COUNT) % 3 != 0
    np.save(tmp_path / "include.npy", include)
    policy = BudgetPruning(0.4)
    train(loader(tmp_path / "s.zarr", 10, policy=policy, seed=5, include=include))
    options = ["--policy", "budget", "--fraction", "0.4", "--seed", "5", "--include", tmp_path / "include.npy"]
    (found,) = json.loads(run("simulate", tmp_path / "s.zarr", *options, "--json"))["outcomes"]
    assert found["kept"] == [row.kept for row in epochs(tmp_path / "s.zarr")]
    assert found["saved"] == pytest.approx(0.4, abs=0.02)


def test_another_policy_is_simulated_about_as_it_would_have_been(tmp_path):
    """The losses of this run do not depend on what was trained on, so a run with that policy can be compared."""
    train(loader(tmp_path / "full.zarr", 10, policy=FullData()))
    policy = SoftPruning(0.5)
    train(loader(tmp_path / "soft.zarr", 10, policy=policy))
    (found,) = simulate([policy], scores_of(ScoreStore.open(tmp_path / "full.zarr", "r")), epochs=10)
    made = [row.kept for row in epochs(tmp_path / "soft.zarr")]
    assert found.kept == pytest.approx(made, rel=0.12)
    assert found.saved == pytest.approx(1 - sum(made) / (10 * COUNT), abs=0.03)


def test_the_effective_share_is_1_for_all_data_and_falls_with_what_is_skipped(path):
    policies = [FullData(), *(BudgetPruning(fraction) for fraction in (0.1, 0.3, 0.5)), BudgetPruning(0.5, power=0)]
    found = simulate(policies, scores_of(ScoreStore.open(path, "r")), epochs=8)
    worst = [one.worst for one in found]
    assert worst[0] == 1
    assert worst == sorted(worst, reverse=True)
    pruned = [kept / COUNT for kept in found[-1].kept if kept < COUNT]
    assert worst[-1] == pytest.approx(np.mean(pruned), abs=0.05)  # of a choice at random: the share itself


def test_a_budget_that_is_spread_evenly_begins_with_a_choice_at_random_and_then_chooses_better(path):
    policies = [BudgetPruning(0.5, power=power, spread="even") for power in (0.0, 0.5)]
    chance, chosen = simulate(policies, scores_of(ScoreStore.open(path, "r")), epochs=8)
    for found in (chance, chosen):
        assert found.kept == pytest.approx([COUNT / 2] * 8, rel=0.15)
        assert found.effective[0] == pytest.approx(0.5, abs=0.02)
    assert chance.effective == pytest.approx([0.5] * 8, abs=0.02)
    assert all(effective > 0.52 for effective in chosen.effective[1:])


def test_of_a_batch_it_says_what_a_constant_step_holds_and_is_worth(path):
    text = run("simulate", path, "--policy", "budget", "--spread", "even", "--fraction", "0.5", "--batch-size", "1000")
    head, *rows = [line.split() for line in text.splitlines() if line.strip()]
    assert head[-3:] == ["batch", "effective", "batch"]
    (found,) = simulate(
        [BudgetPruning(0.5, spread="even")], scores_of(ScoreStore.open(path, "r")), epochs=max(2, len(rows) - 3)
    )
    first = rows[0]
    assert first[:2] == ["0", f"{found.kept[0]:,}"]
    assert [float(cell) for cell in first[-2:]] == [
        pytest.approx(1000 * found.kept[0] / COUNT, abs=0.5), pytest.approx(1000 * found.effective[0], abs=0.5)
    ]  # fmt: skip
    assert "effective batch" in run("simulate", path, "--batch-size", "256")


def test_what_is_recommended_skips_the_wish_and_is_the_best_that_does(path):
    found = simulate(usual_policies(20), scores_of(ScoreStore.open(path, "r")), epochs=20)
    best = recommend(found, 0.4)
    assert 0.39 <= best.saved <= 0.46
    assert all(one.worst <= best.worst for one in found if 0.39 <= one.saved <= best.saved)
    text = run("simulate", path, "--epochs", "20", "--wish", "0.4")
    assert text.count("recommended") == 1
    told = json.loads(run("simulate", path, "--epochs", "20", "--wish", "0.4", "--json"))
    assert told["recommended"] == repr(best.policy)
    assert "none of these policies skips 95%" in run("simulate", path, "--wish", "0.95", code=1)


@pytest.mark.parametrize(
    ("options", "short", "middle"),
    [
        (["--policy", "budget", "--fraction", "0.1", "--spread", "even"], False, False),
        (["--policy", "budget", "--fraction", "0.4", "--spread", "even"], True, False),
        (["--policy", "budget", "--fraction", "0.4", "--spread", "even", "--epochs", "40"], False, False),
        (["--policy", "budget", "--fraction", "0.4", "--epochs", "40"], False, True),
        (["--policy", "budget", "--fraction", "0.4", "--epochs", "12"], True, True),
    ],
)
def test_it_says_where_the_study_found_that_it_costs_accuracy(path, options, short, middle):
    told = json.loads(run("simulate", path, *options, "--json"))["doubts"]
    assert any("epochs are few" in doubt for doubt in told) == short
    assert any("spread evenly" in doubt for doubt in told) == middle
    assert len(told) == short + middle
    assert run("simulate", path, *options).count("Note: ") == len(told)


@pytest.mark.parametrize("name", ["seta", "order", "kakurenbo"])
def test_where_a_policy_is_biased_there_is_no_effective_share(path, name):
    told = json.loads(run("simulate", path, "--policy", name, "--epochs", "5", "--json"))
    (one,) = told["outcomes"]
    assert one["saved"] > 0.02
    assert None in one["effective"]
    assert "biased" in run("simulate", path, "--policy", name, "--epochs", "5")
    assert "without bias" in run("simulate", path, "--policy", name, "--epochs", "5", "--wish", "0.01", code=1)


def test_one_policy_is_shown_epoch_by_epoch(path):
    rows = run("simulate", path, "--policy", "quantile", "--epochs", "5").splitlines()
    assert [row.split()[0] for row in rows[1:6]] == list("01234")
    assert "largest fraction" in run("simulate", path, "--policy", "budget", "--fraction", "0.9", code=1)
    assert "list of numbers" in run("simulate", path, "--policy", "quantile", "--keep", "a,b", code=1)


def test_without_recorded_losses_the_last_scores_stand_for_those_of_all_epochs(tmp_path):
    train(InfoBatchLoader(DATA, tmp_path / "s.zarr", batch_size=32, epochs=4))
    store = ScoreStore.open(tmp_path / "s.zarr", "r")
    given = scores_of(store)
    assert np.isnan(next(given)).all()
    assert all(np.array_equal(next(given), store.scores) for _ in range(5))
