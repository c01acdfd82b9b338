"""Tables of JSON lines beside images: every value comes back as it is, or is refused with a remedy that works."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.commands import run

from infobatch_stream.convert import convert
from infobatch_stream.convert.readers import read_source
from infobatch_stream.convert.readers.json_lines import members
from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.formats.schema import Encoded


def described(src: Path, *lines: str, name: str = "1.jpg") -> Path:
    """An image, and a ``metadata.jsonl`` that has ``lines`` of it, without their first brace."""
    src.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    Image.new("RGB", (5, 4)).save(stream, "JPEG")
    (src / name).write_bytes(stream.getvalue())
    text = "".join(f'{{"file_name": "{name}"{line and ", "}{line}}}\n' for line in lines)
    (src / "metadata.jsonl").write_text(text)
    return src


def values(src: Path, name: str = "x", **options) -> list:
    (one,) = read_source(src, **options)
    found = [one[position][name] for position in range(len(one))]
    return [value.data.decode() if isinstance(value, Encoded) else value for value in found]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    row=st.dictionaries(st.text(st.characters(codec="utf-8")), JSON), indent=st.sampled_from([None, 1]), ascii=...
)  # fmt: skip
def test_the_values_of_a_line_are_cut_out_as_they_are(row, indent, ascii: bool):
    found = members(f" {json.dumps(row, indent=indent, ensure_ascii=ascii)}\r\n")
    assert {key: json.loads(text) for key, text in found.items()} == row
    assert list(found) == list(row)


@pytest.mark.parametrize(
    "line",
    ["[1]", "{", '{"a": 1,}', '{"a": 1} 2', '{"a" 1}', "{a: 1}", '{"a": 1, "a": 2}', '{"a": "\\ud800"}', "{,}", "\x00"],
)
def test_what_is_no_object_is_refused_by_the_number_of_its_line(tmp_path, line):
    src = described(tmp_path / "src", "")
    with (src / "metadata.jsonl").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(DataError, match=r"metadata\.jsonl: line 3 is no JSON object"):
        read_source(src)


@pytest.mark.parametrize(
    ("texts", "encoding", "expected"),
    [
        (["20201234567890123456", "20201234567890123457"], "str", ["20201234567890123456", "20201234567890123457"]),
        (["1", "9007199254740993"], "int", [1, 9007199254740993]),
        (["1", "2.5"], "float64", [1.0, 2.5]),
        (["1e5", "2e5"], "float64", [1e5, 2e5]),
        (["true", "false"], "int", [1, 0]),
        (['"2024-01-01"', '"5"'], "str", ["2024-01-01", "5"]),
        (['"caf\\u00e9"', '""'], "str", ["café", ""]),
        (['{"when": "2024-01-01"}', '{"b": 1}'], "json", ['{"when": "2024-01-01"}', '{"b": 1}']),
        (["[1,2]", "[1.50]", "[]"], "json", ["[1,2]", "[1.50]", "[]"]),
        (['{"a":9007199254740993}', "null"], "json", ['{"a":9007199254740993}', "null"]),
        (["1", '"1"', "true"], "json", ["1", '"1"', "true"]),
    ],
    ids=lambda value: ",".join(map(str, value))[:24] if isinstance(value, list) else "",
)
def test_values_are_what_they_are_in_the_file(tmp_path, texts, encoding, expected):
    src = described(tmp_path / "src", *(f'"x": {text}' for text in texts))
    assert read_source(src)[0].columns["x"].mds == encoding
    assert values(src) == expected
    for format in ("wds", "mds"):
        convert(src, tmp_path / format, format, shuffle=False)
        assert values(tmp_path / format) == expected


def test_numbers_that_no_float_holds_are_refused_and_mixed_values_are_told_of_with_remedies_that_work(tmp_path):
    src = described(tmp_path / "src", '"x": 9007199254740993', '"x": 2.5')
    with pytest.raises(ConfigError, match=r"no float64 holds, '9007199254740993' \(row 0 .*--encoding x=str"):
        read_source(src)
    assert values(src, encodings={"x": "str"}) == ["9007199254740993", "2.5"]
    src = described(tmp_path / "src", '"x": 1', '"x": "a"', "")
    (one,) = read_source(src)
    assert "holds a text (row 1 of" in one.notes[0]
    assert "is null in 1 rows that lack it" in one.notes[1]
    assert values(src) == ["1", '"a"', "null"]
    code, out, err = run("convert", src, tmp_path / "out", "--format", "wds", "--encoding", "x=str", "--fill", "x=?")
    assert code == 0, out + err
    assert sorted(values(tmp_path / "out")) == ["1", "?", "a"]


def test_nulls_and_missing_keys_are_refused_or_filled(tmp_path):
    src = described(tmp_path / "src", '"x": 1, "y": null', '"x": null, "y": null', '"y": null')
    with pytest.raises(ConfigError, match="'y' is empty in all rows; choose the others"):
        read_source(src)
    columns = {"image": "image", "x": "x"}
    with pytest.raises(DataError, match="'x' is empty"):
        read_source(src, columns=columns)
    assert values(src, columns=columns, fill={"x": "-1"}) == [1, -1, -1]
