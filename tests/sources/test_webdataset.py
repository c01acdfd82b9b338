import io
import os
import pickle
import random
import re
import runpy
import shutil
import sys
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from webdataset.tariterators import group_by_keys, tar_file_expander

from infobatch_stream.errors import ConfigError, DataError, MissingExtraError
from infobatch_stream.formats.tar_index import TarIndex
from infobatch_stream.sources.webdataset import dataset as wds
from infobatch_stream.sources.webdataset.dataset import IndexedWebDataset
from infobatch_stream.sources.webdataset.index_cache import is_fresh, load_index
from infobatch_stream.sources.webdataset.source import WdsSource

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
# webdataset leaves the shard that it iterates over open
leaves_files_open = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def other(name, kind):
    """A member that is no regular file."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = "a.jpg" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    return info


def write_tar(path, members, form=tarfile.USTAR_FORMAT):
    """``members``: names (payload made from name and position), (name, bytes) or TarInfo."""
    with tarfile.open(path, "w", format=form) as tar:
        for position, member in enumerate(members):
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = (
                (member, f"{position}:{member}".encode("utf-8", "surrogateescape"))
                if isinstance(member, str)
                else member
            )
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def by_webdataset(path):
    """The raw samples of one shard as webdataset groups them."""
    with Path(path).open("rb") as file:
        return list(group_by_keys(tar_file_expander([{"url": path, "stream": file, "local_path": path}])))


def by_index(urls, **options):
    return list(IndexedWebDataset(urls, **options))


def same(one, two):
    """Equal, dicts also in the order of their keys."""
    assert [list(sample.items()) for sample in one] == [list(sample.items()) for sample in two]


def write_shards(folder, shards=3, samples=4, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write_tar(
            folder / f"s-{s:03}.tar",
            [
                member
                for i in range(start, start + samples)
                for member in (
                    (f"{s}/{i}.txt", f"text {s} {i}".encode()),
                    (f"{s}/{i}.cls", b"%d" % (s * samples + i)),
                )
            ],
        )
        for s in range(shards)
    ]


# ---- grouping


GROUPING = {
    "plain": ["a.jpg", "a.cls", "b.jpg", "b.cls"],
    "several dots": ["a.seg.png", "a.rgb.png", "a.b.c.d", "b..x", "c.", "d.tar.gz"],
    "folders": [other("x", tarfile.DIRTYPE), "x/a.jpg", "x/a.cls", "y/a.jpg", "y/z/a.jpg", "./a.jpg", "/abs/a.jpg"],
    "folders with dots": ["v1.0/a.jpg", "v1.0/a.cls", "v1.0/b", "v2.0.1/a.x.y", "w.d/c.d/e"],
    "ustar prefix": [
        f"{'d' * 60}/{'e' * 60}/a.jpg",
        f"{'d' * 60}/{'e' * 60}/a.cls",
        f"{'d' * 60}/{'e' * 60}/b.jpg",
    ],
    "long names": [f"{'n' * 200}.jpg", f"{'n' * 200}.cls", f"{'n' * 300}/{'m' * 150}.jpg", "a.jpg"],
    "dotfiles": [".a.jpg", "b.jpg", ".hidden", "b.cls", "c/.x", "..", "c/..y.z"],
    "repeated keys": ["a.jpg", "b.jpg", "a.jpg", "a.cls", "b.jpg"],
    "members apart": ["a.jpg", "README", "a.cls", ".skip", "a.txt", "b.jpg"],
    "upper case": ["A.JPG", "A.Cls", "a.JPG", "b.ÄÖ", "b.x"],
    "irregular between": [
        "a.jpg",
        other("a.lnk", tarfile.SYMTYPE),
        other("b.jpg", tarfile.LNKTYPE),
        other("c.jpg", tarfile.FIFOTYPE),
        other("d.jpg", tarfile.DIRTYPE),
        other("e.jpg", tarfile.CHRTYPE),
        other("f.jpg", tarfile.CONTTYPE),
        other("g.jpg", b"Z"),
        "a.cls",
    ],
    "meta": [
        "__meta__",
        "__a__.json",
        "a.jpg",
        "__x__/a.jpg",
        "__y__",
        "a.cls",
        "__z.jpg",
        "k/__m__/x.jpg",
        "__q__b.c",
    ],
    "no extension": ["README", "a.jpg", "LICENSE", "d/NOTE", "b.jpg"],
    "unicode": ["Ünï/çö.jpg", "Ünï/çö.cls", "日本.語", "\udcff\udcfe.jpg", "a\nb.jpg", "a b.c d"],
    "empty payloads": [("a.jpg", b""), ("a.cls", b""), ("b.jpg", b""), ("b.cls", b"1")],
    "marked bad": ["a.jpg", "a.__bad__", "b.jpg", ("b.__bad__", b""), "c.jpg"],
    "far apart": ["a.jpg", ("FILLER", bytes(2**21)), "a.cls", ("b.big", b"x" * 2**21), "b.cls"],
    "nothing": [],
    "no sample": ["README", "__meta__"],
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", GROUPING)
def test_grouping_is_webdatasets(tmp_path, case, form):
    try:
        path = write_tar(tmp_path / "s.tar", [*GROUPING[case]], FORMATS[form])
    except ValueError:
        assert (case, form) == ("long names", "ustar")  # which cannot hold them
        return
    # A sample in front, in a shard of its own, since a dataset without any is refused.
    first = write_tar(tmp_path / "first.tar", ["0.x"])
    expected = by_webdataset(path)
    assert expected or case in ("nothing", "no sample")
    same(by_index([first, path]), by_webdataset(first) + expected)


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_grouping_of_any_names_is_webdatasets_and_so_is_refusal(tmp_path_factory, data):
    word = st.sampled_from(["a", "b", ".", ".", "/", "_", "__", "A", "x.", "é"])
    names = data.draw(st.lists(st.lists(word, min_size=1, max_size=6).map("".join), min_size=1, max_size=8))
    form = data.draw(st.sampled_from(list(FORMATS.values())))
    path = write_tar(tmp_path_factory.mktemp("any") / "s.tar", names, form)
    try:
        expected = by_webdataset(path)
    except ValueError as error:
        with pytest.raises(DataError, match=re.escape(f"{path}: {error.args[0]}")):  # which names the member
            TarIndex.build(path)
        return
    index = TarIndex.build(path)
    assert [index.key(row) for row in range(len(index))] == [sample["__key__"] for sample in expected]
    if expected:
        same(by_index(path), expected)


@leaves_files_open
def test_shards_of_webdatasets_writers_give_its_own_samples_in_its_order(tmp_path):
    rng = random.Random(0)
    with webdataset.ShardWriter(f"{tmp_path}/w-%03d.tar", maxcount=7, verbose=0) as writer:
        for i in range(30):
            writer.write({"__key__": f"d{i % 3}/{i:04}", "bin": rng.randbytes(rng.randrange(3000)), "cls": i})
    with webdataset.TarWriter(f"{tmp_path}/w-005.tar") as writer:
        writer.write({"__key__": "x" * 300, "txt": "long", "json": {"a": 1}})
    urls = f"{tmp_path}/w-{{000..005}}.tar"
    expected = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(expected) == 31
    same(by_index(urls), expected)
    same(
        by_index([f"file:{tmp_path}/w-000.tar"]),
        webdataset.WebDataset([f"file:{tmp_path}/w-000.tar"], shardshuffle=False),
    )


def test_a_pax_header_can_give_a_size_and_a_global_header_a_name(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "global"}) as tar:
        for name in ("a.jpg", "a.cls"):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = 5, {"size": "5", "mtime": "1.5"}
            tar.addfile(info, io.BytesIO(b"12345"))
    same(by_index(path), by_webdataset(str(path)))


# ---- what cannot be indexed


def test_a_sparse_member_is_refused(tmp_path):
    path = write_tar(tmp_path / "s.tar", ["a.jpg", other("a.raw", tarfile.GNUTYPE_SPARSE)])
    with pytest.raises(DataError, match=r"s\.tar .*member 'a.raw' is sparse"):
        IndexedWebDataset(path)


def test_a_tar_cut_anywhere_is_refused_or_gives_what_webdataset_gives(tmp_path):
    whole = Path(
        write_tar(tmp_path / "whole.tar", [("a.jpg", b"x" * 700), "a.cls", ("b.jpg", b"y" * 512)])
    ).read_bytes()
    end = len(whole.rstrip(b"\0"))
    accepted = []
    for cut in [0, 1, *range(100, end + 1200, 100), *range(512, end + 1200, 512)]:
        path = tmp_path / f"{cut}.tar"
        path.write_bytes(whole[:cut])
        try:
            index = TarIndex.build(str(path))
        except DataError:
            continue
        else:
            accepted.append(cut)
            assert [index.key(row) for row in range(len(index))] == [s["__key__"] for s in by_webdataset(str(path))]
    assert {cut for cut in accepted if cut < end} == {1536, 2560}  # right behind a member
    assert end + 512 in accepted or end in accepted


def test_a_payload_that_ends_beyond_the_file_is_refused_by_its_member(tmp_path):
    path = write_tar(tmp_path / "s.tar", ["a.jpg", ("b.jpg", b"x" * 2000)])
    os.truncate(path, 3000)
    with pytest.raises(DataError, match=r"s\.tar \(3,000 bytes\) .*member 'b.jpg' ends beyond the end"):
        IndexedWebDataset(path)


def test_a_damaged_header_behind_good_ones_is_refused(tmp_path):
    path = Path(write_tar(tmp_path / "s.tar", ["a.jpg", "b.jpg"]))
    data = bytearray(path.read_bytes())
    data[1024 + 20] ^= 255
    path.write_bytes(data)
    with pytest.raises(DataError, match="no member header at byte 1,024"):
        IndexedWebDataset(path)


@pytest.mark.parametrize("content", [b"", b"no tar " * 300, b"\x1f\x8b" + bytes(600), b"\x28\xb5\x2f\xfd" + bytes(600)])
def test_a_file_that_is_no_tar_is_refused_by_name(tmp_path, content):
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"s\.tar.*(no tar that can be read|compressed).*(Copy|decompress)"):
        IndexedWebDataset(path)


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_refused_with_a_remedy_whatever_its_name(tmp_path, mode):
    for name in ("s.tar", f"s.tar.{mode}", "s.tgz"):
        with tarfile.open(tmp_path / name, f"w:{mode}") as tar:
            tar.addfile(tarfile.TarInfo("a.jpg"))
        with pytest.raises(DataError, match=r"is compressed.*StreamedWebDataset.*decompress it"):
            IndexedWebDataset(tmp_path / name)


@pytest.mark.parametrize("url", ["pipe:cat s-{0..1}.tar", "pipe:awk '{print"])
def test_the_output_of_a_command_is_refused_with_a_remedy(url):
    with pytest.raises(DataError, match=r"output of a command.*StreamedWebDataset.*write it to a tar file"):
        IndexedWebDataset(url)


@pytest.mark.parametrize("url", ["nothing://host/s-{0..1}.tar", "ais://host/s.tar"])
def test_a_protocol_that_nobody_knows_is_refused_with_the_extra(url):
    with pytest.raises(MissingExtraError, match=rf"{url[:5]}.*infobatch-stream\[remote\]"):
        IndexedWebDataset(url)


def test_a_url_without_a_server_is_refused():
    with pytest.raises(DataError, match=r"'s3:bucket/s\.tar' names no server.*\./name"):
        IndexedWebDataset("s3:bucket/s.tar")


def test_missing_shards_empty_lists_and_datasets_without_samples_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "none.tar", ["README"])
    for urls, message in [
        (tmp_path / "gone.tar", r"gone\.tar cannot be read \(No such file"),
        (f"{tmp_path}/gone-{{0..3}}.tar", r"gone-0\.tar cannot be read"),
        (f"{tmp_path}/gone-*.tar", "There is no shard at .*gone"),
        (tmp_path / "empty", "There is no shard at .*empty"),
        (tmp_path / "none.tar", "no sample in 1 shard"),
    ]:
        with pytest.raises(DataError, match=message):
            IndexedWebDataset(urls)
    for urls, message in [([], "urls is empty"), ([1], "found 1"), (b"s.tar", "found"), ("s-{0..1.tar", "braces")]:
        with pytest.raises(ConfigError, match=message):
            IndexedWebDataset(urls)


# ---- the index file


def test_an_index_is_kept_beside_the_shard_and_used_until_size_or_time_change(tmp_path):
    path = write_shards(tmp_path, shards=1)[0]
    kept = Path(f"{path}.index.npz")
    assert not is_fresh(path)
    assert len(load_index(path)) == 4
    assert is_fresh(path)
    written = kept.stat().st_mtime_ns
    assert len(load_index(path)) == 4
    assert kept.stat().st_mtime_ns == written
    load_index(path, rebuild=True)
    assert kept.stat().st_mtime_ns != written
    write_shards(tmp_path, shards=1, samples=90)
    assert not is_fresh(path)
    assert len(by_index(path)) == 90
    assert is_fresh(path)
    os.utime(path, ns=(1, 1))
    assert not is_fresh(path)
    assert len(by_index(path)) == 90
    assert is_fresh(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s-000.tar", "s-000.tar.index.npz"]
    with np.load(kept, allow_pickle=False) as arrays:
        assert arrays["header"].tolist()[3:] == [90, 180, -1]


class Bomb:
    """Makes the file it is told when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_damaged_foreign_or_newer_index_is_rebuilt_and_never_unpickled(tmp_path):
    path = write_shards(tmp_path, shards=1)[0]
    kept = Path(f"{path}.index.npz")
    right = load_index(path)
    good = kept.read_bytes()
    with np.load(kept) as arrays:
        parts = dict(arrays)
    bomb = np.array([Bomb(tmp_path / "exploded")], dtype=object)

    def stored(**changes):
        data = io.BytesIO()
        np.savez(data, **{name: value for name, value in (parts | changes).items() if value is not None})
        return data.getvalue()

    packed, pickled, plain = io.BytesIO(), pickle.dumps(bomb), io.BytesIO()
    np.savez_compressed(packed, **parts)
    np.save(plain, parts["offset"])
    header, offset, bounds = parts["header"], parts["offset"], parts["sample_bounds"]
    bad = {
        "cut": good[: len(good) // 2],
        "flipped": good[:200] + bytes([good[200] ^ 1]) + good[201:],
        "empty": b"",
        "noise": random.Random(0).randbytes(3000),
        "pickle": pickled,
        "npy": plain.getvalue(),
        "packed": packed.getvalue(),
        "object": stored(offset=bomb),
        "newer": stored(header=header + np.array([1, 0, 0, 0, 0, 0])),
        "version 1": stored(header=np.array([1, *header[1:5]])),
        "checksum": stored(header=header + np.array([0, 0, 0, 0, 0, 2**33])),
        "other shard": stored(header=header + np.array([0, 512, 0, 0, 0, 0])),
        "count": stored(header=header + np.array([0, 0, 0, 1, 0, 0])),
        "missing": stored(key_text=None),
        "dtype": stored(offset=offset.astype(np.float64)),
        "order": stored(offset=offset.astype(">i8")),
        "shape": stored(offset=offset[:, None]),
        "scalar": stored(offset=offset[0]),
        "short": stored(length=parts["length"][:-1]),
        "beyond": stored(offset=offset + header[1]),
        "negative": stored(offset=offset - header[1]),
        "overflow": stored(length=parts["length"] + (2**63 - 2**10)),
        "overlap": stored(offset=offset[::-1].copy()),
        "bounds": stored(sample_bounds=bounds[::-1].copy()),
        "bounds end": stored(sample_bounds=bounds + 1),
        "keys": stored(key_bounds=parts["key_bounds"] * 2),
        "codes": stored(extension=parts["extension"] + 1),
        "codes below": stored(extension=parts["extension"] - 1),
        "huge": stored(more=np.zeros(2**17)),
    }
    for name, content in bad.items():
        kept.write_bytes(content)
        assert not is_fresh(path), name
        index = load_index(path)
        assert is_fresh(path), name
        assert [index.members(row) for row in range(4)] == [right.members(row) for row in range(4)], name
        assert len(by_index(path)) == 4
    assert not (tmp_path / "exploded").exists()


def test_where_the_folder_takes_no_index_the_cache_folder_does(tmp_path, monkeypatch):
    # Folders that not even root can write this name into: the name is taken by a folder, or too long.
    taken = write_shards(tmp_path / "a", shards=1)[0]
    Path(f"{taken}.index.npz").mkdir()
    too_long = write_tar(tmp_path / f"{'n' * 248}.tar", ["a.jpg"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for number, path in enumerate([taken, too_long], 1):
        same(by_index(path), by_webdataset(path))
        assert is_fresh(path)
        assert len(list((tmp_path / "xdg/infobatch-stream").iterdir())) == number
        same(by_index(path, cache_dir=tmp_path / "mine"), by_webdataset(path))
        assert len(list((tmp_path / "mine").iterdir())) == number
    # Shards of one name in two folders do not share an index.
    namesake = write_shards(tmp_path / "b", shards=1, samples=7)[0]
    Path(f"{namesake}.index.npz").mkdir()
    assert (len(load_index(taken)), len(load_index(namesake))) == (4, 7)


def test_where_nothing_can_be_written_the_error_names_both_places(tmp_path):
    path = write_shards(tmp_path, shards=1)[0]
    Path(f"{path}.index.npz").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"s-000\.tar\.index\.npz .* and .*file/sub/.*cache_dir="):
        IndexedWebDataset(path, cache_dir=tmp_path / "file" / "sub")


# ---- the dataset


def test_urls_may_be_braces_lists_folders_globs_paths_and_file_urls(tmp_path):
    paths = write_shards(tmp_path / "d", shards=3)
    (tmp_path / "d" / "note.txt").touch()
    for urls in [
        f"{tmp_path}/d/s-{{000..002}}.tar",
        paths,
        tuple(Path(path) for path in paths),
        iter(paths),
        [f"{tmp_path}/d/s-{{000..001}}.tar", paths[2]],
        tmp_path / "d",
        f"{tmp_path}/d/",
        f"{tmp_path}/d/s-*.tar",
        f"{tmp_path}/d/s-00[0-2].tar",
    ]:
        dataset = IndexedWebDataset(urls)
        assert dataset.urls == paths
        assert dataset.shard_sizes.tolist() == [4, 4, 4]
    assert IndexedWebDataset([paths[2], paths[0]])[0]["__key__"] == "2/0"
    url = f"file:{paths[1]}"
    sample = IndexedWebDataset(url)[0]
    assert (sample["__url__"], sample["__local_path__"]) == (url, paths[1])


def test_it_is_indexed_like_a_list(tmp_path):
    write_shards(tmp_path, shards=3, samples=5)
    empty = write_tar(tmp_path / "s-0005.tar", ["README"])
    dataset = IndexedWebDataset(tmp_path)
    listed = list(dataset)
    assert dataset.shard_sizes.tolist() == [5, 0, 5, 5]
    assert empty in dataset.urls
    assert len(dataset) == len(listed) == 15
    for index in range(-15, 15):
        assert dataset[index] == dataset[np.int64(index)] == listed[index]
    for index in (15, -16, 2**40):
        with pytest.raises(IndexError, match="dataset of 15"):
            dataset[index]
    with pytest.raises(TypeError):
        dataset[0:2]


def test_samples_read_are_independent(tmp_path):
    dataset = IndexedWebDataset(write_shards(tmp_path))
    dataset[0].clear()
    assert dataset[0]["txt"] == b"text 0 0"


def test_a_shard_that_changes_after_opening_is_noticed(tmp_path):
    paths = write_shards(tmp_path, shards=5)
    dataset = IndexedWebDataset(paths)
    assert dataset[0]["txt"] == b"text 0 0"
    os.truncate(paths[0], 700)
    with pytest.raises(DataError, match=r"s-000\.tar was cut short after it was indexed: .* bytes expected at"):
        dataset[3]
    os.truncate(paths[1], 700)
    with pytest.raises(DataError, match=r"s-001\.tar"):
        dataset[4]
    Path(paths[2]).unlink()
    with pytest.raises(DataError, match=r"s-002\.tar"):
        dataset[8]
    write_shards(tmp_path, samples=5)
    with pytest.raises(DataError, match=r"s-002\.tar changed"):
        dataset[8]
    assert dataset[19]["txt"] == b"text 4 3"


@pytest.mark.parametrize("evicted", ["_file", "_index"])
def test_an_index_and_an_open_file_of_different_times_are_never_used_together(tmp_path, evicted):
    path = Path(write_shards(tmp_path, shards=1)[0])
    dataset = IndexedWebDataset(path)
    assert dataset[0]["txt"] == b"text 0 0"
    path.rename(tmp_path / "old")
    write_shards(tmp_path, shards=1, start=5)
    os.utime(path, ns=(1, 1))
    getattr(dataset._shards, evicted).cache_clear()  # as happens with more shards than are kept open
    with pytest.raises(DataError, match="changed"):
        dataset[0]


def test_what_lies_far_between_the_members_of_a_sample_is_not_read(tmp_path):
    path = tmp_path / "s.tar"
    with path.open("wb") as file:
        for name, size in [("a.jpg", 512), ("FILLER", 2**28), ("a.cls", 512)]:
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf())
            file.write(name.encode())
            file.seek(size - len(name), os.SEEK_CUR)
        file.write(bytes(1024))
    dataset = IndexedWebDataset(path)
    tracemalloc.start()
    try:
        sample = dataset[0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (sample["jpg"][:5], sample["cls"][:5]) == (b"a.jpg", b"a.cls")
    assert peak < 2**20


def test_many_shards_and_threads_share_few_open_files(tmp_path):
    paths = write_shards(tmp_path, shards=140, samples=1)
    dataset = IndexedWebDataset(paths)
    before = len(list(Path("/proc/self/fd").iterdir()))
    order = [random.Random(0).randrange(140) for _ in range(4000)]
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda i: dataset[i]["txt"], order))
    assert texts == [f"text {i} 0".encode() for i in order]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 128
    dataset = None
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def label(data):
    return int(data)


