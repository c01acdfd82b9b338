"""Groups of processes that each hold one copy of a long array, and how the copies are made equal."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from infobatch_stream.distributed.process_group import device_of_exchange, reaching_others, timeout

__all__ = ["Groups"]


class Groups:
    """Groups of processes that each hold one copy of a long array, and how the copies are made equal.

    The j-th processes of all groups make up column j, which works on the j-th share of the array:

                   share 0    share 1
        group 0    process 0  process 1       two nodes of two ranks: the columns are {0, 2} and {1, 3}, so all links
        group 1    process 2  process 3       of a node are used, and each entry crosses between nodes once

    Attributes:
        members: the processes of each group. count: number of groups. mine: which of them is this process's.
        leads: whether this process is the first of its group.
        leaders: the first process of each.
    """

    def __init__(self, members: list[list[int]], process: int) -> None:
        self.members, self.count = members, len(members)
        self.mine = next(group for group, ranks in enumerate(members) if process in ranks)
        self.leaders = [ranks[0] for ranks in members]
        self.leads = self.leaders[self.mine] == process
        self._width = min(map(len, members))
        place = members[self.mine].index(process)
        self._column = place if place < self._width else None
        self._peers: Any = None
        if self.count > 1:
            for column in range(self._width):
                with reaching_others():
                    peers = dist.new_group([ranks[column] for ranks in members], timeout=timeout())
                if column == self._column:
                    self._peers = peers

    def share(self, length: int) -> range:
        """The entries, of ``length``, that this process brings to the other groups; empty where others do."""
        if self._column is None:
            return range(0)
        return range(self._column * length // self._width, (self._column + 1) * length // self._width)

    def merge(self, losses: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32[k]: of each entry the largest loss that a process of this column has, NaN where none has one.

        Collective among them. Each gathers a piece: the others send it what they have seen there, so that a loss which
        one process has crosses once; then the pieces go round. Of each entry a process so sends little more than 4
        bytes, however many processes there are; in an all-reduce in a ring it would be up to 8::

            process 0 has 1 . . 4, and gathers the first half: 1 2
            process 1 has . 2 3 ., and gathers the second:         3 4
        """
        place = dist.get_rank(self._peers)  # not always that of the group: torch sorts the processes
        size = -(-losses.size // (32 * self.count)) * 32  # of a piece: whole words of bits
        pieces = np.full((self.count, size), np.nan, dtype=np.float32)
        pieces.reshape(-1)[: losses.size] = losses
        own = pieces[place].copy()
        own[np.isnan(own)] = np.nan  # the same NaN on all, so that files are equal to the bit
        pieces[place] = np.nan  # nothing of it is sent
        with reaching_others():
            for parcel in self._swap([_parcel(piece) for piece in pieces]):
                seen = np.flatnonzero(np.unpackbits(parcel[: size // 32].view(np.uint8), count=size).view(np.bool_))
                own[seen] = np.fmax(own[seen], parcel[size // 32 :].view(np.float32))
            everyones = torch.empty((self.count, size), dtype=torch.float32, device=device_of_exchange())
            dist.all_gather(list(everyones), torch.from_numpy(own).to(everyones.device), group=self._peers)
        return everyones.cpu().numpy().reshape(-1)[: losses.size]

    def _swap(self, parcels: list[NDArray[np.int32]]) -> Iterator[NDArray[np.int32]]:
        """Send parcel number j to the j-th process of this column; -> what each sends here."""
        sizes = torch.tensor([parcel.size for parcel in parcels], device=device_of_exchange())
        theirs = torch.empty_like(sizes)
        dist.all_to_all_single(theirs, sizes, group=self._peers)
        found = torch.empty(int(theirs.sum()), dtype=torch.int32, device=sizes.device)
        sent = torch.from_numpy(np.concatenate(parcels)).to(sizes.device)
        dist.all_to_all_single(found, sent, theirs.tolist(), sizes.tolist(), group=self._peers)
        yield from np.split(found.cpu().numpy(), np.cumsum(theirs.tolist())[:-1])

    def from_group(self, group: int, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """``values`` (float32[k]) of the leader of ``group``. Collective among the leaders."""
        tensor = torch.from_numpy(values).to(device_of_exchange())
        with reaching_others():
            dist.broadcast(tensor, self.leaders[group], group=self._peers)
        return tensor.cpu().numpy()


def _parcel(losses: NDArray[np.float32]) -> NDArray[np.int32]:
    """A bit for each of ``losses`` (float32[32 k]) that says whether it is not NaN; then those that are not."""
    seen = ~np.isnan(losses)
    values: NDArray[np.int32] = losses[np.flatnonzero(seen)].view(np.int32)
    return np.concatenate([np.packbits(seen).view(np.int32), values])
