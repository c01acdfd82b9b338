"""The command ``infobatch-stream seed``."""

import json

import numpy as np
import pytest
from support import commands
from support.ddp.data import write_wds
from support.histories import COUNT, loader, train

from infobatch_stream import IndexedWebDataset, InfoBatchLoader, ScoreStore

SCORES = np.random.default_rng(0).random(48)


def run(*arguments, code=0):
    """What a command prints, when its exit code is ``code``."""
    found, out, err = commands.run(*arguments)
    assert found == code, out + err
    return out + err


@pytest.fixture
def earlier(tmp_path):
    train(loader(tmp_path / "earlier.zarr", 2))
    return tmp_path / "earlier.zarr"


@pytest.mark.parametrize("form", ["store", "exported", "exported, and a number"])
def test_a_run_begins_with_the_scores_of_an_earlier_one(earlier, tmp_path, form):
    new, table = tmp_path / "new.zarr", tmp_path / "t.parquet"
    if form == "store":
        said = run("seed", new, earlier)
        assert said == f"{new}: {COUNT} of {COUNT} samples have a score (earlier.zarr after 2 epochs)\n"
    else:
        run("export", earlier, "-o", table)
        said = run("seed", new, table, *(["--samples", COUNT] if "number" in form else ["--dataset", earlier]))
        assert "(t.parquet)" in said
    going = loader(new, 2)
    iter(going)
    np.testing.assert_array_equal(going.store.scores, ScoreStore.open(earlier, "r").scores)
    assert going.stats["pruned"] > 0


@pytest.mark.parametrize("kind", ["wds", "mds"])
def test_of_a_file_the_shards_say_which_dataset_it_is_of(tmp_path, shards, kind):
    folder = shards if kind == "mds" else write_wds(tmp_path / "wds")
    np.save(tmp_path / "s.npy", SCORES)
    run("seed", tmp_path / "s.zarr", tmp_path / "s.npy", "--dataset", folder, "--source", "a reference model")
    if kind == "mds":
        from streaming import StreamingDataset

        dataset = StreamingDataset(local=str(shards), batch_size=4)
    else:
        dataset = IndexedWebDataset(folder)
    going = InfoBatchLoader(dataset, tmp_path / "s.zarr", batch_size=4, epochs=2, collate_fn=list)
    iter(going)
    assert going.stats["pruned"] > 0
    assert going.store.seeded.source == "a reference model"


def test_what_is_refused_leaves_nothing_and_changes_nothing(earlier, tmp_path):
    np.save(tmp_path / "s.npy", np.ones(COUNT))
    new = tmp_path / "new.zarr"
    assert "--dataset SHARDS" in run("seed", new, tmp_path / "s.npy", code=1)
    assert "give one of them" in run("seed", new, earlier, "--samples", 3, "--dataset", earlier, code=1)
    assert "another dataset" in run("seed", new, earlier, "--samples", 3, code=1)
    assert "float[3]" in run("seed", new, tmp_path / "s.npy", "--samples", 3, code=1)
    assert not new.exists()
    before = (earlier / "scores/c/0").read_bytes()
    assert "exists" in run("seed", earlier, tmp_path / "s.npy", "--samples", COUNT, code=1)
    assert (earlier / "scores/c/0").read_bytes() == before
    run("seed", earlier, tmp_path / "s.npy", "--samples", COUNT, "--overwrite")
    assert (ScoreStore.open(earlier).scores == 1).all()


def test_inspect_and_report_say_where_the_scores_were_from(earlier, tmp_path):
    new = tmp_path / "new.zarr"
    run("seed", new, earlier, "--source", "the model <of> old")
    for epochs in (0, 2):
        if epochs:
            train(loader(new, 2))
        assert json.loads(run("inspect", new, "--json"))["seeded"] == {"samples": COUNT, "source": "the model <of> old"}
        assert "began with" in run("inspect", new)
        run("report", new, "-o", tmp_path / "r.html")
        assert "the model &lt;of&gt; old" in (tmp_path / "r.html").read_text()
    assert "began with" not in run("inspect", earlier)
    assert json.loads(run("simulate", new, "--json"))["outcomes"][0]["kept"][0] < COUNT
