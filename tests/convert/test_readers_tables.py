"""Tables whose values a guess would change, or that have values no sample can have."""

import datetime
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest
from PIL import Image
from typer.testing import CliRunner

from infobatch_stream.convert import convert, write_shards
from infobatch_stream.convert.readers import read_source
from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.formats.schema import KEY, Column, Encoded
from infobatch_stream.tools.app import app


def image(kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), (9, 99, 199)).save(stream, kind)
    return stream.getvalue()


def parquet(path: Path, **columns) -> Path:
    pa.parquet.write_table(pa.table(columns), path)
    return path


def csv(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def one(src, **options):
    (found,) = read_source(src, **options)
    return found


def values(source, name: str = "x") -> list:
    found = [source[position][name] for position in range(len(source))]
    return [value.data.decode() if isinstance(value, Encoded) else value for value in found]


# ---- types of CSV files


@pytest.mark.parametrize(
    ("texts", "encoding", "expected"),
    [
        (["1", "-2", " 3 "], "int", [1, -2, 3]),
        ([str(-(2**63)), str(2**63 - 1)], "int", [-(2**63), 2**63 - 1]),
        (["1", str(2**64 - 1)], "uint64", [1, 2**64 - 1]),
        (["1", str(2**64)], "str", ["1", str(2**64)]),
        (["-1", str(2**63)], "str", ["-1", str(2**63)]),
        (["007", "8"], "str", ["007", "8"]),
        (["0", "00"], "str", ["0", "00"]),
        (["+491701234567", "1"], "str", ["+491701234567", "1"]),
        (["-0", "1"], "str", ["-0", "1"]),
        (["0x1F", "0x20"], "str", ["0x1F", "0x20"]),
        (["1_000", "2_000"], "str", ["1_000", "2_000"]),
        (['"1,000"', '"2,000"'], "str", ["1,000", "2,000"]),
        (["1e5", "2.5"], "float64", [1e5, 2.5]),
        (["1e-05", "3"], "float64", [1e-5, 3.0]),
        (["1e+16", "2e5"], "float64", [1e16, 2e5]),
        (["7654321", "12e45"], "str", ["7654321", "12e45"]),
        (["1", "2.5", "nan", "-inf"], "float64", [1.0, 2.5, "nan", float("-inf")]),
        ([f"{0.1:.18e}", ".5"], "float64", [0.1, 0.5]),
        ([str(2**53), "0.5"], "float64", [2.0**53, 0.5]),
        (["007.5", "1.5"], "str", ["007.5", "1.5"]),
        (["True", "false"], "int", [1, 0]),
        (["True", "1"], "str", ["True", "1"]),
        (["2020-01-02", "2020-01-03"], "str", ["2020-01-02", "2020-01-03"]),
        (["12:30:00", "00:00:01"], "str", ["12:30:00", "00:00:01"]),
        (["NA", "US"], "str", ["NA", "US"]),
        (['""', "null"], "str", ["", "null"]),
    ],
    ids=lambda value: ",".join(map(str, value))[:24] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_csv_column_has_a_type_that_gives_each_value_back(tmp_path, texts, encoding, expected):
    source = one(csv(tmp_path / "a.csv", "x,y", *(f"{text},z" for text in texts)))
    assert source.columns["x"].mds == encoding
    assert [str(value) if value != value else value for value in values(source)] == expected  # NaN is itself


@pytest.mark.parametrize(
    "texts",
    [
        [str(2**53 + 1), "0.5"],
        ["0.5", "20201234567890123456"],
        ["12345678901234567.0", "1.5"],
        ["1e400", "1.5"],
        ["1e-400", "1"],
    ],
)
def test_numbers_that_no_float_holds_are_refused_unless_told(tmp_path, texts):
    src = csv(tmp_path / "a.csv", "x,y", *(f"{text},z" for text in texts))
    with pytest.raises(ConfigError, match=r"no float64 holds, '.*' \(row \d of .*a\.csv\).*--encoding x=str"):
        read_source(src)
    assert values(one(src, encodings={"x": "str"})) == texts
    if "e" not in texts[0]:
        assert values(one(src, encodings={"x": "float64"})) == [float(text) for text in texts]


def test_a_type_is_decided_over_all_rows_of_all_files(tmp_path):
    csv(tmp_path / "a.csv", "x,y", *(f"{number},z" for number in range(200)))
    csv(tmp_path / "b.csv", "y,x", "z,0.5")
    assert one(tmp_path).columns["x"].mds == "float64"
    csv(tmp_path / "b.csv", "y,x", "z,0123")
    source = one(tmp_path)
    assert values(source)[-2:] == ["199", "0123"]
    assert source.notes == [
        f"the column 'x' is stored as text, as '0123' (row 0 of {tmp_path / 'b.csv'}) would not be the same as a number"
    ]
    csv(tmp_path / "b.csv", "y,x", f"z,{2**63}")
    assert (one(tmp_path).columns["x"].mds, one(tmp_path)[200]["x"]) == ("uint64", 2**63)
    lines = [f"{number},{'x' * 90}" for number in range(200_000)]  # more than is read at once
    csv(tmp_path / "b.csv", "x,y", *lines, "late,x")
    with pytest.raises(DataError, match=r"b\.csv: row 200,000 .*'x' .*'late' is no number.*--on-error skip"):
        read_source(tmp_path)


def test_codes_that_look_like_numbers_with_an_exponent_stay_text_with_a_note(tmp_path):
    src = csv(tmp_path / "a.csv", "x", "7654321", "12e45")
    (note,) = one(src).notes
    assert "'12e45' (row 1 of" in note
    assert "may be a code, and no value has a decimal point (--encoding x=float64)" in note
    assert values(one(src, encodings={"x": "float64"})) == [7654321.0, 12e45]


def test_folders_of_hive_are_told_of(tmp_path):
    for label in (0, 1):
        (tmp_path / f"hive/label={label}").mkdir(parents=True)
        parquet(tmp_path / f"hive/label={label}/a.parquet", x=[label])
    (note,) = one(tmp_path / "hive/**/*.parquet").notes
    assert "the folders label=0, label=1 are not taken as columns" in note
    assert one(tmp_path / "hive/**/*.parquet", columns={"label": "x"}).notes == []
    table = pyarrow.dataset.dataset(tmp_path / "hive", partitioning="hive").to_table()  # the remedy
    assert values(one(parquet(tmp_path / "a.parquet", x=table["x"], label=table["label"])), "label") == [0, 1]


def test_a_name_with_a_space_can_be_chosen(tmp_path):
    src = csv(tmp_path / "a.csv", "a, b", "1,2")
    done = CliRunner().invoke(app, ["convert", str(src), str(tmp_path / "o"), "--format", "wds", "--column", "b= b"])
    assert done.exit_code == 0, done.output
    assert values(one(tmp_path / "o"), "b") == [2]


def test_a_mistake_among_numbers_is_refused_or_left_out_and_many_of_them_are_texts(tmp_path):
    src = csv(tmp_path / "a.csv", "x,y", *["1,z"] * 30, "?,z")
    with pytest.raises(DataError, match=r"a\.csv: row 30 \(30 of all\): the column 'x' .*'\?' is no number"):
        read_source(src)
    result = convert(src, tmp_path / "wds", "wds", on_error="skip")
    assert (result.parts[0].samples, len(result.problems)) == (30, 1)
    assert "row 30" in result.problems[0]
    assert values(one(src, encodings={"x": "str"}))[-1] == "?"
    source = one(csv(tmp_path / "a.csv", "x,y", *["1,z"] * 3, "?,z"))
    assert (values(source), len(source.notes)) == (["1", "1", "1", "?"], 1)


def test_one_row_that_is_no_utf8_does_not_make_a_text_column_bytes(tmp_path):
    src = tmp_path / "a.csv"
    src.write_bytes("x,y\ncafé,1\n".encode() + "café,2\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.csv: row 1 .*'x' .*is no UTF-8.*--encoding x=bytes.*--on-error skip"):
        read_source(src)
    assert one(src, encodings={"x": "bytes"})[1]["x"] == Encoded("café".encode("latin-1"))
    result = convert(src, tmp_path / "wds", "wds", on_error="skip")
    assert (result.parts[0].samples, len(result.problems)) == (1, 1)
    assert values(one(tmp_path / "wds")) == ["café"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("\ufeffid,x\n1,a\n".encode(), {"id": 1, "x": "a"}),
        (b"id;x\n1;a,b\n", {"id": 1, "x": "a,b"}),
        (b"id\tx\n1\ta\n", {"id": 1, "x": "a"}),
        (b'"a;b"\n"1;2"\n', {"a;b": "1;2"}),
        (b",x\n0,a\n", {"Unnamed: 0": 0, "x": "a"}),
        (b"x,,\na,,\n", {"x": "a"}),
        (b"x,,\na,7,\n", {"x": "a", "Unnamed: 1": 7}),
    ],
)
def test_csv_files_of_other_programs_are_read(tmp_path, data, expected):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(data))
    assert one(tmp_path / "a.csv.gz")[0] == expected


