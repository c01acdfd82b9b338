"""Where a score store is: a path that users give, made one that stays what it is."""

import os
import re
from contextlib import suppress
from pathlib import Path

from infobatch_stream._platform import fill_in_node
from infobatch_stream.errors import ConfigError

__all__ = ["location", "location_on_node"]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # a Path makes one slash of two


def location(path: str | os.PathLike[str]) -> Path:
    """The absolute ``path`` without links, "~" expanded: so that links and a chdir later on change nothing.

    Raises ConfigError for what is no path of a local folder.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(f"the score store is {path!r}; give the path of a folder, as 'scores.zarr'.")
    if url := _URL.match(text):
        if url[1].lower() == "file":
            remedy = "Give the path alone."
        else:
            remedy = "Give a local path. To keep the scores, save loader.state_dict() there, or copy the folder later."
        raise ConfigError(
            f"{text} is a URL, and a score store is a folder of this machine that is mapped into memory. {remedy}"
        )
    try:
        found = Path(os.path.realpath(Path(text).expanduser()))
    except RuntimeError as error:
        raise ConfigError(f"{text}: {error}. For a folder of this name write ./{text}.") from error
    with suppress(OSError):  # of a name that no disk takes, say: whoever makes the store hears of it
        if found.is_symlink():
            raise ConfigError(f"{text} is a symbolic link that leads in a circle; remove it, or give another path.")
    return found


def location_on_node(path: str | os.PathLike[str]) -> Path:
    """The `location` of a run's store on this node: ``path`` with ``{node}`` filled in."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    return location(fill_in_node(text) if isinstance(text, str) else text)
