"""Images are made smaller as what they are: label images keep their values, photographs are smooth."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import members_of, run

from infobatch_stream.convert import convert
from infobatch_stream.errors import ConfigError


# Of 1000 x 601 pixels: an eighth of it, at which a JPEG is decoded, has another ratio of its sides.
def encoded(array: np.ndarray, kind: str, palette: bool = False, **options) -> bytes:
    image = Image.fromarray(array)
    if palette:
        image = image.convert("P") if image.mode != "L" else image
        image.putpalette(list(range(256)) * 3)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


RNG = np.random.default_rng(0)
LABELS = np.repeat(np.repeat(RNG.choice([0, 7, 200], (61, 100)), 10, 0), 10, 1)[:601, :1000].astype(np.uint8)
COLOURS = np.stack([LABELS, 255 - LABELS, LABELS // 2], 2)
GRAY = np.clip(np.add.outer(np.arange(601), np.arange(1000)) / 7 + RNG.normal(0, 9, (601, 1000)), 0, 255)
PHOTO = np.stack([GRAY, GRAY[::-1], GRAY], 2).astype(np.uint8)
GRAY = GRAY.astype(np.uint8)


def write_tar(path: Path, members: dict[str, bytes], count: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def images_in(folder: Path) -> dict[str, Image.Image]:
    """Extension -> the image of the first sample."""
    found = {}
    for name, data in members_of(folder):
        number, _, extension = name.partition(".")
        if number == "0":
            found[extension] = Image.open(io.BytesIO(data))
    return found


def values(image: Image.Image) -> set[int]:
    array = np.asarray(image)
    return set(map(tuple, array.reshape(-1, 3).tolist())) if array.ndim == 3 else set(np.unique(array).tolist())


@pytest.mark.parametrize(
    ("extension", "data", "mode"),
    [
        ("seg.png", encoded(LABELS, "PNG"), "L"),
        ("png", encoded(LABELS, "PNG"), "L"),  # few values, beside another image
        ("seg.png", encoded(LABELS, "PNG", palette=True), "P"),
        ("seg.png", encoded(LABELS.astype(np.uint16) * 300, "PNG"), "I;16"),
        ("seg.png", encoded(LABELS > 100, "PNG"), "1"),
        ("mask.png", encoded(GRAY, "PNG"), "L"),  # instances, of which there may be many
        ("seg.bmp", encoded(LABELS, "BMP"), "L"),
        ("mask.png", encoded(COLOURS, "PNG"), "RGB"),
    ],
)
def test_label_images_keep_their_values_their_mode_and_the_size_of_their_image(tmp_path, extension, data, mode):
    before = values(Image.open(io.BytesIO(data)))
    write_tar(tmp_path / "src/x.tar", {"jpg": encoded(PHOTO, "JPEG"), extension: data})
    (note,) = convert(tmp_path / "src", tmp_path / "out", "wds", resize=64).notes
    assert "are taken for label images" in note
    found = images_in(tmp_path / "out")
    small = found[extension.replace("bmp", "png")]
    assert (small.mode, small.size) == (mode, found["jpg"].size)
    assert values(small) <= before
    if len(before) < 10:
        assert values(small) == before
    if mode == "P":
        assert small.getpalette() == Image.open(io.BytesIO(data)).getpalette()


@pytest.mark.parametrize(
    ("members", "column"),
    [
        ({"png": encoded(GRAY, "PNG")}, "png"),
        ({"jpg": encoded(PHOTO, "JPEG"), "depth.png": encoded(GRAY, "PNG")}, "depth.png"),
        ({"jpg": encoded(PHOTO, "JPEG"), "seg.jpg": encoded(GRAY, "JPEG")}, "seg.jpg"),
        ({"jpg": encoded(PHOTO, "JPEG"), "mask.png": encoded(PHOTO, "PNG")}, "mask.png"),
        ({"png": encoded(PHOTO, "PNG", palette=True)}, "png"),
        ({"png": encoded(COLOURS, "PNG")}, "png"),
    ],
)
def test_photographs_are_made_smaller_smoothly(tmp_path, members, column):
    write_tar(tmp_path / "src/x.tar", members)
    notes = convert(tmp_path / "src", tmp_path / "out", "wds", resize=64).notes
    if column == "mask.png":  # which may be of very many labels
        assert "mask.png' (several channels, many colours) are made smaller as photographs are; if they are" in notes[0]
        remedy = {"mask.png": "nearest", "jpg": "auto"}
        assert convert(tmp_path / "src", tmp_path / "told", "wds", resize=64, resize_columns=remedy).notes == ()
        assert values(images_in(tmp_path / "told")["mask.png"]) <= values(Image.fromarray(PHOTO))
    else:
        assert notes == ()
    small = images_in(tmp_path / "out")[column].convert("L")
    with Image.open(io.BytesIO(members[column])) as image:
        smooth = image.convert("RGB").resize(small.size, Image.Resampling.LANCZOS).convert("L")
        rough = image.convert("RGB").resize(small.size, Image.Resampling.NEAREST).convert("L")
    errors = [np.abs(np.asarray(small, float) - np.asarray(other, float)).mean() for other in (smooth, rough)]
    assert errors[0] < errors[1] / 2


def test_one_column_of_few_values_is_taken_for_a_photograph_with_a_note_whose_remedy_works(tmp_path):
    write_tar(tmp_path / "src/x.tar", {"png": encoded(LABELS, "PNG")})
    (note,) = convert(tmp_path / "src", tmp_path / "out", "wds", resize=64).notes
    assert note.endswith("if they are label images, --resize-column png=nearest")
    assert len(values(images_in(tmp_path / "out")["png"])) > 3
    arguments = ("convert", tmp_path / "src", tmp_path / "again", "--format", "wds", "--resize", 64)
    code, out, _ = run(*arguments, "--resize-column", "png=nearest")
    assert (code, "note" in out) == (0, False)
    assert values(images_in(tmp_path / "again")["png"]) == {0, 7, 200}


def test_only_the_columns_that_are_named_are_made_smaller(tmp_path):
    mask = encoded(LABELS, "PNG")
    write_tar(tmp_path / "src/x.tar", {"jpg": encoded(PHOTO, "JPEG"), "seg.png": mask})
    convert(tmp_path / "src", tmp_path / "out", "wds", resize=64, resize_columns={"jpg": "auto"})
    assert dict(members_of(tmp_path / "out"))["0.seg.png"] == mask
    assert images_in(tmp_path / "out")["jpg"].size[1] == 64
    convert(tmp_path / "src", tmp_path / "smooth", "wds", resize=64, resize_columns={"seg.png": "smooth"})
    assert images_in(tmp_path / "smooth")["jpg"].size == (1000, 601)
    assert len(values(images_in(tmp_path / "smooth")["seg.png"])) > 3


def test_of_two_columns_that_become_one_kind_of_image_the_message_says_what_works(tmp_path):
    write_tar(tmp_path / "src/x.tar", {"gif": encoded(GRAY, "GIF"), "jpg": encoded(PHOTO, "JPEG")})
    arguments = ("convert", tmp_path / "src", tmp_path / "out", "--format", "wds", "--resize", 64)
    code, _, err = run(*arguments)
    assert code == 1
    for number, option in enumerate((["--extension", "gif=other.jpg"], ["--resize-column", "jpg"])):
        assert " ".join(option) in " ".join(err.split())
        code, _, err2 = run("convert", tmp_path / "src", tmp_path / str(number), *arguments[3:], *option)
        assert (code, err2) == (0, "")
        assert set(images_in(tmp_path / str(number))) == {"jpg", "other.jpg" if number == 0 else "gif"}


@pytest.mark.parametrize(
    ("columns", "options", "text"),
    [
        ({"cls": "nearest"}, {"resize": 9}, "no column of images 'cls' to make smaller; it has jpg"),
        ({"jpg": "cubic"}, {"resize": 9}, "'cubic'; auto, nearest, smooth"),
        ({"jpg": "nearest"}, {}, "resize_columns"),
    ],
)
def test_columns_that_cannot_be_made_smaller_are_refused(tmp_path, columns, options, text):
    write_tar(tmp_path / "src/x.tar", {"jpg": encoded(PHOTO, "JPEG"), "cls": b"1"})
    with pytest.raises(ConfigError, match=text):
        convert(tmp_path / "src", tmp_path / "out", "wds", resize_columns=columns, **options)


def test_images_that_are_not_named_are_still_looked_at_where_that_is_asked_for(tmp_path):
    write_tar(tmp_path / "src/x.tar", {"jpg": encoded(PHOTO, "JPEG"), "seg.png": encoded(LABELS, "PNG")[:-200]})
    chosen = {"resize": 64, "resize_columns": {"jpg": "auto"}, "on_error": "skip"}
    assert convert(tmp_path / "src", tmp_path / "out", "wds", **chosen).parts[0].samples == 2
    with pytest.raises(Exception, match="no sample could be read"):
        convert(tmp_path / "src", tmp_path / "none", "wds", check=True, **chosen)
