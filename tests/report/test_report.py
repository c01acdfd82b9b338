"""The page that ``infobatch-stream report`` makes, of real stores and shards."""

import io
import json
import pickle
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from streaming import MDSWriter, StreamingDataset
from support.commands import run
from support.ddp.data import write_mds, write_wds
from support.histories import loader, train
from support.reported import HOSTILE, write_tars

from benchmarks.report_page import make_store
from infobatch_stream import ConfigError, DataError, IndexedWebDataset, InfoBatchLoader, ScoreStore, StoreError
from infobatch_stream.report import snapshot
from infobatch_stream.report.dataset import open_shards
from infobatch_stream.report.page import build, write
from infobatch_stream.report.snapshot import Snapshot
from infobatch_stream.sources import open_source
from infobatch_stream.store.history import Epoch, History

pytestmark = pytest.mark.usefixtures("no_stale_shared_memory", "few_open_files")


class Page(HTMLParser):
    """A page taken apart. cards: sample -> (attributes of its pictures, text), of the first card of each."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.text = [], [], [], []
        self.cards, self.card = {}, None
        self.feed(text)

    def handle_starttag(self, tag, pairs):
        attributes = dict(pairs)
        self.tags.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "a":
            self.links.append(attributes["href"])
        if tag == "article":
            self.card = ([], [])
            self.cards.setdefault(int(attributes["data-sample"]), self.card)
        if tag == "img" and self.card:
            self.card[0].append(attributes)

    def handle_endtag(self, tag):
        if tag == "article":
            self.card = None

    def handle_data(self, data):
        self.text.append(data)
        if self.card:
            self.card[1].append(data)

    def all_text(self):
        return " ".join(" ".join(self.text).split())

    def card_text(self, sample):
        return " ".join(" ".join(self.cards[sample][1]).split())


def png(shade, mode="L", size=(20, 12)):
    stream = io.BytesIO()
    Image.new(mode, size, shade).save(stream, "PNG")
    return stream.getvalue()


def store_of(path, shards, scores, **options):
    found = open_shards(str(shards))
    ScoreStore.create(path, found.ends[-1], found.fingerprint, scores=np.array(scores, np.float32), epoch=3, **options)
    return path


# The samples -----------------------------------------------------------------------------------------------------


def test_a_report_of_a_run_on_mds_shows_its_samples_with_shard_row_label_and_score(tmp_path):
    with MDSWriter(out=str(tmp_path / "mds"), columns={"image": "png", "label": "int"}, size_limit=2000) as out:
        for i in range(40):
            out.write({"image": Image.new("L", (20, 12), 6 * i), "label": i % 2})
    (tmp_path / "mds" / "classes.json").write_text(json.dumps(["left", "right"]))
    dataset = StreamingDataset(local=str(tmp_path / "mds"), batch_size=8)
    with InfoBatchLoader(
        dataset, tmp_path / "scores.zarr", batch_size=8, epochs=5, history=True, collate_fn=lambda samples: samples
    ) as loader:
        for _ in range(5):
            for _, picks in loader:
                loader.update((picks.index + 1).float() / 10, picks)
    page = Page(build(tmp_path / "scores.zarr", dataset=str(tmp_path / "mds"), count=5))
    assert [heading for heading in ("Hardest", "Easiest", "Most unstable", "Never learned") if heading in page.text]
    assert set(page.cards) >= {0, 1, 2, 3, 4, 35, 36, 37, 38, 39}
    (picture,), _ = page.cards[39]
    assert picture["src"].startswith("data:image/webp;base64,")
    assert (picture["width"], picture["height"]) == ("20", "12")
    found = open_shards(str(tmp_path / "mds"))
    row = 39 - found.ends[-2]
    assert f"score 4 #39 right {found.names[-1]} row {row} trained 5 times, last in epoch 4" in page.card_text(39)
    assert "#0 left shard.00000.mds row 0" in page.card_text(0)


def test_a_report_of_a_run_on_tars_shows_texts_and_keys(tmp_path):
    texts = [f"text number {i}" for i in range(6)]
    shards = write_tars(
        tmp_path / "tars", [(f"k{i}", {"txt": text.encode(), "cls": b"%d" % i}) for i, text in enumerate(texts)]
    )
    store = store_of(tmp_path / "scores.zarr", shards, [3, 1, 4, 1, 5, 9])
    page = Page(build(store, dataset=str(shards / "*.tar"), count=3))
    assert "text number 5 score 9 #5 5 a.tar row 5 key k5" in page.card_text(5)


def test_samples_of_a_gallery_are_grouped_by_their_label(tmp_path):
    shards = write_tars(tmp_path / "tars", [(f"k{i}", {"txt": b"x", "cls": b"ab"[i % 2 :][:1]}) for i in range(6)])
    page = Page(build(store_of(tmp_path / "scores.zarr", shards, range(6)), dataset=str(shards), count=6))
    order = [int(found["data-sample"]) for tag, found in page.tags if tag == "article"][:6]
    assert order == [4, 2, 0, 5, 3, 1]


def test_what_comes_from_the_data_is_text_and_never_markup(tmp_path):
    hostile = HOSTILE.encode()
    shards = write_tars(tmp_path / "tars", [("k<b>bold</b>", {"txt": hostile, "class": hostile}), ("l", {"txt": b"x"})])
    (shards / "classes.json").write_text(json.dumps([HOSTILE]))
    text = build(store_of(tmp_path / "scores.zarr", shards, [1, 2]), dataset=str(shards))
    assert HOSTILE not in text
    assert "<b>" not in text
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert HOSTILE in page.card_text(0)
    assert "k<b>bold</b>" in page.card_text(0)


class Touch:
    """Its pickle makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_not_read(tmp_path):
    with MDSWriter(out=str(tmp_path / "mds"), columns={"x": "pkl", "i": "int"}) as out:
        out.write({"x": Touch(tmp_path / "touched"), "i": 1})
    for name in ("pkl", "pickle", "pyd", "pth"):
        shards = write_tars(tmp_path / name, [("k", {name: pickle.dumps(Touch(tmp_path / "touched"), 0)})])
        text = build(store_of(tmp_path / f"{name}.zarr", shards, [1]), dataset=str(shards))
        assert f"{name}: pickled, so it is not read" in text
    text = build(store_of(tmp_path / "scores.zarr", tmp_path / "mds", [1]), dataset=str(tmp_path / "mds"))
    assert "x: pickled, so it is not read" in text
    assert not (tmp_path / "touched").exists()
    StreamingDataset(local=str(tmp_path / "mds"), batch_size=1, allow_unsafe_types=True)[0]
    assert (tmp_path / "touched").exists()  # so it would have been


