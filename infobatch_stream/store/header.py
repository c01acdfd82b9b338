"""What a score store says of itself: the header in its group's zarr.json, read with suspicion and replaced whole.

    "attributes": {"infobatch_stream": {"format": 2, "num_samples": N, "fingerprint": "...", "epoch": 3,
                                        "state": "ready", "checksum": CRC-32C of the other fields}}

Whatever stands in these files, reading them ends soon, in little memory, with a Header or a StoreError. docs/format.md
is the specification.
"""

import dataclasses
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

import google_crc32c

from infobatch_stream._files import replacing
from infobatch_stream.errors import StoreError
from infobatch_stream.store.safe_files import read_inside

__all__ = [
    "FORMAT",
    "KEY",
    "MAX_EPOCH",
    "MAX_SAMPLES",
    "METADATA_LIMIT",
    "SOURCE_LIMIT",
    "Header",
    "Seeded",
    "check_is_store",
    "checksum",
    "not_a_store",
    "out_of_range",
    "parse_json",
    "read_header",
    "read_json",
    "remove_leftovers",
    "restore",
    "short",
    "write_header",
]

FORMAT = 2
KEY = "infobatch_stream"
MAX_SAMPLES = 1 << 40  # 4 TiB an array: its shard index still fits into memory
MAX_EPOCH = (1 << 48) - 1  # random draws take 48 bits of it
State = Literal["ready", "apply", "reset"]

_KINDS = {"num_samples": int, "fingerprint": str, "epoch": int, "state": str}
METADATA_LIMIT = 1 << 20  # bytes of a zarr.json we are ready to parse
_FINGERPRINT_LIMIT = 1 << 16  # characters, so that the header stays well below that
SOURCE_LIMIT = 1000  # characters
_DEPTH_LIMIT = 64  # of nested JSON; json would parse more than it can write again
_DIGITS_LIMIT = 1000  # of a number: parsing takes the square of them


@dataclasses.dataclass(frozen=True)
class Seeded:
    """Where the scores came from that a store had before its first epoch.

    Attributes:
        samples: How many samples had one.
        source: Of what they are, in words: at most 1,000 characters.
    """

    samples: int
    source: str

    @classmethod
    def of(cls, found: Any) -> Self | None:
        """From plain values, as of dataclasses.asdict, or None. Raises ValueError for what is neither."""
        if found is None:
            return None
        samples, source = (found.get("samples"), found.get("source")) if isinstance(found, dict) else (None, None)
        if type(samples) is not int or type(source) is not str:
            raise ValueError(f"{short(found)} for where scores were from")
        return cls(samples, source)


@dataclasses.dataclass(frozen=True)
class Header:
    """What the group's attributes say. num_samples: N. epoch: commits so far. state: of the commit protocol.

    seeded: None for a store that began without scores.
    """

    num_samples: int
    fingerprint: str
    epoch: int
    state: State
    seeded: Seeded | None = None

    def replace(self, **changes: Any) -> Self:
        """A copy with ``changes``."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """The value of the group's attribute."""
        fields = {"format": FORMAT, **dataclasses.asdict(self)}
        if self.seeded is None:
            del fields["seeded"]
        return {**fields, "checksum": checksum(fields)}


def checksum(fields: Mapping[str, Any]) -> int:
    """CRC-32C of the canonical JSON of a header's fields, but for the checksum itself."""
    others = {name: value for name, value in fields.items() if name != "checksum"}
    found: int = google_crc32c.value(json.dumps(others, sort_keys=True, separators=(",", ":")).encode("ascii"))
    return found


def not_a_store(path: Path, found: str) -> StoreError:
    """The error for a path at which there is no store of ours."""
    return StoreError(
        f"{path} is not a score store: {found}. Give the path of a store that an InfoBatchLoader made, "
        "or one that does not exist yet, to have it made."
    )


