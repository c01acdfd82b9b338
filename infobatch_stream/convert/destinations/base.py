"""What a conversion writes to, and what destinations of all kinds say and check alike."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from infobatch_stream.convert.writers import TooLargeError
from infobatch_stream.errors import ConfigError, DataError

__all__ = ["Destination", "Record", "Request", "broken_off", "drop_empty"]

Record = dict[str, Any]
"""What is known of a finished task, as plain values. Its ``files``: names in the destination -> sizes in bytes."""


@dataclass(frozen=True)
class Request:
    """What a conversion wants of its destination.

    overwrite: replace the shards that are there.
    recipe: what makes the shards, as plain values; None for a conversion that cannot be resumed.
    resume: go on with what is there.
    folders: the folders into which shards are written.
    mendable: it may go on though its source was mended.
    """

    overwrite: bool = False
    recipe: Mapping[str, Any] | None = None
    resume: bool = False
    folders: Collection[str] = ()
    mendable: bool = False

    def advise(self, error: BaseException, kept: object) -> str:
        """What to do after ``error``, when shards that are done are ``kept`` somewhere."""
        done = f"The shards that are done are kept in {kept}"
        if not isinstance(error, DataError | TooLargeError):
            return f"{done}: go on with --resume, or remove it."
        if self.mendable:
            return (
                f"{done}: mend or remove what is named, and go on with --resume; or pass over it with --resume "
                "--on-error skip."
            )
        return (
            f"{done}: pass over what is named with --resume --on-error skip. Or mend it, remove {kept}, and begin "
            "anew: to go on, such a source must be as it was."
        )

    def check_recipe(self, where: object, known: bytes) -> None:
        """Raise ConfigError unless the recipe that a conversion began with, as JSON, is that of this one."""
        recipe = self.recipe or {}
        try:
            before = json.loads(known)
            others = sorted(name for name in {*before, *recipe} if before.get(name) != recipe.get(name))
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"the state of the conversion in {where} is damaged ({error}); remove it.") from error
        if others:
            raise ConfigError(
                f"the conversion in {where} was begun with another {', '.join(others)}; resume it with the same "
                "arguments and source, or remove it."
            )


class Destination(Protocol):
    """Takes shards while a conversion runs.

    scratch: a local folder for shards in the making. done: the records of the tasks 0..k-1, done before it was resumed.
    plan: what was written as PLAN before it was resumed; None if nothing. where: all that is kept for that, for people.
    """

    where: str
    scratch: Path
    done: list[Record]
    plan: bytes | None

    def publish(self, record: Record, files: Mapping[str, Path]) -> None:
        """Take the next task's ``files`` (name in the destination -> where it lies in scratch), then its record."""

    def write(self, name: str, text: str) -> None:
        """Write a text file; those come when all shards are there."""


def broken_off(staged: object, dst: object) -> ConfigError:
    """The error for a destination whose conversion was broken off."""
    return ConfigError(
        f"{staged} holds a part of a conversion to {dst} that was broken off, or is running; go on with it (--resume), "
        "or remove it to begin anew."
    )


def drop_empty(done: list[Record]) -> None:
    """Take the last tasks for not done that have no shard: their samples, all passed over, may be mended by now."""
    while done and not done[-1]["files"]:
        done.pop()