def test_pandas_index_in_a_csv_goes_to_tars_and_back(tmp_path):
    pd.DataFrame({"x": [5, 6]}).to_csv(tmp_path / "a.csv")
    convert(tmp_path / "a.csv", tmp_path / "wds", "wds", shuffle=False)
    assert [dict(one(tmp_path / "wds")[n]) for n in (0, 1)] == [{"Unnamed: 0": 0, "x": 5}, {"Unnamed: 0": 1, "x": 6}]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("id,x\n1,a\n".encode("utf-16"), "is UTF-16"),
        (b"\xe9,x\n1,a\n", "names of columns that are no UTF-8"),
        (b"a,b,a\n1,2,3\n", "two columns of one name: 'a'"),
    ],
)
def test_csv_files_that_cannot_be_right_are_refused(tmp_path, data, text):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises((ConfigError, DataError), match=text):
        read_source(tmp_path / "a.csv")


def test_tables_that_are_called_as_splits_are_splits(tmp_path):
    csv(tmp_path / "train.csv", "x", "1", "2")
    csv(tmp_path / "test.csv", "x", "3")
    assert [(found.name, values(found)) for found in read_source(tmp_path)] == [("test", [3]), ("train", [1, 2])]
    csv(tmp_path / "more.csv", "x", "3")
    assert len(one(tmp_path)) == 4
    parquet(tmp_path / "more.parquet", x=[1])
    with pytest.raises(ConfigError, match="are CSV and Parquet"):
        read_source(tmp_path)


