"""The files that conversions write, to tell them from the user's files, which are never replaced."""

import re
from collections.abc import Collection, Iterable

from infobatch_stream.errors import ConfigError

__all__ = ["PLAN", "STATE", "is_ours", "refuse_foreign", "refuse_other_sets"]

STATE = ".conversion"
"""Folder in an unfinished destination, with the recipe of the conversion and what is done so far."""

PLAN = f"{STATE}/plan.json"
"""The shard plan, as it was made when the conversion began."""

_OURS = re.compile(
    r"(classes|columns|index|shards)\.json|shard\.[0-9]{5,}\.mds(\.[0-9a-z]{1,8})?|shard-[0-9]{6,}\.tar(\.index\.npz)?"
)


def is_ours(name: str) -> bool:
    """Whether a file of this name (or path) is a part of a set of shards."""
    return name.startswith(f"{STATE}/") or _OURS.fullmatch(name.rpartition("/")[2]) is not None


def refuse_foreign(dst: object, names: Iterable[str]) -> None:
    """Raise ConfigError if ``dst`` holds files (paths in it) that are no part of a set of shards.

    Otherwise a conversion to the wrong folder, a home directory say, would replace what is there.
    """
    for name in names:
        if not is_ours(name):
            raise ConfigError(
                f"{dst} holds {name}, which is no part of a set of shards, so it is not replaced; remove it yourself, "
                "or give another."
            )


def refuse_other_sets(dst: object, names: Iterable[str], folders: Collection[str]) -> None:
    """Raise ConfigError if ``dst`` holds files (paths in it) in other folders than the splits ``folders``.

    Those were written by other conversions.
    """
    for name in names:
        folder = name.rpartition("/")[0]
        if folder and folder not in folders and not name.startswith(f"{STATE}/"):
            raise ConfigError(
                f"{dst} holds shards in {folder}, and what is converted now has no split of that name, so it may be "
                "another dataset and is not replaced; remove it yourself, or give another folder."
            )
