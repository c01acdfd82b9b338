"""What is wrong with shards: problems, their places, and how many there are of each severity."""

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
    """One problem: the file, of a sample its row in the shard and (tars) its key, and what is wrong."""

    severity: Severity
    file: str
    what: str
    row: int | None = None
    key: str | None = None

    def __str__(self) -> str:
        """One line, in which nothing that a file holds can move the cursor."""
        named = self.row is None and self.file in self.what  # by another module, whose error it is
        places = [] if named else [self.file]
        places += [] if self.row is None else [f"row {self.row}"]
        places += [] if self.key is None else [f"key {self.key!r}"]
        text = f"{self.severity}: {', '.join(places)}{': ' if places else ''}{self.what}"
        return visible(text)


class Diagnostics:
    """The problems of one file: all are counted, the first of each severity are kept.

    counts: severity -> number.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.counts: Counter[Severity] = Counter()
        self._problems: list[Problem] = []

    def add(
        self, severity: Severity, what: str, row: int | None = None, key: str | None = None, file: str | None = None
    ) -> None:
        """One problem; of a ``file`` of its own, where these are the diagnostics of a whole set."""
        self.counts[severity] += 1
        if self.counts[severity] <= LISTED:
            self._problems.append(Problem(severity, file or self.file, what[:_SHOWN], row, key and key[:_SHOWN]))

    def error(self, what: str, row: int | None = None, key: str | None = None) -> None:
        """One error."""
        self.add(Severity.ERROR, what, row, key)

    def add_rows(self, severity: Severity, rows: Iterable[int], what: str, key: Callable[[int], str]) -> None:
        """The same problem of several samples."""
        for row in rows:
            known = self.counts[severity] < LISTED
            self.add(severity, what, int(row), key(row) if known else None)

    def problems(self) -> tuple[Problem, ...]:
        """Those that were kept, and of each severity how many more there are."""
        more = (
            Problem(severity, self.file, f"{count - LISTED:,} more {severity}s, which are not listed")
            for severity, count in self.counts.items()
            if count > LISTED
        )
        return (*self._problems, *more)


@dataclass(frozen=True)
class Checks:
    """What is asked for: columns each sample must have, images and arrays decoded, a digest of each sample's content.

    The content is that of ``columns`` where they are given.
    """

    columns: tuple[str, ...] = ()
    decode: bool = False
    contents: bool = False


@dataclass(frozen=True)
class Checked:
    """What was found in one shard of so many samples, in files of so many bytes.

    contents, labels, keys: of each sample a digest of its content (16 bytes), a `label_code` and a digest of its key
        (8 bytes each), one behind the other; b"" where they were not asked for, or there are none.
    indexed, readable, members: of a tar, whether it has its index, and could be read; what members samples have.
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
