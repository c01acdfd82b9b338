"""Conversions of real data: pictures with their descriptions, clothes in idx files, e-mails in tables."""

import csv
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from support.commands import members_of
from support.real_data import fashion_mnist, spam, stamps

from infobatch_stream.convert import convert
from infobatch_stream.convert.readers import read_idx, read_source
from infobatch_stream.formats.schema import KEY, MEMBERS, Column, Encoded, EncodedImage


@pytest.fixture(scope="module")
def pictures() -> list[Path]:
    """Files of stamps: pictures (.png), names in many languages (.txt) and measures (.dat), which many lack."""
    files = [path for path in stamps().rglob("*") if path.suffix in (".png", ".txt", ".dat") and path.is_file()]
    assert len(files) > 1500
    return sorted(files)


def test_stamps_are_a_tree_of_classes(pictures, tmp_path):
    (tree,) = read_source(stamps(), columns={"image": "image", "label": "label", "name": "name"})
    names = [tree[number]["name"] for number in range(len(tree))]
    assert names == sorted(str(path.relative_to(stamps())) for path in pictures if path.suffix == ".png")
    assert tree.classes == sorted({name.split("/")[0] for name in names})
    for number in range(0, len(tree), 50):
        assert tree[number]["image"] == EncodedImage((stamps() / names[number]).read_bytes(), "png")
    sizes = [path.stat().st_size for path in pictures if path.suffix == ".png"]
    assert 0 <= int(tree.sizes().sum()) - sum(sizes) < 100 * len(tree)


def test_stamps_with_their_descriptions_go_from_tars_to_mds_and_back(pictures, tmp_path):
    """As `tar --sort=name` packs them: a stamp is a picture, with a text and measures if it has any."""
    (tmp_path / "src").mkdir()
    for number, part in enumerate(np.array_split(np.array(pictures, object), 3)):
        with tarfile.open(tmp_path / f"src/{number}.tar", "w") as tar:
            for path in part.tolist():
                tar.add(path, str(path.relative_to(stamps())))
    (source,) = read_source(tmp_path / "src")
    assert source.columns == {
        KEY: Column("str", "txt"), MEMBERS: Column("str", "txt"), "dat": Column("bytes", "dat"),
        "png": Column("bytes", "png"), "txt": Column("str", "txt"),
    }  # fmt: skip
    convert(tmp_path / "src", tmp_path / "mds", "mds", shard_bytes=1 << 22, workers=2)
    convert(tmp_path / "mds", tmp_path / "tars", "wds", shard_bytes=1 << 22, workers=2)
    assert members_of(tmp_path / "tars") == members_of(tmp_path / "src")
    (mds,) = read_source(tmp_path / "mds", columns={"text": "txt"})
    texts = [mds[number]["text"].data for number in range(len(mds))]
    assert sum(map(bool, texts)) == sum(path.suffix == ".txt" for path in pictures)
    assert "лев" in b"".join(texts).decode().lower()


def test_fashion_mnist_goes_through_both_formats(tmp_path):
    train, test = sorted(read_source(fashion_mnist()), key=len, reverse=True)
    assert (train.name, len(train), test.name, len(test)) == ("train", 60000, "test", 10000)
    images = read_idx(fashion_mnist() / "t10k-images-idx3-ubyte.gz", 3)
    labels = read_idx(fashion_mnist() / "t10k-labels-idx1-ubyte.gz", 1)
    (tmp_path / "src").mkdir()
    for file in fashion_mnist().glob("t10k*"):
        (tmp_path / "src" / file.name).symlink_to(file)
    convert(tmp_path / "src", tmp_path / "mds", "mds", shuffle=False)
    convert(tmp_path / "mds/test", tmp_path / "tars", "wds")
    convert(tmp_path / "tars", tmp_path / "back", "mds")
    for folder in ("mds/test", "tars", "back"):
        (source,) = read_source(tmp_path / folder)
        assert source.columns == {"image": Column("ndarray:uint8:28,28", "npy"), "label": Column("int", "cls")}
        assert source.classes == list("0123456789")
        assert len(source) == len(images)
        for number in range(0, len(images), 37):
            sample = source[number]
            np.testing.assert_array_equal(sample["image"], images[number])
            assert sample["label"] == labels[number]
    assert [file.read_bytes() for file in sorted((tmp_path / "back").glob("*.mds"))] == [
        file.read_bytes() for file in sorted((tmp_path / "mds/test").glob("*.mds"))
    ]


@pytest.fixture(scope="module")
def mails() -> list[tuple[str, int]]:
    """Texts of e-mails as far as they are UTF-8, mixed, and whether each is spam."""
    found = []
    for file in sorted(spam().glob("*/*.json")):
        text = json.loads(file.read_text("utf-8"))["text"]
        found.append((text.encode("utf-8", "replace").decode(), int(file.parent.name.startswith("spam"))))
    random.Random(0).shuffle(found)
    assert len(found) > 5000
    return found


@pytest.mark.parametrize("kind", ["parquet", "csv", "csv of Python"])
def test_mails_are_read_from_tables(mails, tmp_path, kind):
    table = pa.table(
        {"body": [text for text, _ in mails], "spam": [label for _, label in mails], "n": range(len(mails))}
    )
    if kind == "parquet":
        pa.parquet.write_table(table, tmp_path / "mails.parquet", row_group_size=1000)
    elif kind == "csv":
        pa.csv.write_csv(table, tmp_path / "mails.csv")
    else:
        with (tmp_path / "mails.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(table.column_names)
            writer.writerows(zip(*table.to_pydict().values(), strict=True))
    (source,) = read_source(next(tmp_path.glob("mails.*")), columns={"text": "body", "label": "spam"})
    assert source.columns == {"text": Column("str", "txt"), "label": Column("int", "cls")}
    order = random.Random(1).sample(range(len(mails)), len(mails))
    assert [tuple(source[number].values()) for number in order] == [mails[number] for number in order]
    lengths = np.array([len(text.encode()) for text, _ in mails])
    assert (np.abs(source.sizes() - lengths) <= 24).all()


def test_mails_go_through_both_formats(mails, tmp_path):
    table = pa.table({"text": [text for text, _ in mails], "label": [label for _, label in mails]})
    pa.parquet.write_table(table, tmp_path / "mails.parquet")
    convert(tmp_path / "mails.parquet", tmp_path / "mds", "mds", workers=2, shard_bytes=1 << 22)
    convert(tmp_path / "mds", tmp_path / "tars", "wds")
    convert(tmp_path / "tars", tmp_path / "back", "mds", shard_bytes=1 << 22)
    (source,) = read_source(tmp_path / "back")
    order = np.random.default_rng(0).permutation(len(mails)).tolist()
    expected = [(Encoded(mails[number][0].encode()), mails[number][1]) for number in order]
    assert [(source[number]["text"], source[number]["label"]) for number in range(len(mails))] == expected
