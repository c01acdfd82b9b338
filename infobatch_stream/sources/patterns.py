"""Expands patterns to local files: braces, then globs, in which ``**`` matches folders of any depth."""

import os
import re
from collections.abc import Iterable, Iterator
from glob import glob

__all__ = ["expand_all", "expand_braces", "expand_files", "is_wild", "merged"]

_WILD = re.compile(r"[*?[]")
_STARS = re.compile(r"(^|/)\*\*(/|$)")


def is_wild(text: str) -> bool:
    """Whether there is what a glob gives a meaning."""
    return _WILD.search(text) is not None


def expand_braces(path: str) -> list[str]:
    """``x{1,2}`` -> x1, x2. What exists as it is written, or a folder in front that does, is meant literally.

    Raises ValueError for braces that do not match, ImportError.
    """
    if os.path.exists(path):  # noqa: PTH110  # Path's raises for a name that is too long
        return [path]
    from braceexpand import braceexpand

    head, rest = _split(path)
    return [head + text for text in braceexpand(rest)]


def expand_files(pattern: str) -> list[str]:
    """The paths that ``pattern`` means, after braces: itself if it exists or is no glob, else what it matches, sorted.

    Those are files, each once; or folders, where it matches nothing else. As to a shell, ``*`` matches no hidden name.
    Not by glob's own ``**``, which never ends where links lead back.
    """
    if os.path.exists(pattern) or not is_wild(pattern):  # noqa: PTH110
        return [pattern]
    head, rest = _split(pattern)
    if not is_wild(rest):
        return [pattern]
    found = {name.rstrip("/") for name in _glob(head, rest)}
    folders = {name for name in found if os.path.isdir(name)}  # noqa: PTH112
    return sorted(found - folders or folders)


def _glob(folder: str, pattern: str) -> Iterator[str]:
    """What matches ``pattern``, which is no empty text, in ``folder`` ("" or with a slash behind)."""
    stars = _STARS.search(pattern)
    before = pattern[: stars.start()] if stars else pattern
    for name in glob(before, root_dir=folder or None) if before else [""]:  # noqa: PTH207
        if stars is None:
            yield folder + name
        else:
            for inner in _folders(f"{folder}{name}/" if name else folder):
                yield from _glob(inner, pattern[stars.end() :] or "*")


def _folders(top: str) -> Iterator[str]:
    """``top`` and the folders below it, but for hidden ones, each once: links may lead back."""
    seen: set[tuple[int, int]] = set()
    for folder, names, _ in os.walk(top or ".", followlinks=True):
        status = os.stat(folder)  # noqa: PTH116
        names[:] = sorted((name for name in names if not name.startswith(".")), key=lambda n: (_is_link(folder, n), n))
        if (status.st_dev, status.st_ino) in seen:
            names.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inner = os.path.relpath(folder, top or ".")
        yield top if inner == "." else f"{top}{inner}/"


def _is_link(folder: str, name: str) -> bool:
    return os.path.islink(f"{folder}/{name}")  # noqa: PTH114


def expand_all(text: str) -> list[str]:
    """What ``text`` means, braces and globs, in the order of the braces. Raises as `expand_braces`."""
    return merged((pattern, expand_files(pattern)) for pattern in expand_braces(text))


def merged(found: Iterable[tuple[str, list[str]]]) -> list[str]:
    """All that patterns mean, (pattern, names) of each: what is written out as often as it is, what is found once."""
    names: list[str] = []
    written: set[str] = set()
    for pattern, some in found:
        known = set(names) - ({pattern} & written)
        names += [name for name in some if name not in known]
        written.add(pattern)
    return names


def _split(path: str) -> tuple[str, str]:
    """The folder in front of ``path``, as far as it exists as it is written, and the rest: of that a part is a glob."""
    head, rest = "", path
    while "/" in rest:
        part, _, tail = rest.partition("/")
        if not os.path.isdir(f"{head}{part}/"):  # noqa: PTH112
            break
        head, rest = f"{head}{part}/", tail
    return head, rest
