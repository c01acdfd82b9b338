"""Random tables go from CSV and Parquet to both formats and come back equal, or are refused with a reason."""

import csv
import json
import math
import shutil
import struct
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from infobatch_stream.convert import convert
from infobatch_stream.convert.readers import read_source
from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.formats.schema import Encoded

FEW = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
WHOLE = st.sampled_from([0, 1, -1, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 20201234567890123456]) | st.integers()
CODES = st.integers(0, 9999).map("{:04}".format)
NUMERIC = st.one_of(
    WHOLE.map(str),
    st.floats().map(repr),
    st.floats(allow_nan=False, allow_infinity=False).map(lambda value: f"{value:.18e}"),
    st.decimals(allow_nan=False, allow_infinity=False, places=3).map(str),
    st.sampled_from(["007", "+5", "-0", "1e5", "0x1F", " 8 ", "1_0", "NA", "", "true", "False", "1e400", "12:30"]),
)  # fmt: skip
KINDS = st.sampled_from([NUMERIC, WHOLE.map(str), CODES, st.floats().map(repr), TEXTS])


def converted(src: Path, dst: Path, format: str, **options) -> bool:
    """Whether it was converted; else it was refused, before anything was written, for a reason that names a column."""
    error = None
    try:
        convert(src, dst, format, shuffle=False, **options)
    except (ConfigError, DataError) as refused:
        error = refused
    event("refused" if error else "converted")
    assert error is None or ("column '" in str(error) and not dst.exists()), error
    return error is None


def same(text: str, value: Any) -> bool:
    """Whether ``value`` is what a person takes ``text`` for, and nothing is lost."""
    if isinstance(value, Encoded | str):
        return (value if isinstance(value, str) else value.data.decode()) == text
    value = value.item() if isinstance(value, np.generic) else value
    bare = text.strip()
    if isinstance(value, int):
        return str(value) == bare or {"true": 1, "false": 0}.get(bare.lower(), 2) == value
    if math.isnan(value) or math.isinf(value):
        return float(bare) == value or bare.lower().lstrip("+-") == "nan"
    number = Decimal(bare)
    return Decimal(value) == number or (("." in bare or "e" in bare.lower()) and float(bare) == value)


@FEW
@given(data=st.data())
def test_cells_of_a_csv_come_back_as_they_are_or_are_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("csv")
    count = data.draw(st.integers(1, 12))
    columns = [data.draw(KINDS.flatmap(lambda kind: st.lists(kind, min_size=count, max_size=count))) for _ in range(2)]
    rows = list(zip(*columns, strict=True))
    with (folder / "a.csv").open("w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("x", "y"), *rows])
    for format in ("wds", "mds"):
        if converted(folder / "a.csv", folder / format, format):
            (source,) = read_source(folder / format)
            for position, row in enumerate(rows):
                assert all(same(text, source[position][name]) for name, text in zip("xy", row, strict=True))


LEAVES = [
    pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(), pa.float16(),
    pa.float32(), pa.float64(), pa.bool_(), pa.string(), pa.large_string(), pa.binary(),
    pa.large_binary(), pa.binary(3), pa.date32(),
    pa.timestamp("ms"), pa.timestamp("us", "UTC"), pa.timestamp("ns", "Europe/Berlin"), pa.time64("us"),
    pa.duration("ns"), pa.decimal128(20, 3), pa.decimal256(60, 2), pa.null(),
]  # fmt: skip
TYPES = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(
        inner.map(pa.list_), inner.map(pa.large_list), inner.map(lambda kind: pa.list_(kind, 2)),
        inner.map(lambda kind: pa.struct([("a", kind), ("b", pa.int8())])),
        inner.map(lambda kind: pa.map_(pa.string(), kind)),
    ),
    max_leaves=2,
) | st.sampled_from(
    [pa.string_view(), pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int8(), pa.int64())]
)  # fmt: skip


def value_of(kind: pa.DataType) -> st.SearchStrategy:
    """Values of a type, in Python's form of them."""
    if pa.types.is_dictionary(kind):
        return value_of(kind.value_type)
    if pa.types.is_integer(kind):
        signed = pa.types.is_signed_integer(kind)
        bits = kind.bit_width - signed
        return st.integers(-(2**bits) if signed else 0, 2**bits - 1)
    if pa.types.is_floating(kind):
        return st.floats(width=kind.bit_width)
    if pa.types.is_boolean(kind):
        return st.booleans()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return TEXTS
    if pa.types.is_fixed_size_binary(kind):
        return st.binary(min_size=3, max_size=3)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return st.binary(max_size=4)
    if pa.types.is_decimal(kind):
        return st.decimals(-(10**15), 10**15, places=kind.scale)
    if pa.types.is_time(kind):
        return st.times()
    if pa.types.is_temporal(kind):
        return st.integers(-(2**31), 2**31 - 1) | st.integers(
            -(2 ** (kind.bit_width - 1)), 2 ** (kind.bit_width - 1) - 1
        )
    if pa.types.is_map(kind):
        return st.dictionaries(TEXTS, value_of(kind.item_type), max_size=2).map(lambda one: list(one.items()))
    if pa.types.is_fixed_size_list(kind):
        return st.lists(optional(kind.value_type), min_size=2, max_size=2)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return st.lists(optional(kind.value_type), max_size=3)
    if pa.types.is_struct(kind):
        return st.fixed_dictionaries({field.name: optional(field.type) for field in kind})
    return st.none()


