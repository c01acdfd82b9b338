"""Checks of the samples of an MDS shard, which is read once as a stream."""

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.formats.mds_index import IndexedShard, MdsColumn
from infobatch_stream.formats.mds_samples import Frame
from infobatch_stream.formats.roles import LABELS, content_of, label_among
from infobatch_stream.verify.checksums import BLOCK, Stream
from infobatch_stream.verify.diagnostics import Checks, Diagnostics, Severity
from infobatch_stream.verify.duplicates import digest, label_code
from infobatch_stream.verify.validators import Check, mds_check

__all__ = ["MdsSamples"]

_LARGEST_CONFIG = 1 << 20  # bytes
_IMAGES = ("jpeg", "png", "pil", "jpeg_array", "jpegarray")


class MdsSamples:
    """The samples of one shard, as index.json describes it, taken from a stream.

    classes: the number of classes, which labels are compared with; None compares none.
    """

    def __init__(self, entry: IndexedShard, classes: int | None, checks: Checks, diagnostics: Diagnostics) -> None:
        self._columns, self._samples, self._size = entry.columns, entry.samples, entry.raw.size
        self._classes, self._diagnostics = classes, diagnostics
        self._digests: list[bytes] = []
        self._frame = Frame(entry.sizes)
        self._checks: list[Check | None] = [mds_check(encoding, checks.decode) for encoding in entry.encodings.values()]
        names = {name: encoding in _IMAGES for name, encoding in entry.encodings.items()}
        content = checks.columns or content_of(names)
        compares = checks.contents and names.keys() >= set(content)  # what is missing is an error
        self._content = [k for k, name in enumerate(names) if name in content] if compares else None
        self._labels: list[bytes] = []
        label = label_among(names)
        self._label = None if label is None else list(names).index(label)

    def contents(self) -> tuple[bytes, bytes]:
        """The digests of the samples that could be read, and the codes of their labels."""
        return b"".join(self._digests), b"".join(self._labels)

    def read(self, stream: Stream) -> None:
        """Check the samples in the stream; of a damaged shard, those whose bounds are known."""
        offsets = self._offsets(stream)
        first = 0
        while offsets is not None and first < len(offsets) - 1:
            last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + BLOCK, "right")) - 1)
            data = stream.read(int(offsets[last] - offsets[first]))
            if len(data) < offsets[last] - offsets[first]:
                self._diagnostics.error("it ends within a sample", first)
                return
            self._check_rows(first, offsets[first : last + 1] - offsets[first], data)
            first = last

    def _offsets(self, stream: Stream) -> NDArray[np.int64] | None:
        """int64[samples + 1]: where samples begin, and the last ends; None if the table of offsets is damaged."""
        wanted = self._samples
        count = int.from_bytes(stream.read(4), "little")
        if count != wanted:
            self._diagnostics.error(f"it holds {count:,} samples, index.json says {wanted:,}")
            return None
        table = stream.read(4 * (count + 1))
        if len(table) < 4 * (count + 1):
            self._diagnostics.error("it ends within its table of offsets")
            return None
        offsets = np.frombuffer(table, "<u4").astype(np.int64)
        begin = 4 + len(table)
        bad = np.flatnonzero(np.diff(offsets) <= 0)
        if bad.size:
            row = int(bad[0])
            self._diagnostics.error(f"a sample has the bytes {offsets[row]:,} to {offsets[row + 1]:,}", row)
        elif not begin <= offsets[0] <= begin + _LARGEST_CONFIG:
            self._diagnostics.error(f"its samples begin at byte {offsets[0]:,}, its table of offsets ends at {begin:,}")
        elif offsets[-1] != self._size:
            self._diagnostics.error(f"its samples end at byte {offsets[-1]:,} of {self._size:,}")
        else:
            self._check_config(stream.read(int(offsets[0]) - begin))
            return offsets
        return None

    def _check_config(self, data: bytes) -> None:
        try:
            config = json.loads(data)
            found = list(zip(*(config[f"column_{part}"] for part in ("names", "encodings", "sizes")), strict=True))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._diagnostics.error(f"the description of its columns is damaged ({type(error).__name__}: {error})")
            return
        if found != list(self._columns):
            self._diagnostics.error(f"its columns are {found}, index.json says {list(self._columns)}")

    def _check_rows(self, first: int, bounds: NDArray[np.int64], data: bytes) -> None:
        """Check the samples first, first + 1, ... that lie in ``data`` at ``bounds``, int64[samples + 1]."""
        values, lengths = np.frombuffer(data, np.uint8), np.diff(bounds)
        starts, sizes, sums = self._frame.rows(values, bounds)
        bad = sums != lengths
        for row in np.flatnonzero(bad).tolist():
            self._diagnostics.error(f"a sample of {lengths[row]:,} bytes has values of {sums[row]:,}", first + row)
        ends = starts + sizes
        good = np.flatnonzero(~bad).tolist()
        for column, check in enumerate(self._checks):
            self._check_label(column, first, good, starts[:, column], values)
            if self._columns[column][1] in _IMAGES:
                for row in np.flatnonzero(~bad & (sizes[:, column] == 0)).tolist():
                    what = f"column {self._columns[column][0]!r} is empty, and no image"
                    self._diagnostics.add(Severity.WARNING, what, first + row)
            if check is None:
                continue
            for row, start, end in zip(good, starts[good, column].tolist(), ends[good, column].tolist(), strict=True):
                try:
                    check(data[start:end])
                except Exception as error:  # decoders raise nearly anything
                    self._diagnostics.error(_undecodable(self._columns[column], error), first + row)
        if self._content is not None:
            self._add_digests(data, bounds, bad, starts, ends)

    def _check_label(
        self, column: int, first: int, good: Sequence[int], starts: NDArray[np.int64], values: NDArray[np.uint8]
    ) -> None:
        """Check that labels are below the number of names in classes.json."""
        name, encoding, size = self._columns[column]
        classes = self._classes
        if classes is None or name not in LABELS or not size or "int" not in encoding:
            return
        dtype = np.dtype(f"<{'u' if encoding.startswith('u') else 'i'}{size}")
        labels = values[starts[good][:, None] + np.arange(size)].view(dtype)[:, 0]
        for place in np.flatnonzero((labels < 0) | (labels >= classes)).tolist():
            what = f"column {name!r} holds {labels[place]}, classes.json names {classes:,} classes"
            self._diagnostics.error(what, first + good[place])

    def _add_digests(
        self, data: bytes, bounds: NDArray[np.int64], bad: NDArray[np.bool_],
        starts: NDArray[np.int64], ends: NDArray[np.int64],
    ) -> None:  # fmt: skip
        for row in range(len(bad)):
            if bad[row]:
                parts = [data[bounds[row] : bounds[row + 1]]]
            else:
                parts = [data[starts[row, column] : ends[row, column]] for column in self._content or ()]
            self._digests.append(digest((len(part), iter([part])) for part in parts))
            label = None
            if self._label is not None and not bad[row]:
                label = _text_of(data[starts[row, self._label] : ends[row, self._label]], self._columns[self._label])
            self._labels.append(label_code(label))


def _undecodable(column: MdsColumn, error: Exception) -> str:
    return f"column {column[0]!r} is no {column[1]} ({type(error).__name__}: {error})"


def _text_of(data: bytes, column: MdsColumn) -> bytes:
    """A label as text: whole numbers are stored as 1 to 8 bytes."""
    _, encoding, size = column
    if not size or "int" not in encoding:
        return data
    return b"%d" % int.from_bytes(data, "little", signed=not encoding.startswith("u"))
