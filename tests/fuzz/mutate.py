"""Mutations that know the formats: fields take values of interest, and checksums are made right again.

Without the latter, hardly an input would get past the first header.
"""

import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from typing import Any

from infobatch_stream.store.header import checksum

from .seeds import END, extended, header, record, signed

NUMBERS = (
    0,
    1,
    -1,
    2,
    5,
    100,
    511,
    512,
    513,
    -512,
    -1024,
    4096,
    2**20,
    2**31,
    2**32 - 1,
    2**33,
    2**63 - 1,
    2**63,
    10**18,
)
NAMES = (
    b"a.jpg",
    b"a.cls",
    b"b.x",
    b"README",
    b"__x__/a",
    b"../../a.b",
    b"/a.b",
    b"a\nb.c",
    b"\xff\xfe.x",
    b".",
    b"a/",
)
KINDS = tuple(bytes([kind]) for kind in b"\0" + b"01234567SLKxXgAZ")
KEYS = (b"path", b"size", b"GNU.sparse.map", b"GNU.sparse.size", b"hdrcharset", b"mtime", b"linkpath", b"comment", b"")
VALUES = (b"", b"0", b"5", b"512", b"-1", b"1_0", b"9" * 30, b"a.jpg", b"x/y.z", b"BINARY", b"a/" * 100, b"\0", b"0,1")
JSON = (
    0, 1, -1, 5, 6, 2.5, 2**31, 2**40, 2**63, 10**400, float("nan"), float("inf"), True, False, None, "", "apply",
    "reset", "5", "../../x", "\ud800", "x" * 70_000, [], {}, [5], [6], [[5]], [0], ["bytes"], {"name": "gzip"},
    "little", "big", "float64", "start", "sharding_indexed",
)  # fmt: skip

Mutation = Callable[[random.Random, bytes, list[bytes]], bytes]


def any_bytes(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Bytes changed, removed, repeated or cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 64, 512))
        match rng.randrange(6):
            case 0:
                del changed[at : at + length]
            case 1:
                changed[at:at] = changed[at : at + length]
            case 2:
                del changed[at:]
            case 3:
                value = rng.choice(NUMBERS) % 256**8
                changed[at : at + 8] = value.to_bytes(8, rng.choice(("big", "little")))
            case _:
                changed[at : at + 1] = bytes([rng.randrange(256)])
    return bytes(changed)


def tar(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """A tar whose blocks are changed, repeated, exchanged with another's or made anew."""
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(blocks) + 1)
        match rng.randrange(8):
            case 0:
                del blocks[at : at + rng.choice((1, 1, 2))]
            case 1:
                other = rng.choice(others)
                start = rng.randrange(0, len(other) + 1, 512)
                blocks[at:at] = [
                    other[place : place + 512] for place in range(start, min(start + 1024, len(other)), 512)
                ]
            case 2:
                blocks.insert(at, header(rng.choice(NAMES), rng.choice(NUMBERS), rng.choice(KINDS)))
            case 3:
                records = b"".join(record(rng.choice(KEYS), rng.choice(VALUES)) for _ in range(rng.randrange(1, 4)))
                blocks.insert(
                    at, extended(records[: rng.choice((3, 50, 9999))], rng.choice((b"x", b"x", b"X", b"g", b"L")))
                )
            case _ if at < len(blocks) and len(blocks[at]) == 512:
                blocks[at] = _changed_header(rng, blocks[at])
    if rng.random() < 0.1:
        blocks.append(END)
    return b"".join(blocks)


def _changed_header(rng: random.Random, block: bytes) -> bytes:
    changed = bytearray(block)
    match rng.randrange(5):
        case 0:
            changed[156:157] = rng.choice(KINDS)
        case 1:
            changed[124:136] = header(size=rng.choice(NUMBERS))[124:136]
        case 2:
            name = rng.choice(NAMES)
            changed[: len(name) + 1] = name + b"\0"
        case 3:
            changed[rng.choice((100, 130, 148, 300, 345, 386, 482))] = rng.randrange(256)
        case _:
            changed[rng.randrange(512)] = rng.randrange(256)
    return signed(changed) if rng.random() < 0.9 else bytes(changed)