def test_a_column_has_one_type_in_all_splits_of_csv_files(tmp_path):
    csv(tmp_path / "train.csv", "score,code,n", "1,01,a", "2,02,b")
    csv(tmp_path / "test.csv", "score,code", "1.5,3", "2,4")
    test, train = read_source(tmp_path)
    assert (values(train, "score"), values(test, "score")) == ([1.0, 2.0], [1.5, 2.0])
    assert train.columns["score"].mds == test.columns["score"].mds == "float64"
    assert (values(train, "code"), values(test, "code")) == (["01", "02"], ["3", "4"])
    assert [note.partition(" is ")[0] for note in (*train.notes, *test.notes)] == ["the column 'code'"]
    test, train = read_source(tmp_path, columns={"points": "score"}, encodings={"points": "str"})
    assert (values(train, "points"), values(test, "points")) == (["1", "2"], ["1.5", "2"])


# ---- Parquet


def test_types_of_several_tables_are_joined_without_loss_or_refused(tmp_path):
    parquet(tmp_path / "a.parquet", x=[1, 2**53])
    parquet(tmp_path / "b.parquet", x=[0.5])
    assert values(one(tmp_path)) == [1.0, 2.0**53, 0.5]
    for column in (pa.array([2**53 + 1]), pa.array([datetime.date(2020, 1, 1)]), pa.array([b"x"])):
        parquet(tmp_path / "a.parquet", x=column)
        with pytest.raises((ConfigError, DataError), match=r"'x' .*convert them one by one|'x' .*one by one"):
            read_source(tmp_path)
    parquet(tmp_path / "a.parquet", x=pa.array(["1.10"]).cast(pa.decimal128(20, 2)))
    with pytest.raises(ConfigError, match="'x' is not of one type"):
        read_source(tmp_path)
    parquet(tmp_path / "a.parquet", x=["text"])
    parquet(tmp_path / "b.parquet", x=[b"bytes"])
    with pytest.raises(ConfigError, match="'x' is not of one type"):
        read_source(tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "ok"),
    [
        ([[1, 2]], [[0.5]], False),
        ([{"a": 1}], [{"a": 1.5}], False),
        ([{"a": 1}], [{"a": 2, "c": 3}], False),
        ([[{"a": [1]}]], [[{"a": [1.5]}]], False),
        ([[]], [[1]], True),
        ([{"a": None}], [{"a": 1}], True),
        (pa.array([[1]], pa.list_(pa.int8())), pa.array([[2**40]], pa.list_(pa.int64(), 1)), True),
        (pa.array([{"a": "x"}]), pa.array([{"a": "y"}], pa.struct([("a", pa.large_string())])), True),
    ],
)
def test_nested_values_of_several_tables_are_as_in_each_or_refused(tmp_path, first, second, ok):
    parts = [one(parquet(tmp_path / f"{name}.parquet", x=x)) for name, x in (("a", first), ("b", second))]
    if not ok:
        with pytest.raises(ConfigError, match="'x' is not of one type in 2 tables"):
            read_source(tmp_path)
        return
    expected = [json.loads(v) if isinstance(v, str) else v.tolist() for part in parts for v in values(part)]
    assert [json.loads(v) if isinstance(v, str) else v.tolist() for v in values(one(tmp_path))] == expected


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["x", "x"])
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet has two columns of one name: 'x'; rename one"):
        read_source(tmp_path / "a.parquet")
    (tmp_path / "saved").mkdir()
    with pa.ipc.new_stream(tmp_path / "saved/a.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "saved/state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    with pytest.raises(ConfigError, match=r"a\.arrow has two columns of one name: 'x'; rename one"):
        read_source(tmp_path / "saved")


def test_tensors_keep_their_shape(tmp_path):
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12, dtype=np.int16).reshape(2, 2, 3))
    source = one(parquet(tmp_path / "a.parquet", x=tensors))
    assert source.columns["x"] == Column("ndarray:int16:2,3", "npy")
    np.testing.assert_array_equal(source[1]["x"], np.arange(6, 12).reshape(2, 3))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([0, 2**30], pa.date32()),
        pa.array([[0], [2**30]], pa.list_(pa.date32())),
        pa.array([{"a": 0}, {"a": 2**60}], pa.struct([("a", pa.timestamp("ms"))])),
        pa.array([[("k", 0)], [("k", 2**60)]], pa.map_(pa.string(), pa.timestamp("us", "UTC"))),
    ],
    ids=lambda column: str(column.type)[:24],
)
def test_times_out_of_range_are_one_error_that_names_row_and_column(tmp_path, column):
    src = parquet(tmp_path / "a.parquet", x=column)
    with pytest.raises(DataError, match=r"a\.parquet: row 1 \(1 of all\): the column 'x' .*out of the range") as raised:
        read_source(src)
    assert "--encoding" not in str(raised.value)  # no other would hold it
    result = convert(src, tmp_path / "wds", "wds", on_error="skip")
    assert (result.parts[0].samples, len(result.problems)) == (1, 1)