def restore(what: str) -> StoreError:
    """The error for a store that was damaged as ``what`` says: with the way out."""
    return StoreError(
        f"{what}. Begin anew with existing='overwrite'; with a checkpoint, load_state_dict then gives the scores back."
    )


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The object in the file ``name`` of the store at ``path``. Raises StoreError for whatever else is there."""
    try:
        return parse_json(read_inside(path, name, METADATA_LIMIT))
    except (OSError, ValueError) as error:
        raise not_a_store(path, f"{path / name} cannot be read ({error})") from error


def parse_json(text: bytes) -> dict[str, Any]:
    """The object that ``text`` is. Raises ValueError for all else, and for what would take much time to look at."""
    try:
        # NaN and Infinity pass, since Zarr writes them for attributes of others; ours are of other types.
        found = json.loads(text.decode(), object_pairs_hook=_once, parse_int=_whole)
        _check_depth(found)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")  # noqa: TRY004 - of a file, not of an argument
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ: of two equal ones, each reader takes another."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS_LIMIT:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _check_depth(found: Any) -> None:
    level = [found]
    for _ in range(_DEPTH_LIMIT):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {_DEPTH_LIMIT}")


def _fields(path: Path) -> dict[str, Any]:
    """The header as it stands, of a format that is known; nothing else of it is checked."""
    found = read_json(path, "zarr.json").get("attributes")
    fields = found.get(KEY) if isinstance(found, dict) else None
    if not isinstance(fields, dict):
        raise not_a_store(path, f"its attributes have no {KEY!r}")
    version = fields.get("format")
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise StoreError(
            f"{path} has format {short(version)}; this version of infobatch-stream reads formats 1 to {FORMAT}. "
            "Install the version that wrote it, or a newer one."
        )
    return fields


def check_is_store(path: Path) -> None:
    """Raise StoreError unless ``path`` is a store, be it a damaged one: what may be replaced without asking."""
    _fields(path)


def read_header(path: Path) -> Header:
    """The header of the store at ``path``. Raises StoreError for anything that is not one of a known format."""
    fields = _fields(path)
    stated = fields.get("checksum")
    # Format 1 had none. One that is there counts, or a changed byte of the format would switch the check off.
    checked = fields["format"] > 1 or "checksum" in fields
    if checked and (type(stated) is not int or stated != checksum(fields)):
        raise restore(f"{path}: its header does not have the checksum it says: a byte was changed on disk")
    for name, kind in _KINDS.items():
        if type(fields.get(name)) is not kind:
            found = short(fields.get(name))
            raise restore(f"{path}: its attribute {name!r} is {found}, not a {kind.__name__}; the store is damaged")
    try:
        seeded = Seeded.of(fields.get("seeded"))
    except ValueError as error:
        raise restore(f"{path}: its header has {error}; the store is damaged") from error
    header = Header(**{name: fields[name] for name in _KINDS}, seeded=seeded)
    if wrong := out_of_range(header):
        raise restore(f"{path}: its header has {wrong}; the store is damaged")
    return header


def out_of_range(header: Header) -> str | None:
    """Which field of ``header`` has a value that no store can have, if one has."""
    seeded = header.seeded or Seeded(1, "")
    allowed = {
        "num_samples": 1 <= header.num_samples <= MAX_SAMPLES,
        "fingerprint": len(header.fingerprint) <= _FINGERPRINT_LIMIT,
        "epoch": 0 <= header.epoch <= MAX_EPOCH,
        "state": header.state in ("ready", "apply", "reset"),
        "seeded": 1 <= seeded.samples <= header.num_samples and len(seeded.source) <= SOURCE_LIMIT,
    }
    wrong = [name for name, holds in allowed.items() if not holds]
    return f"{wrong[0]} {short(getattr(header, wrong[0]))}, which is out of range" if wrong else None


def short(value: Any) -> str:
    """``value`` as an error shows it: what was read may be a megabyte long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def write_header(path: Path, header: Header) -> None:
    """Replace the header by way of a temporary file; on return the new one is on the disk."""
    metadata = read_json(path, "zarr.json")
    attributes = metadata.get("attributes")
    metadata["attributes"] = {**(attributes if isinstance(attributes, dict) else {}), KEY: header.to_json()}
    with replacing(path / "zarr.json", durable=True) as new:
        new.write_text(json.dumps(metadata, indent=2))


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that were killed. The caller holds the store alone."""
    for file in path.glob(".zarr.json.*"):
        with suppress(OSError):
            file.unlink()
