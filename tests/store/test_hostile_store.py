"""Stores that others made, or a disk damaged: nothing in one is run, leads out of it, hangs or takes much memory."""

import json
import os
import pickle
import resource
import shutil
import socket
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import zarr
from fuzz.run import watched
from numcodecs import zstd
from support.commands import run as command
from support.histories import loader, train
from support.hostile import Bomb

from infobatch_stream import ConfigError, ScoreStore, StoreError
from infobatch_stream.store.header import Header, write_header
from infobatch_stream.store.history import epochs, training
from infobatch_stream.store.location import location, location_on_node


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A store of two epochs with all of a history; not to be changed."""
    path = tmp_path_factory.mktemp("good") / "s.zarr"
    train(loader(path, 2))
    return path


@pytest.fixture
def path(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "s.zarr"))


@contextmanager
def little():
    """Fail where something within takes 60 seconds or 512 MiB."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, old[1]))
    try:
        with watched():
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def trained(path):
    """Go on with a store; what was warned of, or the error."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            train(loader(path, 3, existing="continue", batch_size=500))
        except StoreError as error:
            return str(error)
        return " ".join(str(one.message) for one in said)


def looked_at(path, *names):
    """What the commands say that look at a store: each ends, with a page or an error of one line."""
    told = []
    options = {"export": ["-o", path.with_suffix(".csv")], "simulate": ["--policy", "soft"]}
    for name in names or ("inspect", "simulate"):
        code, out, err = command(name, path, *options.get(name, []))
        assert code in (0, 1), out + err
        assert code == 0 or err.startswith("error: "), out + err
        told.append(err)
    return told


# ---- nothing is run


@pytest.mark.parametrize("hidden", [True, False])
def test_a_pickle_in_the_history_is_never_decoded_whatever_numcodecs_would_do(path, tmp_path, hidden):
    """Up to 0.16.5 it unpickles: an array of objects in format 2, which Zarr reads where zarr.json cannot be read."""
    shutil.rmtree(path / "history")
    (path / "history" / "entries").mkdir(parents=True)
    if hidden:
        (path / "history" / "zarr.json").mkdir()
    (path / "history" / ".zgroup").write_text('{"zarr_format": 2}')
    array = {
        "zarr_format": 2, "shape": [2], "chunks": [2], "dtype": "|O", "compressor": None, "fill_value": None,
        "order": "C", "filters": [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 5}],
    }  # fmt: skip
    (path / "history" / "entries" / ".zarray").write_text(json.dumps(array))
    (path / "history" / "entries" / "0").write_bytes(pickle.dumps([Bomb(tmp_path / "exploded")]))
    assert "remove that folder" in trained(path)
    for told in looked_at(path, "inspect", "simulate", "export"):
        assert "remove that folder, and the history begins anew" in told
    assert not (tmp_path / "exploded").exists()
    assert ScoreStore.open(path).epoch == 3


CHANGES = {
    "a codec of numcodecs": {"codecs": [{"name": "numcodecs.pickle", "configuration": {}}]},
    "no codecs": {"codecs": []},
    "codecs that are none": {"codecs": [1]},
    "another codec": {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "gzip"}]},
    "another order of bytes": {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "zstd"}]},
    "format 2": {"zarr_format": 2},
    "another type": {"data_type": "variable_length_utf8"},
    "a type of the same size": {"data_type": "float64"},
    "a group": {"node_type": "group"},
    "chunks of 16 GiB": {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2**31]}}},
    "chunks of another size": {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [32]}}},
    "chunks of fractions": {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [64.0]}}},
    "another grid": {"chunk_grid": {"name": "rectilinear", "configuration": {"chunk_shape": [64]}}},
    "other names": {"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}}},
    "a transformer": {"storage_transformers": [{"name": "x"}]},
    "another fill": {"fill_value": 7},
    "two dimensions": {"shape": [2, 2]},
    "a negative length": {"shape": [-1]},
    "a length of true": {"shape": [True]},
    "a length of 10^30": {"shape": [10**30]},
    "no length": {"shape": []},
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_array_of_another_form_is_refused_to_who_reads_and_warned_of_to_who_trains(path, name):
    file = path / "history" / "entries" / "zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | CHANGES[name]))
    with little():
        with pytest.raises(StoreError, match=r"cannot be read \(ValueError: .*entries.*remove that folder, and"):
            epochs(path)
        assert "remove that folder" in trained(path)
    assert ScoreStore.open(path).epoch == 3
    shutil.rmtree(path / "history")  # as the error says
    train(loader(path, 4, existing="continue"))
    assert [row.number for row in epochs(path)] == [3]


# ---- no link is followed, nothing hangs, nothing is taken for as large as it says


NAMES = [
    "zarr.json", "scores", "scores/zarr.json", "scores/c", "scores/c/0", "pending", "pending/zarr.json", "pending/c/0",
    "pending/owner.json", "history", "history/zarr.json", "history/entries", "history/entries/zarr.json",
    "history/entries/c", "history/entries/c/0", "history/mean/c/0", "history/histogram/c/0",
    "history/samples/1/zarr.json", "history/samples/1/c/1/0", "history/recorded/zarr.json", "history/recorded/c",
]  # fmt: skip


def outside(path, name):
    """Move ``name`` out of the store, and leave a link."""
    away = path.parent / "away"
    (path / name).rename(away)
    (path / name).symlink_to(away)
    return away


def contents(place):
    files = [place] if place.is_file() else sorted(place.rglob("*"))
    return {file: file.read_bytes() for file in files if file.is_file()}


@pytest.mark.parametrize("name", NAMES)
def test_a_link_inside_a_store_is_not_followed_to_write_nor_to_read(path, name):
    away = outside(path, name)
    before = contents(away)
    with little():
        told = trained(path)
        looked_at(path)
    assert contents(away) == before
    assert "a symbolic link; only the store as a whole may be reached by one" in told
    assert (ScoreStore.open(path, "r").epoch == 3) if name.startswith("history") else (path / name).is_symlink()


@pytest.mark.parametrize("name", ["pending/owner.json", "history", "history/mean/c/1", "history/zarr.json"])
def test_a_link_to_nothing_makes_nothing(path, name):
    away = path.parent / "away"
    shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(away)
    with little():
        trained(path)
        looked_at(path)
    assert not away.exists()


def test_an_owners_file_that_has_another_name_is_not_written_to(path):
    (path / "pending" / "owner.json").unlink()
    letter = path.parent / "letter"
    letter.write_text("dear reader")
    os.link(letter, path / "pending" / "owner.json")
    assert "has other names (hard links), which would be written to; remove it" in trained(path)
    assert letter.read_text() == "dear reader"
    (path / "pending" / "owner.json").unlink()
    assert trained(path) == ""


def pipe(place):
    os.mkfifo(place)


def sock(place):
    with socket.socket(socket.AF_UNIX) as made:
        folder = os.open(place.parent, os.O_RDONLY)
        made.bind(f"/proc/self/fd/{folder}/{place.name}")
        os.close(folder)


def zero(place):
    place.symlink_to("/dev/zero")


def sparse(place):
    with place.open("wb") as file:
        file.truncate(2**43)


INSTEAD = {"a pipe": pipe, "a socket": sock, "a device": zero, "8 TiB of nothing": sparse}


@pytest.mark.parametrize("kind", INSTEAD)
@pytest.mark.parametrize("name", [name for name in NAMES[6:] if "." in name or name.endswith("0")])
def test_what_is_no_file_or_larger_than_one_can_be_is_refused_at_once(path, kind, name):
    shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()
    INSTEAD[kind](path / name)
    with little():
        told = trained(path)
        looked_at(path)
    # What is written in owner.json means nothing.
    assert told or (name, kind) == ("pending/owner.json", "8 TiB of nothing")


def test_what_lies_beside_a_store_is_no_obstacle(path):
    for suffix in ("new", "old", "rank"):
        for kind, make in INSTEAD.items():
            make(path.with_name(f".s.zarr.{suffix}-{kind}"))
    with little():
        assert trained(path) == ""
    shutil.rmtree(path)
    with little():
        assert trained(path) == ""


def test_a_chunk_that_unpacks_to_more_than_a_chunk_is_refused(path):
    (path / "history" / "mean" / "c" / "0").write_bytes(zstd.compress(bytes(2**30)))
    with little(), pytest.raises(StoreError, match="cannot be read"):
        epochs(path)
    (path / "history" / "samples" / "1" / "c" / "0" / "0").write_bytes(b"\x02\x01\x93\x02" + b"\xff\xff\xff\x7f" * 3)
    with little(), pytest.raises(StoreError, match="cannot be read"):
        training(path, 2)  # which is in samples/1


def grown(path, **headers):
    """The metadata of arrays with another length."""
    for name, size in headers.items():
        file = path / "history" / name / "zarr.json"
        found = json.loads(file.read_text())
        found["shape"][0] = size
        file.write_text(json.dumps(found))


def test_a_history_of_a_trillion_epochs_without_files_is_read_at_once(path):
    grown(path, **dict.fromkeys(("entries", "kept", "mean", "recorded"), 2**40))
    with little():
        assert [row.number for row in epochs(path)] == [0, 1]
        assert looked_at(path, "inspect", "simulate", "export") == [""] * 3
        assert trained(path) == ""


def test_a_store_that_says_it_has_a_trillion_epochs_is_refused_by_who_would_show_them(path):
    write_header(path, Header(500, ScoreStore.open(path).fingerprint, 2**40, "ready"))
    with little():
        assert all("epochs; no more than 1,048,576 can be shown" in told for told in looked_at(path))


def test_a_sparse_store_of_8_billion_samples_is_refused_by_who_would_hold_them_in_memory(tmp_path):
    path, size = tmp_path / "s.zarr", 2**33
    ScoreStore.create(path, 2**22)
    for array in ("scores", "pending"):
        file = path / array / "zarr.json"
        found = json.loads(file.read_text())
        found["shape"] = found["chunk_grid"]["configuration"]["chunk_shape"] = [size]
        file.write_text(json.dumps(found))
        from infobatch_stream.store import layout

        with (path / array / "c" / "0").open("r+b") as shard:
            shard.truncate(layout.file_size(size) - len(index := layout._index(size)))
            shard.seek(0, os.SEEK_END)
            shard.write(index)
    write_header(path, Header(size, "", 0, "ready"))
    assert all("samples, and looking at them takes 128.0 GiB of memory" in told for told in looked_at(path))


# ---- where a store is


def test_a_store_that_is_a_link_stays_one_when_it_is_replaced(good, tmp_path):
    real, link = tmp_path / "disk" / "real.zarr", tmp_path / "s.zarr"
    shutil.copytree(good, real)
    link.symlink_to(real)
    state = loader(link, 2, existing="continue").state_dict()
    loader(link, 2).load_state_dict(state)
    assert link.is_symlink()
    run = loader(link, 2, existing="overwrite")
    iter(run)
    assert link.is_symlink()
    assert run.store.path == real
    assert ScoreStore.open(real, "r").epoch == 0
    assert [entry.name for entry in real.parent.iterdir()] == ["real.zarr"]


def test_a_link_to_a_store_that_is_not_there_yet_leads_to_where_it_is_made(tmp_path):
    link = tmp_path / "s.zarr"
    link.symlink_to("disk/real.zarr")
    train(loader(link, 2))
    assert ScoreStore.open(tmp_path / "disk" / "real.zarr", "r").epoch == 2
    link.unlink()
    link.symlink_to(link)
    for make in (lambda: loader(link), lambda: ScoreStore.create(link, 5), lambda: ScoreStore.open(link)):
        with pytest.raises(ConfigError, match="leads in a circle"):
            make()


@pytest.mark.parametrize("url", ["s3://bucket/s.zarr", "gs://b", "hf://x/y", "HTTPS://host/s", "az://c/s", "s3:/b/s"])
def test_a_url_is_no_place_for_a_store(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    for place in (url, Path(url)):
        for make in (loader, lambda place: ScoreStore.create(place, 5), ScoreStore.open):
            with pytest.raises(ConfigError, match=r"is a URL, .* Give a local path. To keep the scores, save"):
                make(place)
        for name in ("inspect", "simulate"):
            assert "is a URL" in command(name, place)[2]
    with pytest.raises(ConfigError, match=r"is a URL.*Give the path alone"):
        loader("file:///tmp/s.zarr")
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_is_the_home_folder_wherever_a_store_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    train(loader("~/s.zarr", 2))
    assert ScoreStore.open("~/s.zarr").path == tmp_path / "s.zarr"
    ScoreStore.create("~/t.zarr", 5)
    for name in ("inspect", "simulate"):
        assert command(name, "~/s.zarr")[0] == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["s.zarr", "t.zarr"]
    with pytest.raises(ConfigError, match=r"For a folder of this name write \./~nobody-of-that-name/s"):
        location("~nobody-of-that-name/s")


def test_the_path_of_a_node_is_resolved_after_its_number_is_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("GROUP_RANK", "3")
    (tmp_path / "s-3.zarr").symlink_to("real.zarr")
    for path in (tmp_path / "s-{node}.zarr", f"{tmp_path}/s-{{node}}.zarr"):
        assert location_on_node(path) == tmp_path / "real.zarr"


@pytest.mark.parametrize("wrong", [None, 3, "", b"s.zarr", "a\0b"], ids=repr)
def test_what_is_no_path_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match="give the path of a folder"):
        location(wrong)


def test_a_relative_path_stays_where_it_was_when_the_working_folder_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = loader("s.zarr", 2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    train(run)
    assert ScoreStore.open(tmp_path / "s.zarr", "r").epoch == 2


def test_the_format_of_a_store_is_not_that_which_zarr_is_set_to(tmp_path):
    with zarr.config.set({"default_zarr_format": 2, "array.order": "F"}):
        train(loader(tmp_path / "s.zarr", 2))
        assert ScoreStore.open(tmp_path / "s.zarr", "r").epoch == 2
        assert len(epochs(tmp_path / "s.zarr")) == 2
        assert command("inspect", tmp_path / "s.zarr")[0] == 0
