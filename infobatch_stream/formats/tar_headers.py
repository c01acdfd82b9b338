"""The headers of a tar: the names of its regular members, and where their bytes are.

Python's tarfile trusts headers. A hostile tar of a few KiB makes it loop for ever (a negative size leads back to an
earlier position) or allocate gigabytes (by an extended header that claims them, or whose records overlap). Here the
position only grows, nothing is read beyond the end of the file, and no header takes more than 1 MiB. What is accepted
is read as tarfile, and so webdataset, reads it; the fuzz tests compare the two.
"""

import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

__all__ = ["HEADER", "LENGTH_AT", "LENGTH_DIGITS", "Member", "TarError", "length_in", "read_members"]

HEADER = _BLOCK = 512  # bytes of a header, which is right before the payload
LENGTH_AT, LENGTH_DIGITS = 124, 11  # where a header says the payload's length, nearly always in octal digits
_LONGEST = 1 << 20  # bytes of a long name or an extended header; Linux takes paths of 4096 at most
_SHOWN = 200  # characters of a name in an error
_REGULAR = (b"0", b"\0", b"7")
_EMPTY = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes: no payload, whatever their size says
_LINKS = (b"1", b"2")
_LONG_NAME, _LONG_LINK, _GLOBAL, _SPARSE = b"L", b"K", b"g", b"S"
_AHEAD = (_LONG_NAME, _LONG_LINK, _GLOBAL, b"x", b"X")
_SIGNED = struct.Struct("148b8x356b")  # a header without its checksum, as some old programs summed it up
# Mode, owner, group, time, device. They are not used, but where one is no number, tarfile sees the end of the tar.
_UNUSED = ((100, 108), (108, 116), (116, 124), (136, 148), (329, 337), (337, 345))


class TarError(Exception):
    """A tar that is damaged, or in a form that cannot be read by index."""


class Member(NamedTuple):
    """A regular member: its name, and offset and length of its payload in bytes."""

    name: str
    offset: int
    length: int


def read_members(file: BinaryIO, size: int, link: Callable[[str], object] = lambda name: None) -> Iterator[Member]:
    """The regular members of the tar ``file`` of ``size`` bytes, in order. Raises TarError and OSError.

    link: called with the name of each hard or symbolic link; links are skipped, as by webdataset. Payloads are within
    the file and do not overlap. Memory does not depend on the size of the tar.
    """
    position = 0
    ahead: dict[str, str] = {}  # by extended headers, about the next member; the first counts, as in tarfile
    while position <= size:
        file.seek(position)
        block = file.read(_BLOCK)
        if not any(block):
            if ahead or size < _BLOCK:
                raise TarError(f"it ends at byte {position:,} with a member missing")
            return
        length = _checked_size(block, position)
        kind, position = block[156:157], position + _BLOCK
        if kind in _AHEAD:
            if length > min(_LONGEST, size - position):
                raise TarError(f"a header before byte {position:,} claims {length:,} bytes of names")
            data = file.read(_padded(length))
            position += _padded(length)
            found = {"path": _text(data)} if kind == _LONG_NAME else {} if kind == _LONG_LINK else _records(data)
            if kind == _GLOBAL and found:
                raise TarError(f"a header before byte {position:,} gives all members the same {' and '.join(found)}")
            ahead = {"header": "", **found, **ahead}
            continue
        name = ahead.get("path", _name(block))
        length = int(ahead.get("size", length))
        if kind == _SPARSE or "sparse" in ahead:
            raise TarError(
                f"member {name[:_SHOWN]!r} is sparse, so its bytes do not lie in one piece (GNU tar: --sparse)"
            )
        ahead = {}
        if kind in _EMPTY or (kind == b"\0" and _text(block[:100]).endswith("/")):  # an old form of a folder
            if kind in _LINKS:
                link(name)
            continue
        if length > size - position:
            raise TarError(f"member {name[:_SHOWN]!r} ends beyond the end of the file")
        if kind in _REGULAR:
            yield Member(name, position, length)
        position += _padded(length)
    raise TarError("its last member is cut off")


def length_in(header: bytes) -> int:
    """The length of a payload by the header before it, without extended headers; -1 if it is no header."""
    try:
        return int(header[LENGTH_AT : LENGTH_AT + LENGTH_DIGITS], 8)  # as nearly all are; the others cost more
    except ValueError:
        try:
            return _number(header[LENGTH_AT : LENGTH_AT + LENGTH_DIGITS + 1])
        except (ValueError, IndexError):
            return -1


def _checked_size(block: bytes, position: int) -> int:
    """The size field of a header. Raises TarError if it is not a valid header."""
    try:
        if len(block) < _BLOCK:
            raise ValueError
        checksum, unsigned = _number(block[148:156]), 256 + sum(block) - sum(block[148:156])
        if checksum != unsigned and checksum != 256 + sum(_SIGNED.unpack(block)):
            raise ValueError
        for start, stop in _UNUSED:
            _number(block[start:stop])
        size = _number(block[LENGTH_AT : LENGTH_AT + LENGTH_DIGITS + 1])
    except ValueError:
        # To tarfile a damaged header, except the first, is the end of the tar: samples would be lost silently.
        raise TarError(f"there is no member header at byte {position:,}, and no end marker") from None
    if size < 0:
        raise TarError(f"the header at byte {position:,} gives a negative size")
    return size


def _number(field: bytes) -> int:
    if field[0] in (0o200, 0o377):  # base 256, by GNU tar
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0o377 else 0)
    return int(field.partition(b"\0")[0].decode("ascii").strip() or "0", 8)


def _name(block: bytes) -> str:
    prefix = _text(block[345:500])
    return f"{prefix}/{_text(block[:100])}" if prefix else _text(block[:100])


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _records(data: bytes) -> dict[str, str]:
    """Path, size, and whether sparse, from the records "length key=value\\n" of an extended header."""
    found: dict[str, str] = {}
    start = 0
    while start < len(data) and data[start]:
        digits, space, _ = data[start : start + 8].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = data[start : start + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if len(record) < length or not record.endswith(b"\n") or not (key and equals):  # nor is one of length 0 one
            raise TarError(f"an extended header is damaged at its byte {start:,}")
        if key == b"path":
            found["path"] = value.decode("utf-8", "surrogateescape").rstrip("/")
        elif key == b"size":
            if not value.isdigit() or len(value) > 20:
                raise TarError(f"an extended header gives the size {value[:20]!r}")
            found["size"] = value.decode()
        elif key.startswith(b"GNU.sparse."):
            found["sparse"] = ""
        start += length
    return found


def _padded(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK
