"""What tells a dataset from another."""

import hashlib
from collections.abc import Iterable

__all__ = ["fingerprint"]


def fingerprint(kind: str, parts: Iterable[object]) -> str:
    """``kind`` and a digest of ``parts`` (by their str), as of `Source.fingerprint`."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part).encode())
        digest.update(b"\0")
    return f"{kind}:{digest.hexdigest()[:32]}"
