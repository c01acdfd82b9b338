"""Which files of this machine a pattern means: braces, then globs, in which ``**`` goes into folders of any depth."""

import os
import re
from glob import glob
from itertools import chain

__all__ = ["expand_all", "expand_braces", "expand_files", "is_wild"]

_WILD = re.compile(r"[*?[]")


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
    """
    if os.path.exists(pattern) or not is_wild(pattern):  # noqa: PTH110
        return [pattern]
    head, rest = _split(pattern)
    if not is_wild(rest):
        return [pattern]
    found = {head + name for name in glob(rest, root_dir=head or None, recursive=True) if name}  # noqa: PTH207
    folders = {name for name in found if os.path.isdir(name)}  # noqa: PTH112
    if found == folders:
        return sorted(folders)
    files = sorted(found - folders)
    if "**" in rest:  # which follows links, so that one file may have several names: the shortest is meant
        names = sorted(files, key=lambda name: name.count("/"), reverse=True)
        files = sorted({os.path.realpath(name): name for name in names}.values())
    return files


def expand_all(text: str) -> list[str]:
    """What ``text`` means, braces and globs, in the order of the braces, each once. Raises as `expand_braces`."""
    return list(dict.fromkeys(chain.from_iterable(map(expand_files, expand_braces(text)))))


def _split(path: str) -> tuple[str, str]:
    """The folder in front of ``path``, as far as it exists as it is written, and the rest: of that a part is a glob."""
    head, rest = "", path
    while "/" in rest:
        part, _, tail = rest.partition("/")
        if not os.path.isdir(f"{head}{part}/"):  # noqa: PTH112
            break
        head, rest = f"{head}{part}/", tail
    return head, rest
