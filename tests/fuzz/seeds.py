"""Valid inputs of each target, and hostile ones by hand, from which mutations begin."""

import io
import tarfile
from functools import cache

import numpy as np
from numcodecs import zstd

from infobatch_stream.formats.tar_index import TarIndex

from .targets import HISTORY_FILES, INSTEAD, SHARD, STORE_FILES, folder, good_history, good_store

NAMES = (
    ("a.jpg", "a.cls", "b.jpg", "b.cls"),
    ("x/" * 60 + "a.jpg", "n" * 150 + ".cls", "é.日本.x"),
    ("README", "__meta__", "__x__/a.b", ".hidden", "a/.b", "a\nb.c", "v1.0/a"),
    ("a.__bad__", "a.__key__", "b.jpg", "b.jpg"),
    (),
)
KINDS = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE, tarfile.AREGTYPE, b"Z")


def header(name: bytes = b"a.jpg", size: int = 0, kind: bytes = b"0") -> bytes:
    """A tar header whose size may be anything: beyond 8 GiB, or negative, it is written in base 256."""
    if 0 <= size < 8**11:
        field = b"%011o\0" % size
    else:
        field = (b"\x80" if size >= 0 else b"\xff") + (size % 2**88).to_bytes(11, "big")
    block = bytearray(512)
    block[: len(name)] = name
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    block[124:148] = field + b"%011o\0" % 0
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[329:345] = b"0000000\0" * 2
    return signed(block)


def signed(block: bytearray) -> bytes:
    """``block`` with the checksum that it should have."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def extended(data: bytes, kind: bytes = b"x") -> bytes:
    """An extended header with ``data`` as its records."""
    return header(b"h", len(data), kind) + padded(data)


def record(key: bytes, value: bytes) -> bytes:
    """A record of an extended header, with its own length in front."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return str(length).encode() + rest


END = bytes(1024)
SPARSE = bytearray(header(b"__x__/a.jpg", -1024, b"S"))
SPARSE[483:495] = b"%011o\0" % 3
HOSTILE = {
    "a name of 32 TiB": header(kind=b"L", size=2**45) + header() + END,
    "a name of 10^26 bytes": header(kind=b"L", size=10**26) + header() + END,
    "an extended header of 10^18 bytes": header(kind=b"x", size=10**18) + header() + END,
    "an extended header of -512 bytes": header(kind=b"x", size=-512) + header() + END,
    "a payload of 10^18 bytes": header(size=10**18) + END,
    "a payload of 10^18 bytes by an extended header": extended(record(b"size", b"1" + b"0" * 18)) + header() + END,
    "a payload of 5000 digits": extended(record(b"size", b"9" * 5000)) + header() + END,
    "a payload of -512 bytes": header() + header(b"README", -512) + END,
    "a negative size that a global header hides": extended(record(b"size", b"0"), b"g") + header(b"README", -512) + END,
    "a sparse member that leads back": header(b"b.jpg") + header(b"c.jpg") + signed(SPARSE) + END,
    "a sparse map": extended(record(b"GNU.sparse.map", b"0,1,5,1")) + header(size=2) + bytes(512) + END,
    "records that overlap": extended(b"2 " * 19999 + b"=x") + header() + END,
    "digits without end": extended(b"1" * 200_000) + header() + END,
    "a record of length 0": extended(b"0 a=b\n") + header() + END,
    "a record of length 0 before a newline": extended(b"0 a=".ljust(511) + b"\n") + header() + END,
    "nothing behind an extended header": extended(record(b"path", b"a.b")) + END,
    "a name of slashes": extended(record(b"path", b"a/" * 100_000)) + header() + END,
    "a name of slashes and a newline": extended(record(b"path", b"a/" * 50_000 + b"\n" + b"a" * 50_000 + b".b/c.d"))
    + header()
    + END,
    "many extended headers": extended(record(b"a", b"b")) * 3000 + header() + END,
    "many global headers": b"".join(extended(record(b"k%d" % i, b"v" * 300), b"g") for i in range(1000))
    + header(b"README") * 1000
    + END,
    "names of NUL and dots": header(b"\0") + header(b"../../a.b") + header(b"/etc/x.y") + END,
}


@cache
def tars() -> list[bytes]:
    """Tars of all formats, and kinds of members, then the hostile ones that are small."""
    made = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        for number, names in enumerate(NAMES):
            data = io.BytesIO()
            common = {"comment": "of all"} if form == tarfile.PAX_FORMAT and number == 0 else None
            with tarfile.open(fileobj=data, mode="w", format=form, pax_headers=common) as tar:
                for at, name in enumerate(names):
                    info = tarfile.TarInfo(name)
                    info.size = 100 * at
                    if form == tarfile.PAX_FORMAT:
                        info.pax_headers = {"size": str(info.size), "mtime": "1.5"}
                    if len(name) < 100 or form != tarfile.USTAR_FORMAT:
                        tar.addfile(info, io.BytesIO(bytes(info.size)))
                for kind in KINDS if number == 1 else ():
                    info = tarfile.TarInfo("s.kind")
                    info.type, info.linkname = kind, "a.jpg"
                    tar.addfile(info)
            made.append(data.getvalue().rstrip(b"\0") + bytes(1024))  # aligned anew by the next line
            made[-1] = data.getvalue()[: len(padded(made[-1]))]
    return made + [data for data in HOSTILE.values() if len(data) < 8192]


@cache
def indexes() -> list[bytes]:
    """Kept indexes of tars, each as if it were of the shard `SHARD`."""
    made = []
    for data in tars():
        (folder() / "seed.tar").write_bytes(data)
        try:
            index = TarIndex.build(str(folder() / "seed.tar"))
        except (ValueError, RuntimeError):
            continue
        index.header[1:3] = SHARD
        index.save(folder() / "seed.npz")
        made.append((folder() / "seed.npz").read_bytes())
        packed = io.BytesIO()
        np.savez_compressed(packed, offset=index.offset)
    return [*made, packed.getvalue()]


@cache
def stores() -> list[bytes]:
    """The files of a store, each behind the byte that names it; and metadata that is garbled by hand."""
    _, good = good_store()
    made = [bytes([number]) + good[name] for number, name in enumerate(STORE_FILES)]
    return [*made, b"\0" + b"[" * 3000, b"\0" + b'{"a":' * 3000, b"\1{}", b"\0" + b"9" * 5000, b"\3"]


@cache
def histories() -> list[bytes]:
    """The files of a history, each behind the bytes that name it and say what is put there."""
    _, good = good_history()
    made = [bytes([number, 0]) + good.get(f"history/{name}", b"") for number, name in enumerate(HISTORY_FILES)]
    made += [bytes([number, how]) for number in range(len(HISTORY_FILES)) for how in range(4, len(INSTEAD))]
    return [*made, bytes([6, 0]) + zstd.compress(bytes(2**28)), bytes([8, 0, 2, 1, 0x93, 2]) + b"\xff\xff\xff\x7f" * 3]


SEEDS = {"headers": tars, "tar": tars, "npz": indexes, "store": stores, "history": histories}
