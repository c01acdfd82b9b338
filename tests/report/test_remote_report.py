"""report and export show samples of shards that are on a server, of which they fetch those that they show."""

import json
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
from PIL import Image
from support.commands import run
from support.servers import FaultyServer, s3_server, use_s3

from infobatch_stream import ScoreStore
from infobatch_stream.convert import convert
from infobatch_stream.report.dataset import open_shards

IMAGES = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for k in range(IMAGES):
        (folder / "src" / ("cat", "dog")[k % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (20 * k, 0, 0)).save(folder / "src" / ("cat", "dog")[k % 2] / f"{k}.png")
    for name, format, compression in (("tars", "wds", None), ("mds", "mds", None), ("packed", "mds", "zstd:3")):
        convert(folder / "src", folder / name, format, shard_samples=4, compression=compression)
    return folder


@pytest.fixture(scope="module")
def s3(shards):
    with s3_server() as server:
        for name in ("tars", "mds", "packed"):
            server.put_folder(shards / name, name)
        yield server


def store_of(place: Path, folder: Path) -> Path:
    """Scores that grow with the number of the sample."""
    scores = np.arange(IMAGES, dtype=np.float32)
    ScoreStore.create(place, IMAGES, open_shards(str(folder)).fingerprint, scores=scores, epoch=1)
    return place


@pytest.mark.parametrize("name", ["tars", "mds", "packed"])
@pytest.mark.parametrize("server", ["s3", "http"])
def test_shards_on_a_server_are_shown_as_local_ones_and_only_what_is_shown_is_fetched(
    tmp_path, monkeypatch, shards, s3, server, name
):
    store = store_of(tmp_path / "s.zarr", shards / name)
    monkeypatch.chdir(tmp_path)
    with FaultyServer(s3.url if server == "s3" else shards) as web:
        if server == "s3":
            use_s3(monkeypatch, web.url)
        url = f"s3://shards/{name}" if server == "s3" else f"{web.url}/{name}"
        url += "/shard-{000000..000002}.tar" if (server, name) == ("http", "tars") else ""
        options = ["--dataset", url, "--cache", tmp_path / "cache"]
        assert run("export", store, "--hardest", 2, "-o", "far.csv", *options)[0] == 0
        fetched = {path for path in web.gets if path.endswith((".tar", ".mds", ".zstd"))}
        assert {Path(path).name.split(".mds")[0].removesuffix(".tar")[-1] for path in fetched} == {"2"}
        assert run("report", store, "--samples", 2, "-o", "far.html", *options)[0] == 0
        assert not any("1" in Path(path).name for path in web.gets if path.endswith((".tar", ".mds", ".zstd")))
    assert run("export", store, "--hardest", 2, "-o", "near.csv", "--dataset", shards / name)[0] == 0
    assert Path("far.csv").read_text() == Path("near.csv").read_text()
    page = Path("far.html").read_text()
    assert page.count("data:image/webp") == 4
    assert "cannot be" not in page


def test_what_is_not_on_the_server_is_an_error_that_says_so(tmp_path, monkeypatch, shards, s3):
    store = store_of(tmp_path / "s.zarr", shards / "mds")
    use_s3(monkeypatch, s3.url)
    for url, text in (
        ("s3://shards/nothing", "There is no shard"), ("s3://shards/nothing/*.tar", "There is no shard"),
        ("s3://shards/tars", "those of other shards"),
    ):  # fmt: skip
        code, _, err = run("report", store, "--dataset", url, "-o", tmp_path / "r.html", "--cache", tmp_path / "cache")
        assert (code, text in err) == (1, True), err
    assert not (tmp_path / "r.html").exists()
    with FaultyServer(shards) as web:
        code, _, err = run("export", store, "--dataset", f"{web.url}/nothing", "-o", tmp_path / "t.csv")
        assert code == 1
        assert "Check the url" in err


@pytest.mark.parametrize("name", ["tars", "mds"])
def test_the_hardest_have_the_labels_and_names_that_the_report_shows(tmp_path, monkeypatch, shards, name):
    store = store_of(tmp_path / "s.zarr", shards / name)
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("export", store, "--hardest", 3, "--dataset", shards / name)
    assert (code, out) == (0, f"3 samples in s.parquet ({tmp_path / 's.parquet'})\n")
    found = pyarrow.parquet.read_table("s.parquet").to_pydict()
    assert found["index"] == [11, 10, 9]
    for label, file in zip(found["label"], found["name"], strict=True):
        assert (shards / "src" / file).is_file()
        assert file.split("/")[0] == label
    assert run("report", store, "--samples", 3, "--dataset", shards / name)[0] == 0
    page = Path("report.html").read_text()
    assert all(file in page for file in found["name"])
    run("export", store, "-o", "all.csv", "--dataset", shards / name)
    assert "label" not in pyarrow.csv.read_csv("all.csv").column_names  # which would take reading all samples


@pytest.mark.parametrize("command", ["export", "report"])
def test_a_folder_that_is_not_there_is_named_before_there_is_work_to_lose(tmp_path, shards, command):
    store = store_of(tmp_path / "s.zarr", shards / "mds")
    code, _, err = run(command, store, "-o", tmp_path / "no/such/x.csv")
    assert code == 1
    assert err.startswith(f"error: {tmp_path}/no/such/x.csv cannot be written: there is no folder {tmp_path}/no/such. ")
    (tmp_path / "x.csv").mkdir()
    assert "is a folder" in run(command, store, "-o", tmp_path / "x.csv")[2]


def test_tars_beside_a_list_of_wids_are_tars(tmp_path, shards):
    folder = tmp_path / "tars"
    folder.mkdir()
    for path in (shards / "tars").glob("*.tar"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "index.json").write_text(json.dumps({"__kind__": "wids-shard-index-v1", "shardlist": []}))
    assert open_shards(str(folder)).ends[-1] == IMAGES
