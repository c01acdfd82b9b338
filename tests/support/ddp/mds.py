"""The StreamingDataset that tests use. Importing it takes seconds."""

from streaming import StreamingDataset

from support.ddp.data import noise


class Augmented(StreamingDataset):
    """A subclass with a ``__getitem__`` of its own."""

    def __getitem__(self, index):
        return super().__getitem__(index)["i"], noise()