def test_nested_times_are_the_texts_that_they_are_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    times = {
        "1970-01-01 00:00:00.000000001": pa.timestamp("ns"), "1970-01-01 00:00:00.000001Z": pa.timestamp("us", "UTC"),
        "00:00:00.000000001": pa.time64("ns"), "1970-01-02": pa.date32(), "1 ns": pa.duration("ns"),
    }  # fmt: skip
    for text, kind in times.items():
        src = parquet(tmp_path / "a.parquet", x=pa.array([1], kind), y=pa.array([[1, None]], pa.list_(kind)))
        assert one(src)[0] == {"x": Encoded(json.dumps(text).encode()), "y": Encoded(json.dumps([text, None]).encode())}
        assert one(src, encodings={"x": "str"}, columns={"x": "x"})[0] == {"x": text}


def test_pandas_index_is_left_out_with_a_note_and_can_be_taken(tmp_path):
    frame = pd.DataFrame({"x": [1, 2, 3, 4], "y": [5, 6, 7, 8]})
    frame[frame.x != 3].to_parquet(tmp_path / "a.parquet")
    frame.to_parquet(tmp_path / "b.parquet")
    source = one(tmp_path)
    assert list(source.columns) == ["x", "y"]
    assert "__index_level_0__ is the index that pandas gave its rows, and is left out" in source.notes[0]
    convert(tmp_path / "a.parquet", tmp_path / "wds", "wds", shuffle=False)
    assert values(one(tmp_path / "wds")) == [1, 2, 4]
    chosen = {"i": "__index_level_0__", "x": "x"}
    convert(tmp_path / "a.parquet", tmp_path / "own", "wds", columns=chosen, shuffle=False)
    assert values(one(tmp_path / "own"), "i") == [0, 1, 3]


