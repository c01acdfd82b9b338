"""What a reader says of itself: which data it recognises, and how they are opened."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from infobatch_stream.convert.readers.options import Options
from infobatch_stream.formats.schema import SampleSet

__all__ = ["Found", "InputFormat"]


@dataclass(frozen=True)
class Found:
    """What was found in a folder, for error messages, and how it is opened."""

    what: str
    open: Callable[[Options], Sequence[SampleSet]]


@dataclass(frozen=True)
class InputFormat:
    """One kind of data that can be converted; `detect` has the list of all.

    expected: what it looks like, for error messages.
    find: of a folder and the names of its files (sorted, none hidden) what is of this kind.
    is_file: whether a file of this name is of this kind.
    open_files: reads files that all are.
    owns_folders: class folders beside it are a part of it, and no other kind of data.
    """

    expected: str
    find: Callable[[Path, Sequence[str]], Found | None]
    is_file: Callable[[str], bool] = lambda name: False
    open_files: Callable[[Sequence[str], Options], Sequence[SampleSet]] | None = None
    owns_folders: bool = False
