"""Relative paths of a StreamingDataset, and of the scores, when the working folder is changed (as Hydra does)."""

import shutil
from pathlib import Path

import pytest
from support.ddp.data import loss_of, write_mds
from support.ddp.mds import Augmented

from infobatch_stream import ConfigError, InfoBatchLoader, ScoreStore
from infobatch_stream.sources import open_source

pytestmark = [
    pytest.mark.usefixtures("no_stale_shared_memory", "few_open_files"),
    # streaming leaves the shard open whose checksum it takes
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.mark.parametrize("moment", ["before the loader", "after it"])
@pytest.mark.parametrize("split", [None, "train"])
def test_relative_paths_mean_what_they_meant_when_the_dataset_was_made(many, tmp_path, monkeypatch, moment, split):
    (tmp_path / "sub").mkdir()
    shutil.copytree(many, tmp_path / "remote" / (split or ""))
    monkeypatch.chdir(tmp_path)
    dataset = Augmented(remote="remote", local="cache", split=split)
    if moment == "before the loader":
        monkeypatch.chdir(tmp_path / "sub")
    source = open_source(dataset)
    monkeypatch.chdir(tmp_path / "sub")
    assert [source.read(i)[0] for i in (0, 30, 119)] == [1000, 1030, 1119]
    assert dataset[50][0] == 1050
    assert not list((tmp_path / "sub").iterdir())
    assert len(list((tmp_path / "cache").rglob("*.mds"))) == 4


def test_paths_of_which_that_cannot_be_told_are_refused(many, tmp_path, monkeypatch):
    shutil.copytree(many, tmp_path / "data")
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    dataset = Augmented(local="../data")
    monkeypatch.chdir("/")
    with pytest.raises(ConfigError, match=r"the working folder was changed .*give absolute paths"):
        open_source(dataset)


@pytest.fixture
def two(tmp_path):
    """Working folders "one" and "two" with other samples in "data" each; their index.json has checksums, or none."""

    def two(hashes):
        for first, name in enumerate(("one", "two")):
            write_mds(tmp_path / name / "data", first=1000 * first, hashes=hashes)

    return two


@pytest.mark.parametrize("hashes", [[], ["sha1"]], ids=str)
def test_a_relative_remote_is_refused_when_no_local_tells_of_what(two, tmp_path, monkeypatch, hashes):
    two(hashes)
    monkeypatch.setenv("PWD", str(tmp_path / "one"))
    monkeypatch.chdir(tmp_path / "one")
    dataset = Augmented(remote="data", local=str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "two")
    with pytest.raises(ConfigError, match=r"remote='data' is relative .*one.*two.*Give an absolute path") as error:
        open_source(dataset)
    monkeypatch.chdir(tmp_path / "one")
    remedy = str(error.value).split("remote=")[-1].removesuffix(".")
    dataset = Augmented(remote=eval(remedy, {"Path": Path}), local=str(tmp_path / "another cache"))
    monkeypatch.chdir(tmp_path / "two")
    assert open_source(dataset).read(5)[0] == 5


@pytest.mark.parametrize("told_by", ["the process's first folder", "checksums"])
def test_and_taken_when_something_does(two, tmp_path, monkeypatch, told_by):
    two(["sha1"] if told_by == "checksums" else [])
    monkeypatch.setenv("PWD", str(tmp_path / ("one" if told_by == "checksums" else "two")))
    monkeypatch.chdir(tmp_path / "two")
    dataset = Augmented(remote="data", local=str(tmp_path / "cache"))
    assert open_source(dataset).read(5)[0] == 1005


def test_of_the_scores_too(many, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    loader = InfoBatchLoader(Augmented(local=str(many)), "scores.zarr", batch_size=8, epochs=1, delta=1)
    monkeypatch.chdir(tmp_path / "sub")
    with loader:
        for _, picks in loader:
            loader.update(loss_of(picks.index), picks)
    assert not list((tmp_path / "sub").iterdir())
    assert ScoreStore.open(tmp_path / "scores.zarr").epoch == 1
