"""Folders of images: which files count, which numbers the classes have, and what a table beside the images adds."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from PIL import Image
from support.commands import run
from support.conversions import stop_after

from infobatch_stream.convert import convert
from infobatch_stream.convert.readers import read_images, read_source
from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.formats.extensions import IMAGE_EXTENSIONS, image_extension


def image(kind: str = "JPEG", color: int = 0, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (5, 4), color).save(stream, kind)
    return stream.getvalue()


def write(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image("PPM", mode="L") if path.suffix == ".pgm" else image())
    return root


def pairs(one) -> list[tuple[str, int]]:
    return [(sample["name"], sample["label"]) for sample in (one[k] for k in range(len(one)))]


def torchvisions(root: Path, **options) -> tuple[list[str], list[tuple[str, int]]]:
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(str(root), **options)
    return folder.classes, [(str(Path(path).relative_to(root)), label) for path, label in folder.samples]


# ---- classes


@pytest.mark.parametrize(
    "names",
    [
        ("a/1.jpg", "b/1.pgm", "c/1.jpg"),
        ("b/1.png", "A/2.jpg", "a/3.jpg", "10/4.jpg", "9/5.jpg", "é/6.jpg", "_/7.jpg", "a b/x/8.jpeg"),
    ],
)
def test_classes_and_their_numbers_are_those_of_torchvision(tmp_path, names):
    write(tmp_path / "src", *names)
    (one,) = read_source(tmp_path / "src")
    classes, samples = torchvisions(tmp_path / "src")
    assert one.classes == classes
    assert pairs(one) == samples


@pytest.mark.parametrize("extension", sorted(IMAGE_EXTENSIONS - {"jpc", "jpf", "jpx", "j2c", "jp2", "j2k", "psd"}))
def test_what_pillow_calls_an_image_is_one(tmp_path, extension):
    path = tmp_path / f"src/c/0.{extension.upper()}"
    path.parent.mkdir(parents=True)
    mode = {"pbm": "1", "pgm": "L", "pfm": "F"}.get(extension, "RGB")
    Image.new(mode, (32, 32)).save(path)
    (one,) = read_images(tmp_path / "src")
    assert one[0]["image"].data == path.read_bytes()
    assert one[0]["image"].extension == extension
    kind = image_extension(path.read_bytes())
    assert kind is None or kind in IMAGE_EXTENSIONS


def test_a_class_without_images_is_refused_or_keeps_its_number(tmp_path):
    write(tmp_path / "src", "a/1.jpg", "c/1.jpg")
    (tmp_path / "src/b").mkdir()
    (tmp_path / "src/b/1.heic").write_bytes(b"x")
    (tmp_path / "src/d").mkdir()
    with pytest.raises(ConfigError, match=r"without an image: b \(1 \.heic\), d \(nothing\).*--allow-empty"):
        convert(tmp_path / "src", tmp_path / "out", "mds")
    code, _, _ = run("convert", tmp_path / "src", tmp_path / "out", "--format", "mds", "--allow-empty")
    assert code == 0
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["a", "b", "c", "d"]
    (one,) = read_source(tmp_path / "src", allow_empty=True)
    assert (one.classes, pairs(one)) == torchvisions(tmp_path / "src", allow_empty=True)


# ---- splits


@pytest.mark.parametrize(
    "names", [("train", "val"), ("training_set", "test_set"), ("train2017", "val2017"), ("Train",)]
)
def test_splits_share_the_numbers_of_their_classes(tmp_path, names):
    for name in names:
        write(tmp_path / "src" / name, "a/1.jpg", "c/1.png")
    write(tmp_path / "src" / names[0], "b/2.png", "stray.jpg")
    (tmp_path / "src/notes.txt").write_text("x")
    sets = read_source(tmp_path / "src")
    assert [one.name for one in sets] == sorted(names)
    for one in sets:
        assert one.classes == ["a", "b", "c"]
        assert dict(pairs(one))["c/1.png"] == 2
        assert one.columns["image"].mds == "jpeg"
    done = convert(tmp_path / "src", tmp_path / "out", "wds")
    assert [part.path.name for part in done.parts] == sorted(names)
    assert any("skipped 1 images that lie in no class folder" in note for note in done.notes)
    assert any(f"{sorted(names)[0]}" in note and "are read as splits" in note for note in done.notes)


@pytest.mark.parametrize("names", [("passenger train", "freight train"), ("img_train", "img_val"), ("trains", "vals")])
def test_classes_with_a_word_of_splits_in_their_names_stay_classes(tmp_path, names):
    for name in names:
        write(tmp_path / "src" / name, "2019/1.jpg", "2020/2.jpg")
    (one,) = read_source(tmp_path / "src")
    assert one.classes == sorted(names)
    assert one.classes == torchvisions(tmp_path / "src")[0]
    assert any("are called like splits" in note for note in one.notes) == (names != ("trains", "vals"))
    for old, new in zip(names, ("train", "val"), strict=True):  # the remedy, if they are
        (tmp_path / "src" / old).rename(tmp_path / "src" / new)
    assert [one.classes for one in read_source(tmp_path / "src")] == [["2019", "2020"]] * 2


def test_a_class_that_one_split_lacks_has_its_number_and_one_that_all_lack_is_refused(tmp_path):
    write(tmp_path / "src", "train/a/1.jpg", "train/b/1.jpg", "val/b/1.jpg")
    (tmp_path / "src/val/a").mkdir()
    _, val = read_source(tmp_path / "src")
    assert (val.classes, pairs(val)) == (["a", "b"], [("b/1.jpg", 1)])
    (tmp_path / "src/val/c").mkdir()
    with pytest.raises(ConfigError, match=r"without an image: c \(nothing in any split\)"):
        read_source(tmp_path / "src")
    assert read_source(tmp_path / "src", allow_empty=True)[0].classes == ["a", "b", "c"]


def test_a_split_without_class_folders_beside_others_is_refused_with_a_remedy_that_works(tmp_path):
    write(tmp_path / "src", "train/a/1.jpg", "train/b/1.jpg", "test/1.jpg")
    with pytest.raises(ConfigError, match=rf"test without an image in any.*convert {tmp_path}/src/train DST/train"):
        read_source(tmp_path / "src")
    assert read_source(tmp_path / "src/train")[0].classes == ["a", "b"]


@pytest.mark.parametrize(
    "names", [("test_set/1.jpg", "training_set/1.jpg"), ("train/1.jpg", "val/1.jpg", "rest/1.jpg")]
)
def test_classes_that_are_called_like_splits_are_told_of(tmp_path, names):
    code, out, _ = run("convert", write(tmp_path / "src", *names), tmp_path / "out", "--format", "wds")
    assert code == 0
    assert "are called like splits" in out
    code, out, _ = run(
        "convert", write(tmp_path / "c", "test tube/1.jpg", "cat/1.jpg"), tmp_path / "o", "--format", "wds"
    )
    assert (code, "like splits" in out) == (0, False)


def test_files_that_are_passed_over_are_told_by_their_kinds(tmp_path):
    write(tmp_path / "src", "a/1.jpg", "loose.png")
    for name in ("a/2.heic", "a/3.HEIC", "a/b/4.txt", "README", ".DS_Store"):
        (tmp_path / "src" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "src" / name).write_bytes(b"x")
    _, out, _ = run("convert", tmp_path / "src", tmp_path / "out", "--format", "wds")
    assert "skipped 5 files that are no images in class folders: 2 .heic, 1 .txt, 1 hidden and 1 more" in out
    assert "skipped 1 images that lie in no class folder" in out


# ---- images with a table


ROWS = [{"file_name": "1.jpg", "caption": "one", "n": 1}, {"file_name": "sub/0.png", "caption": "zero, too", "n": 0}]


def described(src: Path, suffix: str, rows: list[dict] = ROWS) -> Path:
    write(src, "1.jpg")
    (src / "sub").mkdir(exist_ok=True)
    (src / "sub/0.png").write_bytes(image("PNG", 9))
    table = src / f"metadata.{suffix}"
    if suffix == "jsonl":
        table.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), table)
    else:
        pa.csv.write_csv(pa.Table.from_pylist(rows), table)
    return src


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves files open
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_images_come_with_the_columns_of_the_table_beside_them_as_from_hugging_face(tmp_path, suffix):
    import datasets

    src = described(tmp_path / "src", suffix)
    expected = datasets.load_dataset("imagefolder", data_dir=str(src), split="train", cache_dir=str(tmp_path / "cache"))
    done = convert(src, tmp_path / "out", "wds", shuffle=False)
    assert done.notes == ()
    (one,) = read_source(src)
    assert set(one.columns) == set(expected.column_names)
    for number, (row, name) in enumerate(zip(expected, ("1.jpg", "sub/0.png"), strict=True)):
        assert one[number]["image"].data == (src / name).read_bytes()
        assert (one[number]["caption"], one[number]["n"]) == (row["caption"], row["n"])
    (back,) = read_source(tmp_path / "out")
    assert [back[k]["image"].data for k in range(2)] == [one[k]["image"].data for k in range(2)]


def test_a_table_beside_images_and_what_it_says_of_files_that_are_not_there(tmp_path):
    src = described(tmp_path / "src", "csv", [*ROWS, {"file_name": "gone.jpg", "caption": "x", "n": 2}])
    write(src, "left/over.jpg")
    with pytest.raises(
        DataError, match=r"1 of 3 images that it names \(file_name\) are not there, the first 'gone.jpg'"
    ):
        convert(src, tmp_path / "out", "mds")
    assert not (tmp_path / "out").exists()
    done = convert(src, tmp_path / "out", "mds", on_error="skip")
    assert (done.parts[0].samples, len(done.problems)) == (2, 1)
    assert "has no row for 1 images beside it, which are left out: left/over.jpg" in done.notes[0]


def test_files_that_a_table_names_elsewhere_are_not_read(tmp_path):
    write(tmp_path, "secret.jpg")
    src = described(tmp_path / "src", "csv", [*ROWS, {"file_name": "../secret.jpg", "caption": "x", "n": 2}])
    with pytest.raises(DataError, match="is not below"):
        convert(src, tmp_path / "out", "mds")


def test_each_split_has_a_table_and_several_images_may_be_in_a_row(tmp_path):
    rows = [{"file_name": "1.jpg", "mask_file_name": "sub/0.png"}]
    for split in ("train", "validation"):
        described(tmp_path / "src" / split, "jsonl", rows)
    sets = read_source(tmp_path / "src")
    assert [one.name for one in sets] == ["train", "validation"]
    assert [column.mds for column in sets[0].columns.values()] == ["jpeg", "png"]
    assert list(sets[0].columns) == ["image", "mask"]
    assert sets[0][0]["mask"].data == (tmp_path / "src/train/sub/0.png").read_bytes()
    write(tmp_path / "src", "test/1.jpg")
    with pytest.raises(ConfigError, match="and none in test"):
        read_source(tmp_path / "src")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_column_has_one_type_in_the_tables_of_all_splits(tmp_path, suffix):
    described(tmp_path / "src/train", suffix, [{"file_name": "1.jpg", "n": 1}])
    described(tmp_path / "src/test", suffix, [{"file_name": "1.jpg", "n": 2.5}])
    test, train = read_source(tmp_path / "src")
    assert train.columns["n"].mds == test.columns["n"].mds == "float64"
    assert (train[0]["n"], test[0]["n"]) == (1.0, 2.5)


def test_columns_of_such_a_table_are_chosen_by_what_they_are_called_then(tmp_path):
    src = described(tmp_path / "src", "csv")
    (one,) = read_source(src, columns={"picture": "image", "count": "n"}, encodings={"count": "int8"})
    assert [column.mds for column in one.columns.values()] == ["jpeg", "int8"]
    assert one[1]["count"] == 0


@pytest.mark.parametrize(
    ("names", "table", "text"),
    [
        (("1.jpg",), ("metadata.csv", "id,n\n1.jpg,2\n"), "no column 'file_name'"),
        (("1.jpg",), ("metadata.csv", "file_name,image\n1.jpg,2\n"), "two columns that are called 'image'"),
        (("a/1.jpg", "b/2.jpg"), ("a/metadata.csv", "file_name,n\n1.jpg,2\n"), "lies in a class folder"),
        (("a/1.jpg",), ("labels.csv", "x\n1\n"), r"tables \(labels.csv\) and class folders with images"),
    ],
)
def test_tables_that_say_nothing_of_the_images_are_refused(tmp_path, names, table, text):
    write(tmp_path / "src", *names)
    (tmp_path / "src" / table[0]).write_text(table[1])
    with pytest.raises(ConfigError, match=text):
        convert(tmp_path / "src", tmp_path / "out", "mds")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("names", [("1.jpg",), ("a/1.jpg", "b/2.jpg")])
def test_a_table_without_paths_is_refused_with_remedies_that_work(tmp_path, suffix, names):
    src = described(tmp_path / "src", suffix, [{"id": 1}])
    for path in src.rglob("*.[jp][pn]g"):
        path.unlink()
    (src / "sub").rmdir()
    write(src, *names)
    table = src / f"metadata.{suffix}"
    with pytest.raises(ConfigError, match=r"no column 'file_name' of text with their paths, only 'id'\. Add") as raised:
        read_source(src)
    text = str(raised.value)
    assert (f"name the table to convert it without the images ({table})" in text) == (suffix != "jsonl")
    assert ("move it away" in text) == ("a/1.jpg" in names)
    if suffix != "jsonl":
        assert len(read_source(table)[0]) == 1
    if "a/1.jpg" in names:
        table.rename(tmp_path / table.name)
        assert read_source(src)[0].classes == ["a", "b"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_column_that_is_not_chosen_is_not_looked_at(tmp_path, suffix):
    numbers = [20201234567890123456 if suffix == "csv" else 9007199254740993, 2.5]
    rows = [{"file_name": "1.jpg", "cap": "x", "id": str(number)} for number in numbers]
    src = described(tmp_path / "src", suffix, rows)
    if suffix == "csv":
        (src / "metadata.csv").write_text((src / "metadata.csv").read_text().replace('"', ""))
    else:
        (src / "metadata.jsonl").write_text(
            (src / "metadata.jsonl").read_text().replace(f'"{numbers[0]}"', str(numbers[0])).replace('"2.5"', "2.5")
        )
    with pytest.raises(ConfigError, match="no float64 holds"):
        read_source(src)
    (one,) = read_source(
        src, columns={"picture": "image", "text": "cap"}, encodings={"picture": "png", "text": "bytes"}
    )
    assert {name: column.mds for name, column in one.columns.items()} == {"picture": "png", "text": "bytes"}
    assert one[1]["text"].data == b"x"
    assert list(read_source(src, columns={"text": "cap"})[0][0]) == ["text"]
    with pytest.raises(ConfigError, match="no column 'caption'; it has 'image', 'cap', 'id'"):
        read_source(src, columns={"text": "caption"})
    with pytest.raises(ConfigError, match="--encoding number=str"):
        read_source(src, columns={"number": "id"})


def test_folders_that_may_be_classes_are_told_of_beside_a_table(tmp_path):
    src = write(tmp_path / "src", "a/1.jpg", "b/2.jpg")
    table = src / "metadata.csv"
    table.write_text("file_name,caption\na/1.jpg,one\nb/2.jpg,two\n")
    (note,) = convert(src, tmp_path / "out", "mds").notes
    assert "the folders of the images (a, b) are not taken as labels" in note
    assert read_source(src, columns={"image": "image"})[0].notes == []
    table.write_text("file_name,caption,label\na/1.jpg,one,0\nb/2.jpg,two,1\n")  # one remedy
    assert (read_source(src)[0].notes, read_source(src)[0][1]["label"]) == ([], 1)
    table.unlink()  # the other
    assert read_source(src)[0].classes == ["a", "b"]
    for names in (("a/1.jpg", "2.jpg"), ("a/1.jpg", "a/2.jpg")):
        table.write_text("file_name,caption\n" + "".join(f"{name},x\n" for name in names))
        assert "not taken as labels" not in "".join(read_source(write(src, *names))[0].notes)


def test_a_table_of_another_name_beside_images_is_converted_with_a_note(tmp_path):
    write(tmp_path / "src", "1.jpg")
    (tmp_path / "src/captions.csv").write_text("file_name,n\n1.jpg,2\n")
    (note,) = convert(tmp_path / "src", tmp_path / "out", "mds").notes
    assert "1 images beside the tables are left out (1.jpg)" in note
    (tmp_path / "src/captions.csv").rename(tmp_path / "src/metadata.csv")  # the remedy
    assert list(read_source(tmp_path / "src")[0].columns) == ["image", "n"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_conversion_goes_on_with_the_table_that_it_began_with_and_with_no_other(tmp_path, suffix):
    rows = [{"file_name": "1.jpg", "label": 1}] * 900
    src = described(tmp_path / "src", suffix, rows)
    stop_after(src, tmp_path / "out", 2)
    described(src, suffix, [*rows[1:], {"file_name": "1.jpg", "label": 2}])  # of the same size
    with pytest.raises(ConfigError, match="was begun with another source"):
        convert(src, tmp_path / "out", "wds", shard_bytes=200 << 10, resume=True)
    described(src, suffix, rows)
    assert convert(src, tmp_path / "out", "wds", shard_bytes=200 << 10, resume=True).parts[0].samples == 900
