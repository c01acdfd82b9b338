"""How a batch is made of its samples, with the picks in the order of its rows."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from infobatch_stream.errors import ConfigError
from infobatch_stream.picks import Picks

__all__ = ["Collation", "Trial"]

_TRIED = 16  # samples of a trial
_SHOWN = 16  # indices in a message

_PAIRING = (
    "Losses would be recorded for other samples than those they are of. To sort, sort the list itself "
    "(samples.sort(key=...)): that is followed. Else give, instead of collate_fn, collate_with_picks: a function of "
    "(samples, picks) that returns (data, picks[order])."
)


class Collation:
    """Makes (data, picks) of samples and their picks, by the user's function.

    collate_fn: takes the list of samples, and returns the data; row r of these is of sample r of the list as the call
    leaves it. collate_with_picks: takes the list and the picks, and returns the data with the picks of their rows.

    Raises ConfigError when both are given.
    """

    def __init__(
        self,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        collate_with_picks: Callable[[list[Any], Picks], tuple[Any, Picks]] | None = None,
    ) -> None:
        if collate_fn is not None and collate_with_picks is not None:
            raise ConfigError("collate_fn and collate_with_picks are both given; a batch is made by one of them.")
        for name, found in (("collate_fn", collate_fn), ("collate_with_picks", collate_with_picks)):
            if found is not None and not callable(found):
                raise ConfigError(f"{name}={found!r}: it must be a function.")
        self._collate = collate_fn or default_collate
        self._with_picks = collate_with_picks

    @property
    def is_known(self) -> bool:
        """Whether no code of the user's runs, and all that does keeps the order and draws nothing."""
        return self._with_picks is None and self._collate in (default_collate, list)

    def __call__(self, samples: list[Any], picks: Picks) -> tuple[Any, Picks]:
        """The batch. Raises ConfigError when it cannot be told which row is which sample."""
        if self._with_picks is not None:
            return _checked(self._with_picks(samples, picks), picks)
        if self.is_known:
            return self._collate(samples), picks
        before = samples.copy()
        data = self._collate(samples)
        order = _places(before, samples)
        return data, picks if order is None else picks[order]

    def explain(self, error: Exception, samples: list[Any], index: list[int]) -> None:
        """Add to ``error``, which a call for ``samples`` raised, which they were."""
        found = ", ".join(map(str, index[:_SHOWN])) + (", ..." if len(index) > _SHOWN else "")
        note = (
            f"infobatch-stream: collate_fn failed on a batch of {len(index)} samples, those with the indices {found}."
        )
        if self._collate is default_collate and self._with_picks is None:
            for place in range(1, len(samples)):
                try:
                    default_collate([samples[0], samples[place]])
                except Exception:
                    note += f" Of these, {index[0]} and {index[place]} do not go together."
                    break
        error.add_note(note)


def _checked(result: Any, picks: Picks) -> tuple[Any, Picks]:
    """What collate_with_picks returned, if it is what it should be."""
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Picks):
        found = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise ConfigError(f"collate_with_picks returned {found}; it must return (data, picks), as it got the picks.")
    data, chosen = result
    if chosen._origin != picks._origin or not len(chosen):
        what = "none of the samples" if not len(chosen) else "the picks of another batch"
        raise ConfigError(
            f"collate_with_picks returned {what}: return the picks that it got, or those of the rows that the batch "
            'holds, as picks[order]. For samples that cannot be read, let the dataset raise, with on_error="replace".'
        )
    return data, chosen


def _places(before: list[Any], after: list[Any]) -> list[int] | None:
    """Where each sample of the list ``after`` a call stood ``before`` it; None if none was moved.

    Samples are told apart by identity. Those that are one object have equal rows, so that it makes no difference which
    of these is whose. Raises ConfigError when some are gone.
    """
    if len(after) != len(before):
        raise ConfigError(
            f"collate_fn left {len(after)} of {len(before)} samples in the list that it got, so it cannot be told "
            "which row is which sample. For samples that cannot be read, let the dataset raise, with "
            f'on_error="replace". Else work on a copy of the list. {_PAIRING}'
        )
    if all(map(is_, before, after)):
        return None
    moved = [place for place, (old, new) in enumerate(zip(before, after, strict=True)) if old is not new]
    waiting: defaultdict[int, deque[int]] = defaultdict(deque)
    for place in moved:
        waiting[id(before[place])].append(place)
    order = list(range(len(before)))
    new = 0
    for place in moved:
        if known := waiting.get(id(after[place])):
            order[place] = known.popleft()
        else:
            new += 1
    if new == len(moved):  # each was replaced where it stood
        return None
    if new:
        raise ConfigError(
            f"collate_fn moved samples within the list that it got, and put {new} others there, so it cannot be told "
            f"which row is which sample. {_PAIRING}"
        )
    return order