@pytest.mark.parametrize("name", ["__url__", "__members__", "__x"])
def test_columns_that_would_not_be_read_again_are_refused(tmp_path, name):
    src = parquet(tmp_path / "a.parquet", **{"x": [1], name: ["a"]})
    with pytest.raises(ConfigError, match=f"cannot be called '{name}'.*--column NAME=SOURCE"):
        read_source(src)
    convert(src, tmp_path / "wds", "wds", columns={"x": "x", "y": name})
    assert values(one(tmp_path / "wds"), "y") == ["a"]


def test_keys_may_be_whole_numbers_and_are_never_guessed(tmp_path):
    csv(tmp_path / "a.csv", f"{KEY},x", "007,1", "8,2")
    assert values(one(tmp_path / "a.csv"), KEY) == ["007", "8"]
    src = parquet(tmp_path / "a.parquet", **{KEY: [7, 8], "x": ["a", "b"]})
    convert(src, tmp_path / "wds", "wds", shuffle=False)
    source = one(tmp_path / "wds")
    assert (values(source, KEY), source.columns["x"]) == (["7", "8"], Column("str", "txt"))
    with pytest.raises(ConfigError, match=f"'{KEY}' names the samples"):
        read_source(parquet(tmp_path / "a.parquet", **{KEY: [0.5], "x": [1]}))


