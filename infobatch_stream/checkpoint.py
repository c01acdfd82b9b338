"""What a checkpoint of the loader says, and whether it belongs to this run."""

import json
import warnings
from dataclasses import astuple, dataclass
from typing import Any

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray

from infobatch_stream.errors import ConfigError
from infobatch_stream.planning.position import RunPosition
from infobatch_stream.store.header import Seeded
from infobatch_stream.store.score_store import ScoreStore

__all__ = ["Saved", "pack", "unpack"]

_FORMATS = (2, 3, 4)  # read; written is the first that says all, so that earlier versions read what they can
_NOT_IN_2 = {"constant_steps": False, "include": None, "sample_weight": None}  # what it does not say, with defaults
_BLOCK = 1 << 18  # scores whose checksum is taken at once: they stay in the cache


@dataclass(frozen=True)
class Saved:
    """What a state holds.

    Attributes:
        position: Where the run stands.
        done: Whether the epoch there is over.
        lanes: Of every plan.
        scores: float32[N], or None where they were not asked for.
        pending: float32[N], losses of the epoch that was going on, or None.
        masks: uint8[2, N / 8], of `Curriculum.to_state`, or None.
        seeded: Where scores were from before the first epoch, or None.
    """

    position: RunPosition
    done: bool
    lanes: int
    scores: NDArray[np.float32] | None
    pending: NDArray[np.float32] | None
    masks: NDArray[np.uint8] | None
    seeded: Seeded | None = None


def pack(
    settings: dict[str, Any],
    progress: dict[str, Any],
    masks: NDArray[np.uint8] | None,
    store: ScoreStore,
    *,
    with_scores: bool,
) -> dict[str, Any]:
    """A state of plain values and tensors, for torch.save and torch.distributed.checkpoint.

    The latter loads into a state of the loader that goes on, leaf by leaf, and of several ranks it keeps the leaf of
    any one. So every state has the same leaves, in which tensors have the same shapes; what a run may or may not have
    is a tuple, which is a leaf whatever it holds; and only the rank that has the scores has what depends on them.

    settings: what must be equal for the picks to repeat, as plain values by name. progress: of `RunPosition.to_state`.
    masks: of `Curriculum.to_state`. with_scores: whether those of ``store`` are in it.
    """
    seeded = store.seeded
    needed = 3 if any(settings[name] != old for name, old in _NOT_IN_2.items()) else 2
    if seeded or masks is not None:
        needed = 4
    curriculum = None if masks is None else (torch.from_numpy(masks),)
    state: dict[str, Any] = {
        "format": needed, "settings": settings, "progress": progress, "curriculum": curriculum,
    }  # fmt: skip
    if with_scores:
        state["scores"], state["pending"] = (_finite(torch.tensor(losses)) for losses in (store.scores, store.pending))
        state["seeded"] = seeded and astuple(seeded)
        state["checksum"] = _checksum(state)
    return state


def _finite(losses: torch.Tensor) -> torch.Tensor:
    """``losses`` (float32[N]), in which what is infinite is made NaN, with a warning: it was never recorded."""
    infinite = torch.isinf(losses)
    if count := int(infinite.sum()):
        losses = losses.masked_fill(infinite, torch.nan)
        warnings.warn(
            f"InfoBatchLoader: {count} scores are infinite (was a bit flipped on the disk?); in this state they "
            "count as not seen.",
            RuntimeWarning,
            stacklevel=2,
        )
    return losses


def _checksum(state: dict[str, Any]) -> int:
    """CRC-32C of all that a state holds, but for the checksum itself."""
    plain = {name: state[name] for name in ("format", "settings", "progress", "seeded") if name in state}
    found: int = google_crc32c.value(json.dumps(plain, sort_keys=True, default=repr).encode())
    parts = [state[name] for name in ("scores", "pending", "masks") if name in state]
    for part in (*parts, *(state.get("curriculum") or ())):
        for block in part.cpu().split(_BLOCK):
            found = google_crc32c.extend(found, block.numpy().tobytes())
    return found