def test_a_sample_that_cannot_be_decoded_is_shown_as_such_among_the_others(tmp_path):
    damaged = png(90, size=(300, 300))[:80]
    shards = write_tars(
        tmp_path / "tars",
        [("a", {"png": png(5)}), ("b", {"jpg": b"no image", "txt": b"but a text"}), ("c", {"png": damaged})],
    )
    page = Page(build(store_of(tmp_path / "scores.zarr", shards, [1, 2, 3]), dataset=str(shards)))
    assert [len(page.cards[i][0]) > 0 for i in range(3)] == [True, False, False]
    assert "but a text jpg cannot be decoded: it is no image" in page.card_text(1)
    assert "png cannot be decoded" in page.card_text(2)


def test_a_shard_that_is_damaged_does_not_end_the_report(tmp_path):
    folder = Path(write_mds(tmp_path / "mds", samples=24, per_shard=12))
    store = store_of(tmp_path / "scores.zarr", folder, range(24))
    shard = folder / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[4:8] = b"\xff\xff\xff\xff"  # where its first sample begins
    shard.write_bytes(data)
    page = Page(build(store, dataset=str(folder), count=24))
    assert "the shard is damaged" in page.card_text(0)
    assert "pad: 64 bytes" in page.card_text(1)


@pytest.mark.parametrize(
    ("array", "shown"),
    [
        (np.arange(64, dtype=np.uint8).reshape(8, 8), True),
        (np.zeros((3, 9, 7), np.uint8), True),
        (np.zeros((9, 7, 4), np.uint8), True),
        (np.zeros((9, 7, 1), np.uint8), True),
        (np.zeros((9, 7, 5), np.uint8), False),
        (np.zeros(64, np.uint8), False),
        (np.zeros((8, 8), np.float32), False),
    ],
)
def test_arrays_of_bytes_that_have_the_shape_of_an_image_are_pictures(tmp_path, array, shown):
    shape = ",".join(map(str, array.shape))
    with MDSWriter(out=str(tmp_path / "mds"), columns={"x": f"ndarray:{array.dtype.name}:{shape}"}) as out:
        out.write({"x": array})
    stream = io.BytesIO()
    np.save(stream, array)
    tars = write_tars(tmp_path / "tars", [("k", {"npy": stream.getvalue()})])
    for number, shards in enumerate((tmp_path / "mds", tars)):
        page = Page(build(store_of(tmp_path / f"{number}.zarr", shards, [1]), dataset=str(shards)))
        assert len(page.cards[0][0]) >= 1 if shown else f"{array.dtype.name}[" in page.card_text(0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
def test_images_of_every_mode_become_small_pictures(tmp_path, mode):
    with MDSWriter(out=str(tmp_path / "mds"), columns={"x": "pil"}) as out:
        if mode != "I;16":  # which streaming cannot write
            out.write({"x": Image.new(mode, (400, 200))})
        out.write({"x": Image.new("L", (400, 200))})
    stream = io.BytesIO()
    Image.new(mode, (400, 200)).save(stream, "TIFF")
    tars = write_tars(tmp_path / "tars", [("k", {"tiff": stream.getvalue()})])
    for number, shards in enumerate((tmp_path / "mds", tars)):
        scores = range(open_shards(str(shards)).ends[-1])
        page = Page(build(store_of(tmp_path / f"{number}.zarr", shards, scores), dataset=str(shards)))
        assert all((found["width"], found["height"]) == ("96", "48") for found in page.cards[0][0])
        assert page.cards[0][0]


# Which shards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("compression", "hashes"), [(None, []), (None, ["sha1", "xxh64"]), ("zstd:3", ["sha1"])])
def test_the_fingerprint_of_mds_shards_is_that_of_the_dataset_that_a_run_reads(tmp_path, compression, hashes):
    with MDSWriter(
        out=str(tmp_path / "mds"), columns={"i": "int", "t": "str"}, size_limit=200, compression=compression,
        hashes=hashes, keep_local=True,
    ) as out:  # fmt: skip
        for i in range(20):
            out.write({"i": i, "t": "x" * i})
    found = open_shards(str(tmp_path / "mds"))
    source = open_source(StreamingDataset(local=str(tmp_path / "mds"), batch_size=1))
    assert found.fingerprint == source.fingerprint
    assert found.ends == np.cumsum(source.shard_sizes).tolist()
    assert len(found.ends) > 2


def test_the_fingerprint_of_tars_is_that_of_the_dataset_that_a_run_reads(tmp_path):
    folder = write_wds(tmp_path / "tars", shards=3)
    dataset = IndexedWebDataset(folder).map(lambda sample: sample["cls"])
    for name in (folder, f"{folder}/*.tar", f"{folder}/s{{0..2}}.tar"):
        assert open_shards(name).fingerprint == open_source(dataset).fingerprint


def test_other_shards_are_refused_with_what_was_found(tmp_path):
    write_mds(tmp_path / "mds")
    write_mds(tmp_path / "other", samples=36)
    store = store_of(tmp_path / "scores.zarr", tmp_path / "mds", range(48))
    with pytest.raises(StoreError, match=r"holds 36 samples \[mds:.*scores of 48 \[mds:.*without --dataset"):
        build(store, dataset=str(tmp_path / "other"))


def test_a_dataset_that_is_no_shards_is_refused_with_what_to_name(tmp_path):
    make_store(tmp_path / "scores.zarr", 10, 2)
    (tmp_path / "empty").mkdir()
    write_mds(tmp_path / "split" / "train")
    for dataset, error, told in [
        (str(tmp_path / "empty"), ConfigError, r"neither an index\.json"),
        (str(tmp_path / "split"), ConfigError, "its folder train has one"),
        (str(tmp_path / "missing"), ConfigError, "does not exist"),
        (str(tmp_path / "missing-*.tar"), DataError, "a glob must match"),
    ]:
        with pytest.raises(error, match=told):
            build(tmp_path / "scores.zarr", dataset=dataset)


# The store -------------------------------------------------------------------------------------------------------


def plain(path):
    ScoreStore.create(path, 50, scores=np.linspace(0.1, 3, 50, dtype=np.float32), epoch=4)


def at_epoch_0(path):
    ScoreStore.create(path, 50)


def never_committed_with_pending(path):
    ScoreStore.create(path, 50, pending=np.ones(50, np.float32))


def with_missing_epochs(path):
    store = ScoreStore.create(path, 50)
    for epoch in range(9):
        store.put_pending(0, np.random.default_rng(epoch).random(50, np.float32))
        history = History(path, Epoch(epoch, 50, 50, 50, np.nan, np.nan), recorded=epoch != 3)
        store.commit(epoch, history=None if epoch in (0, 5, 6) else history)


def with_samples_never_seen(path):
    store = ScoreStore.create(path, 50)
    for epoch in range(4):
        store.put_pending(0, np.where(np.arange(50) < 20, 1.5, np.nan).astype(np.float32))
        store.commit(epoch, history=History(path, Epoch(epoch, 50, 20, 20, np.nan, 1.0), recorded=True))


def none_seen(path):
    ScoreStore.create(path, 50, epoch=3)


def one_sample(path):
    make_store(path, 1, 4)


def one_epoch(path):
    make_store(path, 50, 1)


def many_epochs(path):
    store = ScoreStore.create(path, 50, epoch=420)
    for epoch in range(420, 423):
        store.put_pending(0, np.linspace(1, 2, 50, dtype=np.float32))
        store.commit(epoch, history=History(path, Epoch(epoch, 50, 50, 50, np.nan, 1.0), recorded=True))


def equal_scores(path):
    store = ScoreStore.create(path, 50)
    for epoch in range(4):
        store.put_pending(0, np.full(50, 0.5, np.float32))
        store.commit(epoch, history=History(path, Epoch(epoch, 50, 50, 50, np.nan, 0.0), recorded=True))


def not_above_0(path):
    store = ScoreStore.create(path, 50)
    for epoch in range(4):
        store.put_pending(0, np.linspace(-1, 0, 50, dtype=np.float32))
        store.commit(epoch, history=History(path, Epoch(epoch, 50, 50, 50, np.nan, 1e-3), recorded=True))


def huge_and_tiny(path):
    store = ScoreStore.create(path, 50)
    for epoch in range(4):
        store.put_pending(0, np.geomspace(1e-38, 3e38, 50, dtype=np.float32))
        store.commit(epoch, history=History(path, Epoch(epoch, 50, 50, 50, 1e300, 1e9), recorded=True))


def with_constant_steps(path):
    train(loader(path, constant_steps=True))


STORES = [
    plain, at_epoch_0, never_committed_with_pending, with_missing_epochs, with_samples_never_seen, none_seen,
    one_sample, one_epoch, many_epochs, equal_scores, not_above_0, huge_and_tiny, with_constant_steps,
]  # fmt: skip


@pytest.mark.parametrize("make", STORES)
def test_every_store_has_a_report_whose_charts_lie_within_their_frames(tmp_path, make):
    make(tmp_path / "scores.zarr")
    text = build(tmp_path / "scores.zarr")
    page = Page(text)
    assert "scores.zarr" in page.all_text()
    # Whatever is in the style and script, in the page there is no number that is none.
    assert not re.search(r"\b(nan|inf)\b", text.partition("</style>")[2].partition("<script>")[0], re.IGNORECASE)
    checked = 0
    for chart in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        _, _, width, height = map(float, re.search(r'viewBox="(\S+) (\S+) (\S+) (\S+)"', chart).groups())
        for points in re.findall(r' d="(M[^"a-z]*)"', chart):  # without what is relative
            for x, y in re.findall(r"[ML](\S+?) (\S+?)(?=[MLHVZ]|$)", points):
                assert -1 <= float(x) <= width + 1
                assert -1 <= float(y) <= height + 1
                checked += 1
    assert checked or make in (at_epoch_0, never_committed_with_pending, none_seen)


def test_a_store_without_history_still_tells_its_hardest_samples(tmp_path):
    plain(tmp_path / "scores.zarr")
    page = Page(build(tmp_path / "scores.zarr", count=2))
    assert list(page.cards) == [49, 48, 0, 1]
    assert "This store has no history" in page.all_text()


def test_what_was_saved_is_that_of_the_known_epochs_and_time_is_estimated_by_the_trained_samples(tmp_path):
    path = tmp_path / "scores.zarr"
    store = ScoreStore.create(path, 100)
    for epoch, (kept, seconds) in enumerate([(100, 60.0), (50, 40.0), (50, np.nan)]):
        store.put_pending(0, np.where(np.arange(100) < kept, 1.0, np.nan).astype(np.float32))
        store.commit(epoch, history=History(path, Epoch(epoch, 100, kept, kept, 1.0, seconds), recorded=False))
    text = Page(build(path)).all_text()
    assert "Samples saved so far 33.3 % 200 of 300 were trained on" in text
    assert "Time saved so far 28.6 % estimated: 2 min instead of 2 min" in text  # 100 of 140 s


def test_the_numbers_of_the_heat_map_are_in_a_table(tmp_path):
    make_store(tmp_path / "scores.zarr", 200, 6)
    page = Page(build(tmp_path / "scores.zarr"))
    rows = [tag for tag, attributes in page.tags if tag == "th" and attributes.get("scope") == "row"]
    assert len(rows) == 6


def test_a_report_is_made_while_a_run_writes_and_says_who(tmp_path):
    path = tmp_path / "scores.zarr"
    with InfoBatchLoader(list(range(64)), path, batch_size=8, epochs=6, history=True, delta=1) as loader:
        for _ in range(3):
            for _, picks in loader:
                loader.update((picks.index + 1).float(), picks)
        for step, (_, picks) in enumerate(loader):
            loader.update((picks.index + 1).float(), picks)
            if step == 1:
                page = Page(build(path, count=4))
                break
    assert "In use: process" in page.all_text()
    assert "Epochs 3 all are known" in page.all_text()


def test_a_commit_while_the_scores_are_read_has_them_read_again(tmp_path, monkeypatch):
    path = tmp_path / "scores.zarr"
    make_store(path, 20, 2)
    once = [True]

    def opening(place, mode):
        store = ScoreStore.open(place, mode=mode)
        if once:
            once.clear()
            writer = ScoreStore.open(path)
            writer.put_pending(0, np.full(20, 7, np.float32))
            writer.commit(2, history=History(path, Epoch(2, 20, 20, 20, 1.0, 1.0), recorded=True))
        return store

    monkeypatch.setattr(snapshot, "ScoreStore", SimpleNamespace(open=opening))
    found = Snapshot.take(path)
    assert found.epoch == 3
    assert (found.scores == 7).all()
    assert [one.number for one in found.epochs] == [0, 1, 2]


def test_what_a_commit_has_begun_to_write_of_its_epoch_is_not_seen(tmp_path):
    path = tmp_path / "scores.zarr"
    make_store(path, 20, 2)
    store = ScoreStore.open(path, mode="r")
    History(path, Epoch(2, 20, 20, 20, 1.0, 1.0), recorded=True).before(store.scores, np.full(20, 9, np.float32))
    found = Snapshot.take(path)
    assert found.losses.epochs == 2
    assert found.training.times.max() == 2


def test_a_history_that_is_damaged_is_an_error_that_says_what_to_do(tmp_path):
    make_store(tmp_path / "scores.zarr", 20, 2)
    for part in (tmp_path / "scores.zarr" / "history" / "recorded").rglob("c/*/*"):
        part.write_bytes(b"damaged")
    with pytest.raises(StoreError, match="remove that folder"):
        build(tmp_path / "scores.zarr")


# The page --------------------------------------------------------------------------------------------------------


def test_a_page_asks_for_nothing_from_elsewhere_and_all_its_links_have_a_target(tmp_path):
    write_mds(tmp_path / "mds")
    make_store(tmp_path / "scores.zarr", 48, 8, fingerprint=open_shards(str(tmp_path / "mds")).fingerprint)
    text = build(tmp_path / "scores.zarr", dataset=str(tmp_path / "mds"))
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text.partition("<script>")[0], re.IGNORECASE)
    for tag, attributes in page.tags:
        assert not attributes.keys() & {"action", "srcset", "background"}, tag
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith(("#", "data:"))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert any(link.startswith("#sample-") for link in page.links)


def test_reports_of_one_store_differ_in_nothing_but_their_time(tmp_path):
    make_store(tmp_path / "scores.zarr", 3000, 5)
    first, second = (re.sub(r"<time.*?</time>", "", build(tmp_path / "scores.zarr")) for _ in range(2))
    assert first == second


def test_the_command_writes_the_page_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path / "scores.zarr", 30, 3)
    code, out, err = run("report", "scores.zarr", "-o", "a page.html", "--samples", 3)
    assert (code, err) == (0, "")
    assert out.startswith("a page.html: ")
    assert Path("a page.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a page.html", "scores.zarr"]


def test_what_goes_wrong_is_one_line_and_leaves_an_older_page_as_it_was(tmp_path):
    (tmp_path / "report.html").write_text("older")
    code, _, err = run("report", tmp_path / "missing.zarr", "-o", tmp_path / "report.html")
    assert code == 1
    assert err.startswith("error: ")
    assert "missing.zarr" in err
    assert (tmp_path / "report.html").read_text() == "older"
    make_store(tmp_path / "scores.zarr", 30, 3)
    with pytest.raises(ConfigError, match="there is no folder"):
        write(tmp_path / "scores.zarr", tmp_path / "missing" / "report.html")
