"""Files read once in blocks, hashed and decompressed on the way; memory does not depend on what the files claim."""

import bz2
import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from typing import Any, BinaryIO

from infobatch_stream.errors import DataError, MissingExtraError

__all__ = ["BLOCK", "Stream", "blocks_of", "decompressed", "hasher"]

BLOCK = 1 << 20
_XXH = ("xxh32", "xxh64", "xxh128", "xxh3_64", "xxh3_128")

Blocks = Iterator[bytes]


def blocks_of(file: BinaryIO) -> Blocks:
    """The rest of ``file``."""
    return iter(lambda: file.read(BLOCK), b"")


def hasher(name: str) -> Any:
    """A new hash object for a name that streaming knows; None for other names."""
    if name in hashlib.algorithms_guaranteed and not name.startswith("shake_"):
        return hashlib.new(name, usedforsecurity=False)
    if name not in _XXH:
        return None
    try:
        import xxhash
    except ImportError as error:
        raise MissingExtraError.of("xxhash", "mds") from error
    return getattr(xxhash, name)()


class Stream:
    """Blocks that can be read like a file from the beginning to the end, and are hashed on the way.

    hashes: names of hashes; unknown ones are left out. size: bytes read so far. Reading more than ``limit`` bytes
    raises DataError.
    """

    def __init__(self, blocks: Blocks, hashes: Iterable[str], limit: int) -> None:
        self.size = 0
        self._blocks, self._limit = blocks, limit
        self._hashers = {name: found for name in hashes if (found := hasher(name)) is not None}
        self._block, self._at = b"", 0

    def __iter__(self) -> Iterator[bytes]:
        """The blocks that are left, hashed."""
        while block := self._next():
            yield block

    def read(self, length: int) -> bytes:
        """The next ``length`` bytes; fewer only at the end."""
        parts = []
        while length:
            if self._at == len(self._block):
                self._block, self._at = self._next(), 0
                if not self._block:
                    break
            part = self._block[self._at : self._at + length]
            self._at += len(part)
            length -= len(part)
            parts.append(part)
        return b"".join(parts)

    def finish(self) -> dict[str, str]:
        """Read the rest; returns the hashes of all bytes, name -> hex digits."""
        for _ in self:
            pass
        return {name: found.hexdigest() for name, found in self._hashers.items()}

    def _next(self) -> bytes:
        block = next(self._blocks, b"")
        self.size += len(block)
        if self.size > self._limit:
            raise DataError(f"it holds more than the {self._limit:,} bytes that it should")
        for found in self._hashers.values():
            found.update(block)
        return block


def decompressed(compression: str, blocks: Blocks, size: int) -> Blocks:
    """Decompress ``blocks`` by a compression as streaming names it ("zstd:7"); ``size`` bytes are expected.

    Raises DataError for damaged data, and for a compression that streaming does not have.
    """
    kind = compression.partition(":")[0]
    if kind not in _KINDS:
        raise DataError(f"its compression {compression!r} is none of {', '.join(_KINDS)}")
    try:
        yield from filter(None, _KINDS[kind](blocks, size))
    except ImportError as error:
        raise MissingExtraError.of(f"the library for {kind}", "mds") from error
    except DataError:
        raise
    except Exception as error:  # each library has errors of its own
        raise DataError(f"it cannot be decompressed ({kind}: {error})") from error


def _in_steps(blocks: Blocks, make: Callable[[], Any], rest: Callable[[Any], bytes]) -> Blocks:
    """Decompress by the standard library. rest: the input that a decompressor has not used yet."""
    state = make()
    for block in blocks:
        data, more = block, True
        while more:
            if state.eof:
                state = make()  # several files in one
            yield (found := state.decompress(data, BLOCK))
            data = state.unused_data if state.eof else rest(state)
            more = bool(data) or (len(found) == BLOCK and not state.eof)
    if not state.eof:
        raise DataError("it cannot be decompressed, since it ends too early")


def _gz(blocks: Blocks, size: int) -> Blocks:
    return _in_steps(blocks, lambda: zlib.decompressobj(31), lambda state: state.unconsumed_tail)


def _bz2(blocks: Blocks, size: int) -> Blocks:
    return _in_steps(blocks, bz2.BZ2Decompressor, lambda state: b"")  # it keeps its input itself


def _br(blocks: Blocks, size: int) -> Blocks:
    brotli = import_module("brotli")

    state = brotli.Decompressor()
    for block in blocks:
        yield state.process(block, output_buffer_limit=BLOCK)
        while not state.can_accept_more_data():
            yield state.process(b"", output_buffer_limit=BLOCK)
    while not state.is_finished() and (found := state.process(b"", output_buffer_limit=BLOCK)):
        yield found
    if not state.is_finished():
        raise DataError("it cannot be decompressed, since it ends too early")


def _at_once(library: str, claimed: Callable[[bytes], int], blocks: Blocks, size: int) -> Blocks:
    """Decompress by a library that allocates the size that the data claim, so that is compared first."""
    module = import_module(library)

    data = b"".join(blocks)
    if (claim := claimed(data)) != size:
        raise DataError(f"it decompresses to {claim:,} bytes, {size:,} are expected")
    yield module.decompress(data)


def _snappy_size(data: bytes) -> int:
    """The size that snappy data begin with: 7 bits per byte, the lowest first, the high bit set in all but the last."""
    length = next((place + 1 for place, byte in enumerate(data[:5]) if byte < 128), 0)
    return sum((byte & 127) << 7 * place for place, byte in enumerate(data[:length]))


def _zstd_size(data: bytes) -> int:
    """The size in the header of a zstd frame. Raises DataError if there is none, or the data are not one frame."""
    head = data[4] if len(data) > 4 and data.startswith(b"\x28\xb5\x2f\xfd") else 0
    single, checksum = head >> 5 & 1, head >> 2 & 1
    width = (0, 2, 4, 8)[head >> 6] or single
    start = 5 + (1 - single) + (0, 1, 2, 4)[head & 3]
    at, block = start + width, 0
    while not block & 1 and at < len(data):  # to the last block
        block = int.from_bytes(data[at : at + 3], "little")
        at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
    if not width or at + 4 * checksum != len(data):
        raise DataError("it is not one whole zstd frame that gives its size")
    return int.from_bytes(data[start : start + width], "little") + (256 if width == 2 else 0)


_KINDS: dict[str, Callable[[Blocks, int], Blocks]] = {
    "br": _br,
    "bz2": _bz2,
    "gz": _gz,
    "snappy": partial(_at_once, "snappy", _snappy_size),
    "zstd": partial(_at_once, "zstd", _zstd_size),
}
