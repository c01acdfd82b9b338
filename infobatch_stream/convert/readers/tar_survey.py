"""What the indexes of tars tell of their samples, and of which type the columns therefore are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.formats.extensions import encoding_of
from infobatch_stream.formats.mds_encodings import fit, fit_exactly
from infobatch_stream.formats.tar_index import TarIndex

__all__ = ["Odd", "Survey", "encoding_for", "fits", "why_unfit"]

_INT_LENGTH = 20  # characters of an int64, at most
_FEW = 0.1  # the share of odd samples up to which those are left out (if that is allowed), and the type stays


@dataclass
class Odd:
    """Samples of which a column is not as it should be: how many, and why and where the first is.

    fitting: those of them whose value has the type of the column all the same, though in other bytes.
    """

    count: int = 0
    first: str = ""
    fitting: int = 0

    def add(self, count: int, first: str) -> None:
        """So many more."""
        self.first = self.first or first
        self.count += count

    def keeps_type(self, total: int, *, skip: bool) -> bool:
        """Whether the column, of ``total`` samples, is still of its type; ``skip``: samples may be left out."""
        return self.count == 0 or (skip and self.count <= _FEW * total)


@dataclass
class Survey:
    """Facts on the samples of tars, column by column.

    absent: the member is missing or empty. long: it is too long for an int64. bytes: of all members together.
    bare: samples without a member of any column. order: of the columns in every sample that counts, as `set_order`
    finds it; None where samples do not have the same members in the same order.
    """

    columns: int
    total: int = 0
    bytes: int = 0
    absent: list[Odd] = field(default_factory=list)
    long: list[Odd] = field(default_factory=list)
    bare: Odd = field(default_factory=Odd)
    order: list[int] | None = None

    def __post_init__(self) -> None:
        """Nothing is odd yet."""
        self.absent = [Odd() for _ in range(self.columns)]
        self.long = [Odd() for _ in range(self.columns)]

    def add(self, index: TarIndex, picked: NDArray[np.int64], path: str) -> None:
        """Look at one tar, whose samples have the members ``picked`` (-1: none), int64[n, columns]."""
        if not len(index):
            return
        missing = picked < 0
        lengths = np.where(missing, 0, index.length[picked])
        self.total += len(index)
        self.bytes += int(lengths.sum())
        for odd, rows, why in [
            *((self.absent[k], lengths[:, k] == 0, "it has none, or an empty one") for k in range(self.columns)),
            *((self.long[k], lengths[:, k] > _INT_LENGTH, "it is longer than a number") for k in range(self.columns)),
            (self.bare, missing.all(axis=1), "none of the members that are converted"),
        ]:
            if count := int(rows.sum()):
                odd.add(count, f"{path}, sample {index.key(int(rows.argmax()))!r}: {why}")

    def set_order(
        self, tars: Iterable[tuple[TarIndex, NDArray[np.int64]]], required: Sequence[int], *, skip: bool
    ) -> None:
        """Find the order. Where samples may be left out, those without a ``required`` column do not count."""
        found: tuple[list[int], list[str]] | None = None
        for index, every in tars:
            picked = every
            if skip and len(every):
                left = (every < 0).all(axis=1)
                for column in required:
                    left |= (every[:, column] < 0) | (index.length[every[:, column]] == 0)
                picked = every[~left]
            if not len(picked):
                continue
            order, codes = picked.argsort(axis=1), index.extension[picked]
            if (picked < 0).any() or (order != order[0]).any() or (codes != codes[0]).any():
                return
            here = order[0].argsort().tolist(), [index.extensions[code] for code in codes[0]]
            if found not in (None, here):
                return
            found = here
        self.order = [] if found is None else found[0]


def encoding_for(extensions: Sequence[str]) -> str:
    """The MDS encoding of a column whose members have these ``extensions``, as far as names can tell."""
    encodings = {encoding_of(extension) for extension in extensions}
    if len(encodings - {"jpeg", "png"}) > 1:
        return "bytes"
    return next(iter(encodings - {"png"}), "png")


def why_unfit(data: bytes, encoding: str) -> str:
    """Why a member does not fit its column; "" where it does."""
    try:
        fit_exactly(data, encoding)
    except ValueError as error:
        return str(error)
    return ""


def fits(data: bytes, encoding: str) -> bool:
    """Whether a member that is `why_unfit` would still be stored, where the user gives the encoding."""
    try:
        fit(data, encoding)
    except ValueError:
        return False
    return encoding != "json"
