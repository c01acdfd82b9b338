"""CSV files, read as the bytes that their values are; and the types of their columns, found from all values.

A type gives each value back as it was. Nothing is decided by the first rows. A number that would not be the same again
stays text ("007", "+5", what has more than 64 bits), and no whole number becomes a float that is another one.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from infobatch_stream.convert.readers.options import check_once
from infobatch_stream.convert.readers.plain_arrow import reading
from infobatch_stream.errors import ConfigError, DataError

__all__ = ["NULLS", "CsvFile", "Tally", "is_csv", "typed"]

_BLOCK = 1 << 24  # bytes that are in memory at once, about; and of the longest row
_START = 1 << 16  # bytes that have the names of the columns, as a rule
_READ = pa.csv.ReadOptions(block_size=_BLOCK, use_threads=False)

NULLS = ("", "NA", "N/A", "n/a", "#N/A", "NULL", "null", "None", "<NA>")
"""What stands for no value in a column of numbers; not NaN, which is one. In a column of texts nothing is null."""

_MOST = 0.9  # of the values are numbers: then the others are taken for mistakes
_HALF = 0.5  # are: then it is said that they are stored as text
_SOME = 100  # long decimals of a block, which are looked at to tell whether they are rounded
_FORMS = {  # of a value without the spaces around it: the first that fits is its
    "whole": r"^(?:0|-?[1-9][0-9]*)$",
    "digits": r"^[+-]?[0-9]+$",  # as numbers they would lose zeros, or the sign
    "special": r"^[+-]?(?i:nan|inf|infinity)$",
    "code": r"^(?:0|[1-9][0-9]*)[eE][0-9]+$",  # or a number
    "float": r"^[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?$",
    "truth": r"^(?:true|True|TRUE|false|False|FALSE)$",
}
_NUMBERS = ("whole", "special", "code", "float")
_LONG_WHOLE = r"^[+-]?[0-9]{16,}(?:\.0*)?$"  # a float64 holds only some of them
_EXTREME = r"[eE][+-]?[0-9]{3}|[0-9]{300}"
_LONG = r"(?:[0-9]\.?){18}"  # more digits than any float64 needs


def is_csv(table: Path) -> bool:
    """Whether a file of this name is a CSV."""
    return table.name.endswith((".csv", ".csv.gz"))


class CsvFile:
    """One file, UTF-8 as a rule, with the names of its columns in the first row.

    names: of the columns; ``unnamed`` ones are called as pandas calls them, "Unnamed: 0" (0 is the first column).
    Where no comma is between the names, the separator is the semicolon, tab or bar that is.
    """

    def __init__(self, path: Path) -> None:
        """Raises DataError and ConfigError."""
        self._path = path
        with _reading(path):
            with pa.input_stream(str(path)) as file:
                start: bytes = file.read(_START)
            if start.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError(f"{path} is UTF-16; write it again as UTF-8, e.g. iconv -f utf-16 -t utf-8.")
            self._parse = pa.csv.ParseOptions(delimiter=_separator(start), newlines_in_values=True)
            with self._open(pa.csv.ConvertOptions()) as reader:
                self._raw: list[str] = reader.schema.names
        self.names = [name or f"Unnamed: {number}" for number, name in enumerate(self._raw)]
        self.unnamed = {name for name, raw in zip(self.names, self._raw, strict=True) if not raw}
        check_once(self.names, path)

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The columns ``names``, all of them binary. Raises DataError."""
        places = [self.names.index(name) for name in names]
        convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(self._raw, pa.binary()))
        if len(set(self._raw)) == len(self._raw):
            convert.include_columns = [self._raw[place] for place in places]
            places = list(range(len(places)))
        with _reading(self._path), self._open(convert) as reader:
            for batch in reader:
                yield pa.RecordBatch.from_arrays([batch.column(place) for place in places], list(names))

    def _open(self, convert: pa.csv.ConvertOptions) -> pa.csv.CSVStreamingReader:
        return pa.csv.open_csv(pa.input_stream(str(self._path)), _READ, self._parse, convert)


