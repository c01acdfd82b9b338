"""The file that a command writes."""

from pathlib import Path

from infobatch_stream.errors import ConfigError

__all__ = ["check_folder"]


def check_folder(out: Path) -> None:
    """Raise ConfigError unless a file ``out`` can be written in its folder, before there is work to lose."""
    if not out.parent.is_dir():
        raise ConfigError(f"{out} cannot be written: there is no folder {out.parent}; make it, or name another file.")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; name a file.")