def text(data):
    return data.decode()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 counts torch's idle threads
@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_of_a_plain_dataloader_read_the_right_samples(tmp_path, method, workers):
    dataset = IndexedWebDataset(write_shards(tmp_path)).to_tuple("txt", "cls").map_tuple(text, label)
    expected = list(dataset)  # and the parent holds open files when it forks
    loader = DataLoader(dataset, batch_size=5, num_workers=workers, multiprocessing_context=method)
    batches = list(loader)
    assert [pair for texts, labels in batches for pair in zip(texts, labels.tolist(), strict=True)] == expected
    assert [label for _, label in expected] == list(range(12))
    assert list(dataset) == expected


def test_a_pickle_holds_no_samples_and_reads_the_same(tmp_path):
    dataset = IndexedWebDataset(write_shards(tmp_path, samples=50)).map_dict(cls=label)
    expected = list(dataset)
    data = pickle.dumps(dataset)
    assert len(data) < 3000
    same(list(pickle.loads(data)), expected)


def test_without_webdataset_the_module_imports_and_the_dataset_names_the_extra(tmp_path, monkeypatch):
    paths = write_shards(tmp_path)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    module = runpy.run_path(wds.__file__)
    with pytest.raises(MissingExtraError, match=r"infobatch-stream\[wds\]"):
        module["IndexedWebDataset"](paths)