def _separator(start: bytes) -> str:
    """What is between the names of the columns, in the first line of a file that begins with ``start``."""
    line = re.sub(rb'"[^"]*"', b"", start).lstrip().partition(b"\n")[0]
    counts = {separator: line.count(separator.encode()) for separator in ",;\t|"}
    return "," if counts[","] or not any(counts.values()) else max(counts, key=counts.__getitem__)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raises DataError for what pyarrow says of a CSV that is damaged, or none."""
    try:
        with reading(path, remedy="correct it"):
            yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} has names of columns that are no UTF-8 ({error}); write it again as UTF-8.") from error


class Tally:
    """How many values of one column have each form, and where the first of each is.

    notes: what a user should know of the type that was chosen.
    """

    def __init__(self, name: str, *, is_json: bool = False) -> None:
        """``name``: of the column for the user. ``is_json``: numbers are known to be some."""
        self._name, self._is_json = name, is_json
        self.notes: list[str] = []
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._low = self._high = 0
        self._is_text = False

    def add(self, values: pa.BinaryArray, table: Path, row: int) -> None:
        """Look at ``values``, the first of which is in the row ``row`` of ``table``."""
        if self._is_text:
            return
        try:
            texts = pc.utf8_trim_whitespace(values.cast(pa.string()))
        except pa.ArrowInvalid:  # numbers are UTF-8; as text it is noted
            self._is_text = True
            return
        left = pc.invert(pc.is_in(texts, pa.array(NULLS)))
        for form, pattern in _FORMS.items():
            found = pc.and_(left, pc.match_substring_regex(texts, pattern))
            left = pc.and_not(left, found)
            self._counts[form] += found.true_count
            self._note(form, texts, found, table, row)
            if form in ("whole", "code", "float") and found.true_count:
                self._note("inexact", texts, _inexact(texts, found), table, row)
                self._note("rounded", texts, _rounded(texts, found), table, row)
            if form == "whole" and found.true_count:
                low, high = _limits(texts.filter(found))
                self._low, self._high = min(self._low, low), max(self._high, high)
        self._counts["other"] += left.true_count
        self._note("other", texts, left, table, row)
        # A text keeps any value as it is: so this may be decided before all are seen.
        self._is_text = self._counts.total() > 0 and self._share() < _HALF

    def _note(self, what: str, texts: pa.StringArray, found: pa.BooleanArray, table: Path, row: int) -> None:
        if what not in self._first and found.true_count:
            number = pc.index(found, True).as_py()
            self._first[what] = f"{texts[number].as_py()[:60]!r} (row {row + number:,} of {table})"

    def _share(self) -> float:
        """How many of the values are numbers, or truth values."""
        counts = self._counts
        numbers = sum(counts[form] for form in _NUMBERS)
        return max(numbers, counts["truth"]) / max(counts.total(), 1)

    @property
    def is_empty(self) -> bool:
        """Whether no value was seen."""
        return not (self._counts.total() or self._is_text)

    def type(self) -> pa.DataType:
        """The type that all but a few mistakes have. Notes where numbers become text, or are rounded.

        Raises ConfigError for numbers that are of no one type.
        """
        counts, first = self._counts, self._first
        if self._is_text or not counts.total():
            return pa.string()
        if counts["digits"] or self._share() < _MOST:
            # Digits alone (codes, telephone numbers) are nothing to speak of.
            odd = "digits" if counts["digits"] else "other" if counts["other"] else "truth"
            if counts[odd] < counts.total():
                self._say(f"is stored as text, as {first[odd]} would not be the same as a number")
            return pa.string()
        if counts["truth"] > counts["whole"]:
            return pa.bool_()
        if counts["code"] and not counts["float"] and not self._is_json:
            self._say(
                f"is stored as text, as {first['code']} may be a code, and no value has a decimal point (--encoding "
                f"{self._name}=float64)"
            )
            return pa.string()
        if counts["code"] or counts["float"] or counts["special"]:
            if "inexact" in first:
                floats = first.get("float") or first.get("code") or first["special"]
                raise ConfigError(
                    f"the column {self._name!r} has floats, {floats}, and what no float64 holds, {first['inexact']}. "
                    f"Have it stored as text (--encoding {self._name}=str), or rounded (--encoding "
                    f"{self._name}=float64)."
                )
            if "rounded" in first:
                self._say(f"is rounded to float64: {first['rounded']} has more digits (--encoding {self._name}=str)")
            return pa.float64()
        return self._whole_type()

    def _whole_type(self) -> pa.DataType:
        for kind, low, high in ((pa.int64(), -(2**63), 2**63), (pa.uint64(), 0, 2**64)):
            if low <= self._low and self._high < high:
                return kind
        self._say(f"is stored as text: its whole numbers, {self._low} to {self._high}, need more than 64 bits")
        return pa.string()

    def _say(self, what: str) -> None:
        self.notes.append(f"the column {self._name!r} {what}")


def typed(values: pa.BinaryArray, kind: pa.DataType, empty: Sequence[str]) -> tuple[pa.Array, dict[int, str]]:
    """``values`` of a CSV as ``kind``, a type that `Tally` gives or binary; and why some of them are null instead.

    empty: the texts that are null; of numbers `NULLS` are.
    """
    if kind == pa.binary():
        return values, {}
    none = pa.scalar(None, kind)
    try:
        texts = values.cast(pa.string())
    except pa.ArrowInvalid:
        wrong = {}
        decoded: list[str | None] = []
        for number, data in enumerate(values.to_pylist()):
            try:
                decoded.append(data.decode())
            except UnicodeDecodeError:
                decoded.append(None)
                wrong[number] = f"{data[:60]!r} is no UTF-8"
        found, more = typed(pa.array([text or "" for text in decoded]).cast(pa.binary()), kind, empty)
        return pc.if_else(pa.array([text is not None for text in decoded]), found, none), wrong | more
    if kind == pa.string():
        return (pc.if_else(pc.is_in(texts, pa.array(empty)), none, texts) if empty else texts), {}
    texts = pc.utf8_trim_whitespace(texts)
    forms = ("truth",) if kind == pa.bool_() else _NUMBERS if kind == pa.float64() else ("whole",)
    fits = pc.match_substring_regex(texts, "|".join(_FORMS[form] for form in forms))
    lost = pc.and_not(pc.invert(fits), pc.is_in(texts, pa.array(NULLS)))
    wrong = {number: f"{texts[number].as_py()[:60]!r} is no number" for number in np.flatnonzero(lost).tolist()}
    return pc.if_else(fits, texts, pa.scalar(None, pa.string())).cast(kind), wrong


def _limits(texts: pa.StringArray) -> tuple[int, int]:
    """The smallest and the largest of whole numbers; of those with very many digits some that are as large."""
    try:
        found = pc.min_max(texts.cast(pa.int64()))
        return found["min"].as_py(), found["max"].as_py()
    except pa.ArrowInvalid:
        numbers = [int(text[:40]) for text in texts.to_pylist()]
        return min(numbers), max(numbers)


def _inexact(texts: pa.StringArray, numbers: pa.BooleanArray) -> pa.BooleanArray:
    """Which of the ``numbers`` no float64 holds: large whole ones, and those that it takes for 0 or for infinite."""
    found = np.zeros(len(texts), bool)
    for number, text in _matching(texts, numbers, _LONG_WHOLE):
        found[number] = Decimal(text) != Decimal(float(text))
    for number, text in _matching(texts, numbers, _EXTREME):
        found[number] |= float(text) in (0, math.inf, -math.inf) and re.match("[^eE]*[1-9]", text) is not None
    return pa.array(found)


def _rounded(texts: pa.StringArray, numbers: pa.BooleanArray) -> pa.BooleanArray:
    """Which of the ``numbers`` have more digits than the float64 beside them; of some."""
    found = np.zeros(len(texts), bool)
    for number, text in islice(_matching(texts, numbers, _LONG), _SOME):
        digits = len(re.sub(r"[eE].*|\D|^[+-]?0?\.?0*", "", text))
        found[number] = digits > 17 and Decimal(text) != Decimal(f"{float(text):.{digits - 1}e}")
    return pa.array(found)


def _matching(texts: pa.StringArray, chosen: pa.BooleanArray, pattern: str) -> Iterator[tuple[int, str]]:
    """The places and values of the ``chosen`` texts that have ``pattern`` in them."""
    for number in np.flatnonzero(pc.and_(chosen, pc.match_substring_regex(texts, pattern))).tolist():
        yield number, texts[number].as_py()