@pytest.mark.parametrize("format", ["mds", "wds"])
def test_samples_of_keys_alone_are_refused(tmp_path, format):
    src = csv(tmp_path / "a.csv", KEY, "a", "b")
    with pytest.raises(ConfigError, match="no column but the keys; there is nothing to convert"):
        convert(src, tmp_path / "out", format)
    for sample in ({}, {KEY: "a"}):
        with pytest.raises(ConfigError, match="no fields but their keys"):
            write_shards([sample], tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


# ---- nulls


def test_nulls_are_told_of_at_once_with_remedies_that_work(tmp_path):
    columns = {
        "text": ["a", None, "c"], "number": [1, 2, None], "score": [None, 0.5, 1.0], "array": [[1, 2], None, [5, 6]],
        "tags": [["a"], None, ["c"]], "raw": [b"\0", None, b"\2"],
    }  # fmt: skip
    src = parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(DataError, match=r"row 1 \(1 of all\): the column 'text' is empty.*--fill text=.*-error skip"):
        read_source(src)
    fill = {"text": "", "number": "-1", "score": "nan", "array": "[0, 0]", "raw": "?"}
    convert(src, tmp_path / "wds", "wds", fill=fill, shuffle=False)
    source = one(tmp_path / "wds")
    assert [values(source, name) for name in ("text", "number", "tags", "raw")] == [
        ["a", "", "c"], [1, 2, -1], ['["a"]', "null", '["c"]'], ["\0", "?", "\2"],
    ]  # fmt: skip
    assert np.isnan(source[0]["score"])
    np.testing.assert_array_equal(source[1]["array"], [0, 0])
    result = convert(src, tmp_path / "skipped", "wds", columns={"text": "text", "number": "number"}, on_error="skip")
    assert (result.parts[0].samples, len(result.problems)) == (1, 2)
    for text, error in [({"z": "1"}, "no column 'z'"), ({"number": "x"}, "'x' for the column 'number'")]:
        with pytest.raises(ConfigError, match=error):
            read_source(src, fill=text)
    with pytest.raises(ConfigError, match="fill is for the empty values of tables"):
        convert(tmp_path / "wds", tmp_path / "again", "wds", fill={"text": "x"})


def test_empty_numbers_of_a_csv_are_nulls_and_texts_are_filled_where_told(tmp_path):
    src = csv(tmp_path / "a.csv", "x,y", "1,a", ",", "NA,NA", "None,c")
    with pytest.raises(DataError, match=r"row 1 .*'x' is empty"):
        read_source(src)
    source = one(src, fill={"x": "-1", "y": "?"})
    assert (values(source), values(source, "y")) == ([1, -1, -1, -1], ["a", "?", "NA", "c"])
    assert values(one(src, fill={"x": "0"}, encodings={"x": "int8"})) == [1, 0, 0, 0]
    assert values(one(src, skip=True, columns={"y": "y"}), "y") == ["a", "", "NA", "c"]


def test_a_null_within_a_list_is_told_of_with_a_remedy_that_works(tmp_path):
    src = parquet(tmp_path / "a.parquet", x=[[1, 2], [3, None]])
    with pytest.raises(DataError, match=r"row 1 .*there is a null in it.*--encoding x=json"):
        read_source(src)
    assert values(one(src, encodings={"x": "json"})) == ["[1, 2]", "[3, null]"]


def test_empty_lists_make_json_of_arrays_with_a_note(tmp_path):
    src = parquet(tmp_path / "a.parquet", x=[[1, 2], [], [3, 4]])
    source = one(src)
    assert (source.columns["x"].mds, values(source)) == ("json", ["[1, 2]", "[]", "[3, 4]"])
    assert "row 1 of all" in source.notes[0]
    convert(src, tmp_path / "wds", "wds", encodings={"x": "ndarray"}, on_error="skip", shuffle=False)
    np.testing.assert_array_equal([one(tmp_path / "wds")[n]["x"] for n in (0, 1)], [[1, 2], [3, 4]])


def test_sizes_are_of_the_values_though_others_are_null(tmp_path):
    rows = [np.arange(100).tolist(), None, np.arange(100).tolist()]
    assert one(parquet(tmp_path / "a.parquet", x=rows), skip=True).sizes()[[0, 2]].tolist() == [928, 928]


# ---- images


@pytest.mark.parametrize("bad", [b"<html>404</html>", b""])
@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_a_damaged_image_does_not_make_a_column_bytes(tmp_path, bad, form):
    found = [image(), bad, image("PNG")]
    column = found if form == "bytes" else [{"bytes": data, "path": None} for data in found]
    src = parquet(tmp_path / "a.parquet", x=column)
    with pytest.raises(DataError, match=r"row 1 \(1 of all\): the column 'x' is stored as 'jpeg'.*--encoding x=bytes"):
        convert(src, tmp_path / "wds", "wds")
    assert not (tmp_path / "wds").exists()
    result = convert(src, tmp_path / "wds", "wds", on_error="skip")
    assert (result.parts[0].samples, len(result.problems)) == (2, 1)
    assert one(src, encodings={"x": "bytes"})[1]["x"].data == bad


def test_a_file_that_is_not_there_has_no_remedy_in_another_encoding(tmp_path):
    files = [{"bytes": image(), "path": None}, {"bytes": None, "path": None}, {"bytes": None, "path": "../a.jpg"}]
    src = parquet(tmp_path / "a.parquet", x=files)
    with pytest.raises(DataError, match="neither bytes nor a path") as raised:
        read_source(src)
    assert "--encoding" not in str(raised.value)
    with pytest.raises(DataError, match="is not below") as raised:
        one(src, skip=True)[2]
    assert "--encoding" not in str(raised.value)
    assert convert(src, tmp_path / "wds", "wds", on_error="skip").parts[0].samples == 1


def test_check_names_row_and_column_of_what_its_name_alone_calls_an_image(tmp_path):
    files = [{"bytes": image(), "path": "a.jpg"}, {"bytes": b"none", "path": "b.jpg"}]
    src = parquet(tmp_path / "a.parquet", x=files)
    with pytest.raises(DataError, match=r"a\.parquet: row 1 .*cannot be decoded.*'x'"):
        convert(src, tmp_path / "wds", "wds", check=True)
    assert convert(src, tmp_path / "wds", "wds", check=True, on_error="skip").parts[0].samples == 1
    with pytest.raises(DataError, match="has no bytes"):
        read_source(parquet(tmp_path / "a.parquet", x=[*files, {"bytes": b"", "path": "c.jpg"}]))


def test_image_options_without_images_are_refused(tmp_path):
    src = parquet(tmp_path / "a.parquet", x=[1], y=[b"none"])
    for options in ({"check": True}, {"resize": 8}, {"quality": 80}):
        with pytest.raises(ConfigError, match=r"no column of images.*x \(int\), y \(bytes\).*--encoding NAME=jpeg"):
            convert(src, tmp_path / "wds", "wds", **options)
    convert(parquet(tmp_path / "a.parquet", y=[image()]), tmp_path / "wds", "wds", check=True)
    convert(tmp_path / "wds", tmp_path / "small", "wds", resize=8)
    with Image.open(io.BytesIO(one(tmp_path / "small")[0]["y"].data)) as found:
        assert found.size == (11, 8)


# ---- what is told


@pytest.mark.parametrize(
    ("column", "encoding", "ok"),
    [
        ([1.5, 1e300], "float32", False),
        ([1.5, 2.5], "float32", True),
        (["1", "x"], "int", False),
        (['{"a": 1}', "[2]"], "json", True),
        (['{"a": 1}', "{"], "json", False),
    ],
)
def test_values_fit_the_encoding_that_is_told_or_are_refused(tmp_path, column, encoding, ok):
    src = parquet(tmp_path / "a.parquet", x=column)
    source = one(src, encodings={"x": encoding})
    assert values(one(src)) == column
    if ok:
        assert values(source) == column
    else:
        with pytest.raises(DataError, match=f"row 1 .*stored as '{encoding}'"):
            source[1]


# ---- samples of a program


@pytest.mark.parametrize(
    "values",
    [
        (1, "a"), (1, 2.5), (1, None), (1, 2**63), (1.5, 2**53 + 1), (1.5, "2"), ("a", 1), ("a", b"b"), (b"a", "b"),
        (np.zeros(2), np.zeros(3)), (np.zeros(2), np.zeros(2, np.float32)), (np.zeros(2), [1]), ({"a": 1}, b"b"),
    ],
    ids=lambda values: "-".join(type(value).__name__ for value in values),
)  # fmt: skip
@pytest.mark.parametrize("format", ["mds", "wds"])
def test_samples_of_other_types_than_the_first_are_refused_and_never_written_as_something_else(
    tmp_path, values, format
):
    with pytest.raises(DataError, match=r"sample 1 does not fit the columns: 'x' is .*columns="):
        write_shards(({"x": value} for value in values), tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["mds", "wds"])
def test_json_of_any_value_is_json_in_both_formats(tmp_path, format):
    write_shards(({"x": value} for value in [{"a": 1}, "text", 5, None]), tmp_path / "out", format)
    assert values(one(tmp_path / "out")) == ['{"a": 1}', '"text"', "5", "null"]


def test_the_command_fills_and_refuses(tmp_path):
    src = csv(tmp_path / "a.csv", "x,y", "1,a", ",b")
    run = CliRunner().invoke
    assert "--fill x=VALUE" in run(app, ["convert", str(src), str(tmp_path / "o"), "--format", "wds"]).output
    assert run(app, ["convert", str(src), str(tmp_path / "o"), "--format", "wds", "--fill", "x"]).exit_code == 2
    assert run(app, ["convert", str(src), str(tmp_path / "o"), "--format", "wds", "--fill", "x=-1"]).exit_code == 0
    assert sorted(values(one(tmp_path / "o"))) == [-1, 1]
