"""A file that appears under its name when it is whole."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infobatch_stream.errors import ConfigError

__all__ = ["whole_file"]


@contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """A new file beside ``out`` to write to; it takes the place of ``out`` at the end, or is removed after an error.

    Of a link the file that it leads to is replaced. What is no file, as a pipe or a device, is written to itself.
    Raises ConfigError at once where ``out`` is a folder, or would lie in none, and OSError that names ``out``.
    """
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; give the name of a file, as {out / 'NAME'}.")
    if out.exists() and not out.is_file():
        yield out
        return
    place = Path(os.path.realpath(out))
    if not place.parent.is_dir():
        raise ConfigError(
            f"{out} cannot be written: there is no folder {place.parent}. Make it, or name another place."
        )
    new = place.with_name(f".{place.name[:200]}.{secrets.token_hex(4)}.new")
    try:
        with new.open("xb"):
            pass
        yield new
        new.replace(place)
    except OSError as error:
        if error.filename == str(new):  # nobody knows that name
            error.filename, error.filename2 = str(out), None
        raise
    finally:
        new.unlink(missing_ok=True)