def unpack(state: dict[str, Any], settings: dict[str, Any], *, with_scores: bool) -> Saved:
    """What a state holds; its scores only if ``with_scores``.

    Raises ConfigError, naming the difference, when the state is of another dataset, global batch or order, of
    another format, damaged, or lacks the scores.
    """
    found = state.get("format") if isinstance(state, dict) else None
    if isinstance(found, int) and found > 0 and found not in _FORMATS:
        raise ConfigError(
            f"the state has format {found}; this version of infobatch-stream reads formats {_FORMATS[0]} to "
            f"{_FORMATS[-1]}. Install the version that saved it."
        )
    if found not in _FORMATS:
        raise ConfigError(
            f"not a loader state (a {type(state).__name__} of format {found!r}); give what state_dict() returned."
        )
    saved = state.get("settings")
    if not isinstance(saved, dict):
        raise ConfigError("the state is damaged: it has no settings; load another one.")
    for name, here in settings.items():
        there = saved.get(name, _NOT_IN_2.get(name))
        if here != there:
            raise ConfigError(
                f"the state was saved with {name}={there!r}, this loader has {name}={here!r}. Picks repeat only with "
                "equal settings (the world size may change if batch_size * world size stays): make the loader as it "
                "was, or begin anew."
            )
    masks = _masks(state)
    try:
        position, done, lanes = RunPosition.of_state(state["progress"])
        if settings["global_batch"] % lanes:
            raise ValueError(f"{lanes} lanes do not divide the global batch of {settings['global_batch']}")
        if not with_scores:
            return Saved(position, done, lanes, None, None, masks)
        scores, pending = (_losses(state[name]) for name in ("scores", "pending"))
        seeded = _seeded(state.get("seeded"))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the state is incomplete or damaged ({error}); the scores are in the state_dict() of rank 0: load that "
            "one there."
        ) from error
    for losses in (scores, pending):
        if losses.size != settings["num_samples"]:
            raise ConfigError(
                f"the state has {losses.size} scores, {settings['num_samples']} are needed; it is damaged."
            )
    # A state of an earlier version has none.
    if state.get("checksum", (now := _checksum(state))) != now:
        raise ConfigError("the state is damaged: it does not have the checksum it says; load another one.")
    return Saved(position, done, lanes, scores, pending, masks, seeded)


def _losses(saved: Any) -> NDArray[np.float32]:
    """float32[N]. Raises ValueError for what `pack` does not save."""
    if not isinstance(saved, torch.Tensor) or saved.dtype != torch.float32 or saved.ndim != 1:
        found = f"{saved.dtype}{list(saved.shape)}" if isinstance(saved, torch.Tensor) else type(saved).__name__
        raise ValueError(f"scores as {found}, not as torch.float32 in one row")
    losses: NDArray[np.float32] = _finite(saved.cpu()).numpy()  # torch.load may have put them on an accelerator
    return losses


def _masks(state: dict[str, Any]) -> NDArray[np.uint8] | None:
    """uint8[2, n]. Raises ConfigError for what `pack` does not save."""
    saved = state.get("curriculum")
    if isinstance(saved, (tuple, list)) and len(saved) == 1:
        saved = saved[0]
    saved = state.get("masks", saved)  # of format 3
    if saved is None:
        return None
    if not isinstance(saved, torch.Tensor) or saved.dtype != torch.uint8 or saved.ndim != 2:
        raise ConfigError("the state is damaged: its masks are no bits in two rows; load another one.")
    masks: NDArray[np.uint8] = saved.cpu().numpy()
    return masks


def _seeded(saved: Any) -> Seeded | None:
    """Raises ValueError for what `pack` does not save."""
    if isinstance(saved, (tuple, list)) and len(saved) == 2:
        saved = dict(zip(("samples", "source"), saved, strict=True))
    return Seeded.of(saved)  # in format 3 it is a dict