def npz(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """A kept index in which an array, a .npy header or the zip is changed; the checksum of the entry is right again."""
    changed = bytearray(data)
    entries = [match.start() for match in re.finditer(b"PK\3\4", data)]
    contents = [match.start() for match in re.finditer(b"PK\1\2", data)]
    if len(entries) != len(contents) or not entries or rng.random() < 0.2:
        return any_bytes(rng, data, others)
    number = rng.randrange(len(entries))
    start = entries[number] + 30 + int.from_bytes(data[entries[number] + 26 :][:2], "little")
    start += int.from_bytes(data[entries[number] + 28 :][:2], "little")
    stop = (entries + contents[:1])[number + 1]
    if rng.random() < 0.2:  # a claim of the zip itself
        place = (
            contents[number] + rng.choice((8, 10, 20, 24, 28, 30, 42))
            if rng.random() < 0.7
            else len(data) - rng.randrange(1, 23)
        )
        changed[place : place + 4] = (rng.choice(NUMBERS) % 2**32).to_bytes(4, "little")
        return bytes(changed)
    if rng.random() < 0.2:  # a claim of the .npy, whose length stays
        text = rng.choice((b"'|O'", b"(9,)", b"(9999999999999,)", b"(1,9)", b"'<f8'", b"'>i8'", b"()", b"(((", b"True"))
        place = start + rng.choice((10, 20, 21, 45, 60, 61))
    else:
        text = (rng.choice(NUMBERS) % 2**64).to_bytes(8, "little")[: rng.choice((1, 4, 8))]
        place = start + 128 + 4 * rng.randrange(max(1, (stop - start - 128) // 4))
    if place + len(text) <= stop:
        changed[place : place + len(text)] = text
    crc = zlib.crc32(changed[start:stop]).to_bytes(4, "little")
    changed[entries[number] + 14 : entries[number] + 18] = crc
    changed[contents[number] + 16 : contents[number] + 20] = crc
    return bytes(changed)


def metadata(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Metadata of a store in which values are exchanged, moved, removed or nested; mostly with the right checksum."""
    try:
        found = json.loads(data[1:])
        depth = data.count(b"[") + data.count(b"{")
    except (ValueError, RecursionError):
        depth = 1000
    if depth > 500:
        return any_bytes(rng, data, others)
    for _ in range(rng.choice((1, 1, 2))):
        spots = list(_spots(found))
        if not spots:
            break
        holder, key = rng.choice(spots)
        match rng.randrange(8):
            case 0:
                del holder[key]
            case 1:
                other, place = rng.choice(spots)
                other[place] = json.loads(json.dumps(holder[key]))
            case 2:
                for _ in range(rng.choice((1, 10, 100))):
                    holder[key] = [holder[key]]
            case _:
                holder[key] = deepcopy(rng.choice(JSON))
    with suppress(AttributeError, KeyError, TypeError):
        if rng.random() < 0.9:
            fields = found["attributes"]["infobatch_stream"]
            fields["checksum"] = checksum(fields)
    return data[:1] + json.dumps(found).encode()


def _spots(found: Any) -> Iterator[tuple[Any, Any]]:
    """Every (holder, key) in nested JSON."""
    keys = list(found) if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ()
    for key in keys:
        yield found, key
        yield from _spots(found[key])


def past(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """A file of a history: metadata as of a store, other bytes, or another thing in its place."""
    if rng.random() < 0.2:
        return bytes([rng.randrange(256), rng.randrange(256)]) + data[2:]
    if data[2:3] == b"{":
        return data[:2] + metadata(rng, data[1:], others)[1:]
    return data[:2] + any_bytes(rng, data[2:], others)


MUTATIONS: dict[str, Mutation] = {"headers": tar, "tar": tar, "npz": npz, "store": metadata, "history": past}
