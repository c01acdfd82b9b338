"""Problems of shards: what is wrong, where, and how many there are of each severity."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from infobatch_stream._formatting import visible
from infobatch_stream.verify.members import Members

__all__ = ["LISTED", "Checked", "Checks", "Diagnostics", "Problem", "Severity"]

LISTED = 10  # problems of one severity in one file; a damaged shard has as many as samples
_SHOWN = 400  # characters of a text that holds what was found in a file


class Severity(StrEnum):
    """error: samples are lost, damaged or not what was asked for. warning: suspicious. note: good to know."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Problem:
    """One problem of a file; of a sample, with its row in the shard and, in tars, its key."""

    severity: Severity
    file: str
    what: str
    row: int | None = None
    key: str | None = None

    def __str__(self) -> str:
        """One line of text; control characters that come from a file are escaped."""
        named = self.row is None and self.file in self.what  # the error of another module names it already
        places = [] if named else [self.file]
        places += [] if self.row is None else [f"row {self.row}"]
        places += [] if self.key is None else [f"key {self.key!r}"]
        text = f"{self.severity}: {', '.join(places)}{': ' if places else ''}{self.what}"
        return visible(text)


class Diagnostics:
    """The problems of one file. All are counted, and the first `LISTED` of each severity are kept.

    counts: severity -> number.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.counts: Counter[Severity] = Counter()
        self._problems: list[Problem] = []

    def add(
        self, severity: Severity, what: str, row: int | None = None, key: str | None = None, file: str | None = None
    ) -> None:
        """Add a problem. file: which file it is of, where these are the diagnostics of a whole set."""
        self.counts[severity] += 1
        if self.counts[severity] <= LISTED:
            self._problems.append(Problem(severity, file or self.file, what[:_SHOWN], row, key and key[:_SHOWN]))

    def error(self, what: str, row: int | None = None, key: str | None = None) -> None:
        """Add an error."""
        self.add(Severity.ERROR, what, row, key)

    def add_rows(self, severity: Severity, rows: Iterable[int], what: str, key: Callable[[int], str]) -> None:
        """Add the same problem for several samples; key: gives the key of a row."""
        for row in rows:
            known = self.counts[severity] < LISTED
            self.add(severity, what, int(row), key(row) if known else None)

    def problems(self) -> tuple[Problem, ...]:
        """The problems that were kept, and for each severity a line that says how many more there are."""
        more = (
            Problem(severity, self.file, f"{count - LISTED:,} more {severity}s, which are not listed")
            for severity, count in self.counts.items()
            if count > LISTED
        )
        return (*self._problems, *more)


@dataclass(frozen=True)
class Checks:
    """Which checks are asked for.

    columns: columns that each sample must have. decode: decode images and arrays. contents: compute a digest of each
    sample's content, that of ``columns`` if there are any.
    """

    columns: tuple[str, ...] = ()
    decode: bool = False
    contents: bool = False


@dataclass(frozen=True)
class Checked:
    """What the check of one shard found.

    samples, size: number of samples, and bytes of the files.
    contents, labels, keys: for each sample a digest of its content (16 bytes), a `label_code` and a digest of its key
        (8 bytes each), concatenated; b"" if they were not asked for, or there are none.
    indexed, readable, members: of a tar, whether it has an index, whether it could be read, and its members.
    """

    diagnostics: Diagnostics
    samples: int = 0
    size: int = 0
    contents: bytes = b""
    labels: bytes = b""
    keys: bytes = b""
    indexed: bool = True
    readable: bool = True
    members: Members = field(default_factory=Members)
