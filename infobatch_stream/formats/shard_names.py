"""Shards by the numbers in their names: which belong to one set, and which ones are missing."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

__all__ = ["Family", "Gap", "family_of", "gaps"]

_SHOWN = 5  # missing shards that are named
_PADDED = 4  # a number with leading zeros and this many digits is surely the number of a shard
_NAME = re.compile(r"(?P<before>.*?)(?P<number>\d+)(?P<behind>-of-(?P<total>\d+)\D*|\D*)")  # x-003.tar, x-3-of-10.tar

Family = tuple[str, str]
"""The parts before and after the number, which are the same in the names of all shards of a set."""


@dataclass(frozen=True)
class Gap:
    """Shards that seem to be missing. likely: else it may well be on purpose."""

    what: str
    likely: bool = True


def family_of(name: str) -> Family:
    """The set that a shard of this name belongs to. A name without a number is a set of its own."""
    found = _NAME.fullmatch(name)
    return (name, "") if found is None else (found["before"], found["behind"])


def gaps(names: Iterable[str], there: Collection[str], *, whole: bool) -> Iterator[Gap]:
    """Find the shards that are missing from the sets of the shards ``names``.

    there: all files in the folder. whole: the user named the whole folder, so each set must be complete.
    """
    present = _families(there)
    for family, shards in _families(names).items():
        numbers = {int(shard["number"]) for shard in shards}
        known, first, last = numbers | {int(shard["number"]) for shard in present[family]}, min(numbers), max(numbers)
        zeros = any(shard["number"].startswith("0") for shard in shards)
        width = max(len(shard["number"]) for shard in shards) if zeros else 0

        def missing(begin: int, end: int, known: set[int] = known) -> list[int]:
            return list(islice((number for number in range(begin, end) if number not in known), _SHOWN + 1))

        def named(some: list[int], family: Family = family, width: int = width) -> str:
            texts = [f"{family[0]}{number:0{width}}{family[1]}" for number in some[:_SHOWN]]
            return ", ".join([*texts, "..."] if len(some) > _SHOWN else texts)

        if shards[0]["total"]:
            total = int(shards[0]["total"])
            begin = int(total in known and 0 not in known)
            count = total - sum(begin <= number < begin + total for number in known)
            if whole and count > 0:
                what = f"{count:,} of the {total:,} shards that the names speak of are missing: "
                yield Gap(what + named(missing(begin, begin + total)))
            continue
        count = last - first + 1 - sum(first <= number <= last for number in known)
        if count and (count <= len(numbers) or width >= _PADDED):  # else they are no numbers of shards
            what = f"{count:,} missing between the shards {first:,} and {last:,}: "
            yield Gap(what + named(missing(first, last)))
        begin = min(known)
        if whole and begin and (width >= _PADDED or begin < len(numbers)):
            some = named(missing(0, begin))
            what = f"the numbers of its shards begin at {begin:,}, not at 0: is {some} missing?"
            yield Gap(what, likely=begin > 1)  # some people count from 1


def _families(names: Iterable[str]) -> defaultdict[Family, list[re.Match[str]]]:
    """The names that have a number, taken apart, by the set that they belong to."""
    found = defaultdict[Family, list[re.Match[str]]](list)
    for match in filter(None, map(_NAME.fullmatch, names)):
        found[match["before"], match["behind"]].append(match)
    return found
