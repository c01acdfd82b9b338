"""What a reader says of itself: which data it recognises, and how they are opened."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from infobatch_stream.convert.readers.options import Options
from infobatch_stream.formats.schema import SampleSet

__all__ = ["InputFormat", "files_in"]


@dataclass(frozen=True)
class InputFormat:
    """One kind of data that can be converted; `detect` has the list of all.

    expected: what it looks like, for error messages.
    found: of a folder and the names of its files (sorted, none hidden) what is of this kind, for error messages; "" if
        nothing is.
    open_folder: reads a folder in which something was found.
    is_file: whether a file of this name is of this kind.
    open_files: reads files that all are.
    owns_folders: class folders beside it are a part of it, and no other kind of data.
    """

    expected: str
    found: Callable[[Path, Sequence[str]], str]
    open_folder: Callable[[Path, Options], Sequence[SampleSet]]
    is_file: Callable[[str], bool] = lambda name: False
    open_files: Callable[[Sequence[str], Options], Sequence[SampleSet]] | None = None
    owns_folders: bool = False


def files_in(folder: Path) -> list[str]:
    """The names of the files in ``folder`` that are not hidden, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