class Trial:
    """Whether a `Collation` keeps rows and picks together, tried on copies of a few samples of a batch.

    They are given twice, the second time with the first one last. If then the same rows come with other picks, the
    function puts them in an order of its own (``sorted(samples)``), which nothing else would tell.
    """

    def __init__(self, collation: Collation, samples: Sequence[Any], picks: Picks) -> None:
        self._collation = collation
        places = np.sort(np.unique(picks.index.numpy(), return_index=True)[1])[:_TRIED].tolist()
        self._samples = [samples[place] for place in places]
        self._picks = picks[places]

    def run(self) -> None:
        """Raise ConfigError if rows and picks do not stay together; nothing where that cannot be told."""
        places = list(range(len(self._samples)))
        try:
            forth, back = (self._rows(order, order) for order in (places, places[1:] + places[:1]))
        except Exception:  # of the user's code, or samples that cannot be copied; it is raised in the real call
            return
        moved = []
        for leaf in forth.keys() | back.keys():
            one, other = forth.get(leaf), back.get(leaf)
            if one is None or other is None or one.keys() != other.keys():
                return
            if one == other:
                if len(set(one.values())) > 1:
                    return  # these rows are as they should be; others may be drawn from the whole batch
            elif sorted(one.values()) == sorted(other.values()):
                moved.append(leaf)
            else:
                return  # rows that depend on chance
        if moved and self._depend_on_samples(moved, forth):
            raise ConfigError(
                "the rows of a batch are not in the order of its samples: given some of them in another order, "
                f"{'collate_fn' if self._collation._with_picks is None else 'collate_with_picks'} returned the same "
                f"rows, but for other samples. {_PAIRING}"
            )

    def _depend_on_samples(self, leaves: list[str], rows: dict[str, dict[int, str]]) -> bool:
        """Whether one of these is other than ``rows`` when all samples are the first; ``torch.arange(b)`` is not."""
        places = list(range(len(self._samples)))
        try:
            alike = self._rows(places, [0] * len(places))
        except Exception:  # of the user's code, which is used to other samples
            return True
        return any(alike.get(leaf) != rows[leaf] for leaf in leaves)

    def _rows(self, order: list[int], samples: list[int]) -> dict[str, dict[int, str]]:
        """For each part of the data that has a row per sample, what it holds, by index of the sample.

        order, samples: the places of the picks and of the samples that the function gets.
        """
        data, picks = self._collation([_copied(self._samples[place]) for place in samples], self._picks[order])
        index = picks.index.tolist()
        return {leaf: dict(zip(index, rows, strict=True)) for leaf, rows in _leaves("", data, len(index))}


def _copied(sample: Any) -> Any:
    """A copy that the user's code may change. Raises TypeError for kinds of which it is not known what they hold.

    (A deepcopy would copy all of the dataset where a sample is a view of its tensor, or has it as an attribute.)
    """
    if isinstance(sample, Tensor):
        return sample.clone()
    if isinstance(sample, np.ndarray):
        return sample.copy()
    if type(sample) is dict:
        return {key: _copied(value) for key, value in sample.items()}
    if type(sample) in (list, tuple):
        return type(sample)(map(_copied, sample))
    if isinstance(sample, str | bytes | int | float | np.generic | None):
        return sample
    raise TypeError(type(sample))


def _leaves(name: str, data: Any, size: int) -> Iterator[tuple[str, list[str]]]:
    """The parts of ``data`` that have ``size`` rows, by where they are: a text for each row, equal for equal ones."""
    if isinstance(data, Tensor | np.ndarray):
        if _has_rows(data, size):
            yield name, [_text(row) for row in data]
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _leaves(f"{name}[{key!r}]", value, size)
    elif isinstance(data, list | tuple):
        if len(data) == size and not all(_has_rows(part, size) for part in data):  # else a field each
            yield name, [_text(row) for row in data]
        else:
            for place, value in enumerate(data):
                yield from _leaves(f"{name}[{place}]", value, size)


def _has_rows(part: Any, size: int) -> bool:
    is_array = isinstance(part, Tensor | np.ndarray) and part.ndim > 0
    return (is_array or isinstance(part, list | tuple)) and len(part) == size


def _text(row: Any) -> str:
    """Equal for equal rows."""
    if isinstance(row, Tensor):
        row = row.detach().cpu().contiguous()
        return f"{row.dtype}{list(row.shape)}{blake2b(row.reshape(-1).view(torch.uint8).numpy()).hexdigest()}"
    if isinstance(row, np.ndarray):
        return f"{row.dtype}{row.shape}{blake2b(row.tobytes()).hexdigest()}"
    if isinstance(row, Mapping):
        return f"{{{', '.join(f'{key!r}: {_text(value)}' for key, value in row.items())}}}"
    if isinstance(row, list | tuple):
        return f"[{', '.join(map(_text, row))}]"
    return repr(row)