# ---- stages


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    with webdataset.ShardWriter(f"{folder}/i-%03d.tar", maxcount=3, verbose=0) as writer:
        for i in range(7):
            pixels = rng.integers(0, 256, (4, 5, 3), np.uint8)
            writer.write(
                {"__key__": f"{i:03}", "left.png": pixels, "png": pixels, "cls": i, "json": {"i": i}, "txt": "t"}
            )
    return f"{folder}/i-{{000..002}}.tar"


def plain(value):
    """``value`` with images as arrays of bytes, so that == compares it."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [plain(entry) for entry in value]
    return (np.asarray(value).dtype, np.asarray(value).tobytes()) if hasattr(value, "__array_interface__") else value


PIPELINES = {
    "raw": lambda d: d,
    "decode": lambda d: d.decode(),
    "pil": lambda d: d.decode("pil"),
    "rgb8": lambda d: d.decode("rgb8", only=["png", "cls"]),
    "partial": lambda d: d.decode("pil", partial=True).rename(image="left.png;png", keep=False),
    "to_tuple": lambda d: d.decode("pil").to_tuple("jpg;png", "cls"),
    "one string": lambda d: d.to_tuple("png cls"),
    "tuple of missing": lambda d: d.to_tuple("gone", "cls", missing_is_error=False),
    "map": lambda d: d.map(lambda s: {"n": len(s["png"])}),
    "map twice": lambda d: d.decode().map(lambda s: s["json"]).map(lambda s: (s["i"], s["__key__"])),
    "map_dict": lambda d: d.map_dict(cls=int, txt=text),
    "map_tuple": lambda d: d.to_tuple("png", "cls", "txt").map_tuple(len, None, text),
    "rename": lambda d: d.rename(image="jpg;png", target="cls"),
    "rename_keys": lambda d: d.rename_keys(("image", "left.png"), target="cls", keep_unselected=True),
    "extract_keys": lambda d: d.extract_keys("left.png", "*.cls;*.index"),
    "xdecode": lambda d: d.xdecode(png=lambda stream: len(stream.read()), must_decode=False),
}


@leaves_files_open
@pytest.mark.parametrize("name", PIPELINES)
def test_stages_do_what_webdatasets_do(images, name):
    expected = list(PIPELINES[name](webdataset.WebDataset(images, shardshuffle=False)))
    dataset = PIPELINES[name](IndexedWebDataset(images))
    assert type(dataset) is IndexedWebDataset
    assert len(expected) == len(dataset) == 7
    assert plain([dataset[i] for i in range(7)]) == plain(expected)
    assert isinstance(dataset[0], type(expected[0]))


class Shouting(IndexedWebDataset):
    def __getitem__(self, index):
        return super().__getitem__(index)["txt"].upper()


def test_a_stage_gives_a_new_dataset_of_the_same_class_and_leaves_the_old_one(tmp_path):
    raw = Shouting(write_shards(tmp_path))
    cooked = raw.map_dict(txt=text)
    assert type(cooked) is Shouting
    assert (raw[0], cooked[0]) == (b"TEXT 0 0", "TEXT 0 0")


def test_a_stage_that_drops_a_sample_is_an_error_that_names_shard_and_key(tmp_path):
    dataset = IndexedWebDataset(write_shards(tmp_path))
    fragile = dataset.map(lambda s: 1 / int(s["cls"]), handler=webdataset.ignore_and_continue)
    for dropping, index, where in [
        (dataset.map(lambda _: None), 5, r"sample 5 \(key '1/1' in .*s-001\.tar"),
        (fragile, 0, r"sample 0 \(key '0/0' in .*s-000\.tar"),
    ]:
        with pytest.raises(DataError, match=where):
            dropping[index]
    assert fragile[1] == 1


def test_what_the_users_function_raises_passes_unchanged(tmp_path):
    dataset = IndexedWebDataset(write_shards(tmp_path))
    with pytest.raises(KeyError, match="gone"):
        dataset.map(lambda sample: sample["gone"])[0]
    with pytest.raises(ValueError, match="didn't find"):
        dataset.to_tuple("gone")[0]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("shuffle", "shuffle_window="),
        ("batched", "collate_fn="),
        ("listed", "collate_fn="),
        ("unbatched", "leave it out"),
        ("unlisted", "leave it out"),
        ("select", "Subset"),
        ("slice", "Subset"),
        ("rsample", "policy"),
        ("compose", "map"),
        ("append", "map"),
        ("repeat", "epochs="),
        ("with_epoch", "epochs="),
        ("with_length", "epochs="),
        ("mcached", "leave it out"),
        ("lmdb_cached", "leave it out"),
        ("log_keys", "map"),
    ],
)
def test_stages_for_streams_are_refused_with_advice(images, name, advice):
    dataset = IndexedWebDataset(images)
    with pytest.raises(ConfigError, match=rf"no {name}\(\).*{advice}"):
        getattr(dataset, name)(100, anything=1)


def test_every_stage_of_webdataset_is_there_or_refused():
    stages = {name for name in vars(webdataset.FluidInterface) if not name.startswith("_")}
    assert stages - set(dir(IndexedWebDataset)) == set()


# ---- the source


def test_the_source_reads_through_the_datasets_own_getitem(tmp_path):
    source = WdsSource(Shouting(write_shards(tmp_path, samples=2)))
    assert source.num_samples == 6
    assert source.shard_sizes.tolist() == [2, 2, 2]
    assert source.pool(0) is None
    assert source.read(5) == b"TEXT 2 1"
    assert source.read_many([3, 0, 3]) == [b"TEXT 1 1", b"TEXT 0 0", b"TEXT 1 1"]
    with pytest.raises(IndexError):
        source.read_many([0, 6])


def test_the_fingerprint_knows_shards_and_sizes_but_no_folder(tmp_path):
    paths = write_shards(tmp_path / "a")
    mark = WdsSource(IndexedWebDataset(paths)).fingerprint
    assert mark.startswith("wds:")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    same_shards = [tmp_path / "b" / Path(path).name for path in paths]
    assert WdsSource(IndexedWebDataset(same_shards).to_tuple("cls")).fingerprint == mark
    assert WdsSource(IndexedWebDataset(paths[::-1])).fingerprint != mark
    assert WdsSource(IndexedWebDataset(paths[:2])).fingerprint != mark
    write_shards(tmp_path / "a", samples=3)
    assert WdsSource(IndexedWebDataset(paths)).fingerprint != mark


# ---- large members, which are copied from a map


def write_large(path):
    with tarfile.open(path, "w") as tar:
        for i in range(4):
            for name, data in ((f"{i}.bin", bytes([i]) * 100_000), (f"{i}.cls", b"%d" % i)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_large_members_are_read(tmp_path):
    write_large(tmp_path / "s.tar")
    dataset = IndexedWebDataset(tmp_path / "s.tar")
    for _ in range(2):
        assert [(sample["bin"], sample["cls"]) for sample in dataset] == [
            (bytes([i]) * 100_000, b"%d" % i) for i in range(4)
        ]
    assert all(type(sample["bin"]) is bytes for sample in dataset)


def test_a_shard_of_large_members_that_is_cut_short_is_named(tmp_path):
    write_large(tmp_path / "s.tar")
    dataset = IndexedWebDataset(tmp_path / "s.tar")
    assert dataset[3]["cls"] == b"3"
    os.truncate(tmp_path / "s.tar", 250_000)
    assert dataset[1]["cls"] == b"1"
    with pytest.raises(DataError, match=r"s\.tar was cut short after it was indexed"):
        dataset[2]


def test_members_on_the_disk_are_asked_for_before_the_first_is_read(tmp_path, monkeypatch):
    write_large(tmp_path / "s.tar")
    source = WdsSource(IndexedWebDataset(tmp_path / "s.tar"))
    expected = source.read_many([2, 0])
    handle = os.open(tmp_path / "s.tar", os.O_RDONLY)
    os.fsync(handle)
    asked, advise = [], os.posix_fadvise
    del source  # its map would keep the pages
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)
    monkeypatch.setattr(
        os, "posix_fadvise", lambda *at: (at[3] == os.POSIX_FADV_WILLNEED and asked.append(at[1:3]), advise(*at))
    )
    source = WdsSource(IndexedWebDataset(tmp_path / "s.tar"))
    if source.dataset._shards._opened(0)[2]._is_in_memory(0, 1):
        pytest.skip("this file system has no other place than memory")
    assert source.read_many([2, 0]) == expected
    assert len(asked) == 2
    assert source.read_many([2, 0]) == expected
    assert len(asked) == 2


def test_a_subclass_may_stand_in_for_a_shard_that_is_gone(tmp_path):
    class Tolerant(IndexedWebDataset):
        def __getitem__(self, index):
            try:
                return super().__getitem__(index)
            except DataError:
                return None

    write_large(tmp_path / "a.tar")
    write_large(tmp_path / "b.tar")
    source = WdsSource(Tolerant(tmp_path))
    (tmp_path / "a.tar").unlink()
    gone, found = source.read_many([0, 5])
    assert gone is None
    assert found["cls"] == b"1"


def test_what_is_left_of_a_shard_that_was_cut_can_be_read_before_it_was_mapped(tmp_path):
    write_large(tmp_path / "s.tar")
    dataset = IndexedWebDataset(tmp_path / "s.tar")
    assert dataset._shards._opened(0)[2].size > 250_000
    os.truncate(tmp_path / "s.tar", 250_000)
    assert dataset[1]["cls"] == b"1"


def test_tars_with_relative_paths_are_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tars").mkdir()
    write_shards(tmp_path / "tars")
    dataset = IndexedWebDataset("tars/*.tar")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    sample = dataset[0]
    assert sample["__local_path__"].startswith("tars/")  # as it was given
    assert len(pickle.loads(pickle.dumps(dataset))) == len(dataset)
    assert pickle.loads(pickle.dumps(dataset))[0] == sample
