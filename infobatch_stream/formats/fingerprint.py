"""The fingerprint of a dataset."""

import hashlib
from collections.abc import Iterable

__all__ = ["fingerprint"]


def fingerprint(kind: str, parts: Iterable[object]) -> str:
    """``kind`` and a digest of ``parts`` (converted by str), as `Source.fingerprint` needs it."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part).encode())
        digest.update(b"\0")
    return f"{kind}:{digest.hexdigest()[:32]}"
