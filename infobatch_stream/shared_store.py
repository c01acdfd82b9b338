"""One store file, opened and committed by all ranks together."""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from infobatch_stream import layout
from infobatch_stream.errors import ConfigError, StoreError
from infobatch_stream.store import ScoreStore
from infobatch_stream.sync import Ranks

__all__ = ["Contents", "Existing", "check_owner", "commit_together", "open_together"]

Existing = Literal["error", "overwrite", "continue"]

_ONE_HOST = "This version trains on one host, with one store file; put it on a disk of that host."
_QUIET_NAN = 0x7FC00000  # a token is carried by a NaN, so one that is left behind means "not seen"


@dataclass(frozen=True)
class Contents:
    """What a checkpoint puts into a store: scores and pending float32[N], and the epoch they belong to."""

    scores: NDArray[np.float32] | None
    pending: NDArray[np.float32] | None
    epoch: int


def check_owner(path: Path, num_samples: int, fingerprint: str) -> layout.Header:
    """The header of the store at ``path``. Raises StoreError when it was made for another dataset."""
    header = layout.read_header(path)
    if (header.num_samples, header.fingerprint) != (num_samples, fingerprint):
        raise StoreError(
            f"{path} holds the scores of another dataset: {header.num_samples:,} samples ({header.fingerprint}), "
            f"while this one has {num_samples:,} ({fingerprint}). Give each dataset its own store, or begin anew with "
            "existing='overwrite'."
        )
    return header


def open_together(
    ranks: Ranks, path: Path, num_samples: int, fingerprint: str, existing: Existing, contents: Contents | None
) -> ScoreStore:
    """Make or open the store at ``path`` and map it on every rank. Collective.

    contents: of a checkpoint, which replaces whatever stands there. Raises StoreError for a store with epochs
    when ``existing`` is "error", and ConfigError when the ranks do not share the file.
    """

    def prepare() -> None:
        if contents is not None or not path.exists() or existing == "overwrite":
            put = contents or Contents(None, None, 0)
            ScoreStore.create(
                path,
                num_samples,
                fingerprint,
                scores=put.scores,
                pending=put.pending,
                epoch=put.epoch,
                replace=path.exists(),
            )
            return
        check_owner(path, num_samples, fingerprint)
        store = ScoreStore.open(path)
        if existing == "error":
            if store.epoch:
                raise StoreError(
                    f"{path} already holds {store.epoch} epoch(s) of scores. To go on with them, call "
                    "load_state_dict() with the checkpoint of that run, or pass existing='continue'; to throw them "
                    "away, pass existing='overwrite'; or give another path."
                )
            store.discard_pending()

    ranks.together("opening the score store", prepare if ranks.leads else _nothing)

    def follow() -> ScoreStore:
        if not path.exists():
            raise ConfigError(f"rank 0 has the store {path}, this process does not see it. {_ONE_HOST}")
        return ScoreStore.open(path)

    store = ranks.together("opening the score store", follow)
    _prove_shared(ranks, store)
    return store


def _prove_shared(ranks: Ranks, store: ScoreStore) -> None:
    """Raise on every rank unless each sees in its map what the leading rank writes there."""
    before = store.token
    token = _QUIET_NAN | secrets.randbelow(1 << 22)
    ranks.gather(None)  # all have read what was there before
    if ranks.leads:
        store.token = token
    wanted = ranks.gather(token)[0]
    strangers = [rank for rank, sees in enumerate(ranks.gather(store.token == wanted)) if not sees]
    if ranks.leads:
        store.token = before
    ranks.gather(None)  # nobody records before the token is gone
    if strangers:
        raise ConfigError(
            f"ranks {strangers} do not see what rank 0 writes to {store.path}: they are on other hosts, or the file "
            f"system does not keep memory maps coherent. {_ONE_HOST}"
        )


def commit_together(ranks: Ranks, store: ScoreStore) -> None:
    """Commit once, after every rank has recorded what it has; all take note. Collective."""
    ranks.together("the commit of the scores", store.commit if ranks.leads else _nothing)
    ranks.together("the commit of the scores", store.refresh)


def _nothing() -> None:
    return None