def optional(kind: pa.DataType) -> st.SearchStrategy:
    return value_of(kind) if not pa.types.is_null(kind) else st.none()


def plain(value: Any) -> Any:
    """``value`` of a sample or of Arrow in a form that can be compared, exactly."""
    if isinstance(value, Encoded):
        value = value.data
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, float | np.floating):
        return struct.pack("<d", value) if not math.isnan(value) else b"nan"
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    return value


def expected(scalar: pa.Scalar, encoding: str) -> Any:
    """What a value of a table is in a sample that is stored as ``encoding``."""
    if encoding != "json":
        return plain(scalar.as_py())
    return texts(scalar)


def texts(scalar: pa.Scalar) -> Any:
    """As JSON: what it has no form for is text."""
    kind = scalar.type
    if not scalar.is_valid:
        return None
    if pa.types.is_map(kind):
        return [[plain(pair[0].as_py()), texts(pair[1])] for pair in scalar.values]
    if pa.types.is_struct(kind):
        return {field.name: texts(scalar[field.name]) for field in kind}
    if pa.types.is_nested(kind):
        return [texts(one) for one in scalar.values]
    if pa.types.is_duration(kind):
        return f"{scalar.value} {kind.unit}".encode()
    if pa.types.is_temporal(kind):
        return scalar.cast(pa.string()).as_py().encode()
    return str(scalar.as_py()).encode() if pa.types.is_decimal(kind) else plain(scalar.as_py())


@FEW
@given(data=st.data())
def test_columns_of_parquet_come_back_from_both_formats_or_are_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("parquet")
    count = data.draw(st.integers(1, 4))
    arrays = {}
    for name in ("x", "y")[: data.draw(st.integers(1, 2))]:
        kind = data.draw(TYPES)
        null = st.none() if data.draw(st.integers(0, 5)) == 0 else value_of(kind)
        rows = data.draw(st.lists(value_of(kind) | null, min_size=count, max_size=count))
        arrays[name] = made(rows, kind)
    pa.parquet.write_table(pa.table(arrays), folder / "a.parquet")
    table = pa.parquet.read_table(folder / "a.parquet")
    for format in ("mds", "wds"):
        if not converted(folder / "a.parquet", folder / format, format):
            return
        back(folder / format, table)
    convert(folder / "wds", folder / "again", "mds")
    back(folder / "again", table)


def made(rows: list, kind: pa.DataType) -> pa.Array:
    """An array of ``kind``; times are given as whole numbers, which Python's own do not hold."""
    if pa.types.is_dictionary(kind):
        return pa.array(rows, kind.value_type).dictionary_encode()
    return pa.array(rows, kind)


def back(folder: Path, table: pa.Table) -> None:
    (source,) = read_source(folder)
    for name in table.column_names:
        encoding = source.columns[name].mds
        for position in range(len(table)):
            found = source[position][name]
            value = plain(json.loads(found.data)) if encoding == "json" else plain(found)
            assert value == expected(table[name].chunk(0)[position], encoding), (name, encoding, found)


ENCODINGS = [
    "int", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
    "str", "bytes", "json", "str_int", "str_float", "str_decimal", "ndarray", "ndarray:int64", "ndarray:float32",
    "ndarray:int64:2", "jpeg", "png", "pkl", "pil", "jpeg_array", "jpegarray", "list[pil]", "list[jpeg]", "list[png]",
]  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_encoding_that_has_a_name_keeps_the_values_of_a_table_or_refuses_them(tmp_path_factory, encoding, data):
    folder = tmp_path_factory.mktemp("encoding")
    kind = data.draw(st.sampled_from([pa.int64(), pa.float64(), pa.string(), pa.binary(), pa.list_(pa.int64(), 2)]))
    rows = data.draw(st.lists(value_of(kind), min_size=1, max_size=3))
    pa.parquet.write_table(pa.table({"x": pa.array(rows, kind)}), folder / "a.parquet")
    if not converted(folder / "a.parquet", folder / "wds", "wds", encodings={"x": encoding}):
        return
    convert(folder / "wds", folder / "mds", "mds")
    for format in ("wds", "mds"):
        (source,) = read_source(folder / format)
        assert source.columns["x"].mds == encoding
        for position, row in enumerate(rows):
            assert kept(row, source[position]["x"], encoding)
    shutil.rmtree(folder)


def kept(value: Any, found: Any, encoding: str) -> bool:
    """Whether ``found`` is ``value``, as ``encoding`` has it: of floats the nearest."""
    if isinstance(found, Encoded):
        data = found.data.decode("utf-8", "surrogateescape")
        written = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
        return data == written or (
            (encoding == "json" or isinstance(value, list)) and plain(json.loads(data)) == plain(value)
        )
    if isinstance(found, float):
        number = float(value)
        return math.isnan(number) or found == number or found == float(np.dtype(encoding).type(number))
    return plain(found) == plain(value) or (isinstance(value, str | bytes | float) and found == int(value))
