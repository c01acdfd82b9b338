"""Files of JSON lines: each value as the JSON that it is in the file, and types of columns, found from all values."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from infobatch_stream.convert.readers.csv_files import Tally, typed
from infobatch_stream.errors import DataError

__all__ = ["JsonFile", "JsonTally", "is_json", "json_typed", "members"]

_BLOCK = 1 << 24  # bytes of lines in a batch, about
_ROWS = 1 << 16
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str)  # only looks where a value ends
_SPACE = re.compile(r"[ \t\r\n]*")
_KINDS = {
    "a text": '^"', "an object": r"^\{", "a list": r"^\[", "a truth value": "^[tf]", "a number": "^[-0-9NI]",
}  # fmt: skip
_SCALARS = frozenset({"a text", "a truth value", "a number"})


def is_json(table: Path) -> bool:
    """Whether a file of this name has JSON lines."""
    return table.suffix == ".jsonl"


class JsonFile:
    """One file, each line of which is an object; it is in memory. names: of all keys, in the order they come."""

    unnamed: frozenset[str] = frozenset()

    def __init__(self, path: Path) -> None:
        """Raises DataError."""
        self.names: list[str] = []
        self._batches: list[tuple[int, dict[str, pa.Array]]] = []
        rows: list[Mapping[str, str]] = []
        size = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    if text.strip():
                        rows.append(members(text))
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}: line {number:,} is no JSON object ({error}); correct it.") from error
                size += len(line)
                if size >= _BLOCK or len(rows) >= _ROWS:
                    self._keep(rows)
                    rows, size = [], 0
        self._keep(rows)
        if not self._batches:
            raise DataError(f"{path} has no rows; there is nothing to convert.")

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The columns ``names``, all of them binary: the JSON of each value, null where the key is missing."""
        for rows, columns in self._batches:
            arrays = [columns[name] if name in columns else pa.nulls(rows, pa.binary()) for name in names]
            yield pa.RecordBatch.from_arrays(arrays, list(names))

    def _keep(self, rows: Sequence[Mapping[str, str]]) -> None:
        if rows:
            names = list(dict.fromkeys(name for row in rows for name in row))
            self.names = list(dict.fromkeys([*self.names, *names]))
            arrays = {name: pa.array([row.get(name) for row in rows], pa.string()).cast(pa.binary()) for name in names}
            self._batches.append((len(rows), arrays))


def members(text: str) -> dict[str, str]:
    """The object in a line: key -> the JSON of its value, as it is written there. Raises ValueError, RecursionError."""
    found: dict[str, str] = {}
    at = _after(text, _skip(text, 0), "{")
    while not text.startswith("}", at):
        if found:
            at = _after(text, at, ",")
        if not text.startswith('"', at):
            raise ValueError(f"a key is missing at {text[at : at + 20]!r}")
        name, end = _DECODER.raw_decode(text, at)
        at = _after(text, _skip(text, end), ":")
        value, end = _DECODER.raw_decode(text, at)
        if name in found:
            raise ValueError(f"the key {name!r} is there twice")
        for one in (name, value):
            if isinstance(one, str):
                one.encode()  # half of a surrogate pair is no text
        found[name] = text[at:end]
        at = _skip(text, end)
    if _skip(text, at + 1) < len(text):
        raise ValueError(f"more than one value: {text[at + 1 : at + 21]!r}")
    return found


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _after(text: str, at: int, sign: str) -> int:
    if not text.startswith(sign, at):
        raise ValueError(f"{sign!r} is missing at {text[at : at + 20]!r}")
    return _skip(text, at + 1)


class JsonTally:
    """Which kinds of values one column has.

    Texts are text, and numbers alone what they would be in a CSV; all else stays JSON.

    notes: what a user should know of the type that was chosen. as_json: whether that is JSON.
    """

    def __init__(self, name: str, encoding: str | None) -> None:
        """``name``: of the column for the user, who may give its ``encoding``."""
        self.notes: list[str] = []
        self.as_json = False
        self._name, self._encoding = name, encoding
        self._numbers = Tally(name, is_json=True)
        self._first: dict[str, str] = {}
        self._missing = 0

    def add(self, values: pa.BinaryArray, table: Path, row: int) -> None:
        """Look at ``values``, the first of which is in the row ``row`` of ``table``."""
        texts = values.cast(pa.string())
        self._missing += texts.null_count
        texts = texts.fill_null("null")
        for kind, pattern in _KINDS.items():
            found = pc.match_substring_regex(texts, pattern)
            if kind not in self._first and found.true_count:
                self._first[kind] = f"row {row + pc.index(found, True).as_py():,} of {table}"
        if self._first.keys() <= {"a number"} or self._first.keys() <= {"a truth value"}:
            self._numbers.add(texts.cast(pa.binary()), table, row)

    @property
    def is_empty(self) -> bool:
        """Whether no value was seen."""
        return not self._first

    def type(self) -> pa.DataType:
        """The type of the column. Raises ConfigError for numbers that are of no one type."""
        kinds = self._first.keys()
        if self._encoding not in (None, "json") or kinds == {"a text"}:
            return pa.string()
        if not kinds:
            return pa.null()
        if self._encoding is None and kinds in ({"a number"}, {"a truth value"}):
            kind = self._numbers.type()
            self.notes += self._numbers.notes
            return kind
        self.as_json = True
        if self._encoding is None and len(kinds) > 1 and kinds & _SCALARS:
            held = " and ".join(f"{kind} ({where})" for kind, where in self._first.items())
            self.notes.append(
                f"the column {self._name!r} is stored as JSON, since it holds {held}; to have texts: --encoding "
                f"{self._name}=str"
            )
        if self._missing:
            self.notes.append(
                f"the column {self._name!r} is stored as JSON, and is null in {self._missing:,} rows that lack it"
            )
        return pa.string()


def json_typed(values: pa.BinaryArray, kind: pa.DataType, *, as_json: bool) -> tuple[pa.Array, dict[int, str]]:
    """``values`` of JSON as ``kind``, a type that `JsonTally` gives; and why some of them are null instead."""
    if pa.types.is_null(kind):
        return pa.nulls(len(values)), {}
    texts = values.cast(pa.string())
    texts = pc.if_else(pc.equal(texts, "null"), pa.scalar(None, pa.string()), texts)
    if as_json:
        return texts, {}
    if kind == pa.string():
        return pa.array([json.loads(one) if one and one[0] == '"' else one for one in texts.to_pylist()], kind), {}
    return typed(texts.fill_null("").cast(pa.binary()), kind, ())
