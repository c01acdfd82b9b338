"""The members of a tar, as webdataset groups them into samples, with offsets instead of their bytes."""

import re
from collections.abc import Iterator
from io import BufferedReader
from typing import Any, NamedTuple

from infobatch_stream.errors import DataError
from infobatch_stream.formats.tar_headers import TarError, read_members

__all__ = ["Payload", "compression_of", "is_meta", "is_passed_over", "read_fields", "split_name"]

# The default of skip_meta in webdataset.tariterators.tar_file_iterator: members that are in no sample. (Its other
# rule, on names as `__meta__`, skips nothing that could be in one.)
_SKIP_META = re.compile(r"__[^/]*__($|/)")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Payload(NamedTuple):
    """Stands for a member's bytes while webdataset groups them. Like bytes, it is false when empty."""

    offset: int
    length: int

    def __bool__(self) -> bool:
        """Whether there are any bytes."""
        return self.length > 0


def read_fields(file: BufferedReader, path: str, size: int) -> Iterator[dict[str, Any]]:
    """What webdataset's tar_file_expander yields for this tar, with a `Payload` in place of the bytes."""
    try:
        for name, offset, length in read_members(file, size):
            if not is_meta(name):
                # webdataset sets __local_path__ for local files, and uses it in the grouping.
                yield {"fname": name, "data": Payload(offset, length), "__url__": path, "__local_path__": path}
    except TarError as error:
        file.seek(0)
        start = file.read(8)
        if (kind := compression_of(start)) is not None:
            raise DataError(
                f"{path} is compressed ({kind}), so its samples cannot be read by index where they are. "
                "infobatch_stream.StreamedWebDataset(urls) keeps the plain tar in its cache; or decompress it (gunzip, "
                "zstd -d)."
            ) from None
        raise DataError(
            f"{path} ({size:,} bytes) is no tar that can be read by index: {error}. Copy or write it again."
        ) from error


def is_meta(name: str) -> bool:
    """Whether webdataset skips a member of this name as metadata."""
    return _SKIP_META.match(name) is not None


def is_passed_over(name: str) -> bool:
    """Whether webdataset skips a member of this name for another reason than `is_meta`: it has no key or extension."""
    return split_name(name)[0] is None and not is_meta(name)


def split_name(name: str) -> tuple[str, str] | tuple[None, None]:
    """Key and extension of a member, as by webdataset's base_plus_ext, which takes quadratic time."""
    dot = name.find(".", name.rfind("/") + 1)
    line = name.find("\n")
    slash = name.rfind("/", 0, max(0, dot - 1 if line < 0 else min(dot - 1, line + 1)))
    if dot < 1 or "." in name[slash + 1 : dot] or slash + 1 == dot:
        return None, None
    return name[:dot], name[dot + 1 :]


def compression_of(start: bytes) -> str | None:
    """The compression of a file by its first 8 bytes; None if none is recognized."""
    return next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)
