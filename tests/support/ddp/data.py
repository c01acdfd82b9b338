"""Datasets and losses that tests, their subprocesses and spawned workers share. Imports nothing slow but torch."""

import io
import random
import tarfile
from pathlib import Path

import numpy as np
import torch


class Noisy:
    """Map-style: sample i is its number and three random numbers, one from each generator that users draw from."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index, noise()


class Faulty(Noisy):
    """Of which the samples ``bad`` cannot be read."""

    def __init__(self, size, bad):
        super().__init__(size)
        self.bad = set(bad)

    def __getitem__(self, index):
        if index in self.bad:
            raise OSError(f"sample {index} is rotten")
        return index, noise()


def noise():
    return torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()], dtype=torch.float64)


def loss_of(index, epoch=0):
    """A loss that depends on the sample (and epoch) alone: float32[b]."""
    return ((index * 7919 + epoch * 31) % 1009).float() / 1009 + 0.1


def with_noise(sample):
    """Stage of a WebDataset pipeline."""
    return int(sample["cls"]), noise()


def write_wds(folder, shards=4, samples=12):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(Path(folder, f"s{shard}.tar"), "w") as tar:
            for i in range(shard * samples, (shard + 1) * samples):
                info, data = tarfile.TarInfo(f"{i:05}.cls"), b"%d" % i
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(folder)


def wds(folder):
    from infobatch_stream import IndexedWebDataset

    return IndexedWebDataset(str(folder)).map(with_noise)


def write_mds(folder, first=0, samples=48, per_shard=12, **options):
    """The samples first.., ``per_shard`` to a shard."""
    from streaming import MDSWriter

    header, sample = 200, 80  # bytes, roughly
    with MDSWriter(
        out=str(folder),
        columns={"i": "int", "pad": "bytes"},
        **options,
        size_limit=header + per_shard * sample,
    ) as out:
        for i in range(first, first + samples):
            out.write({"i": i, "pad": bytes(64)})
    return str(folder)


def state_of_rngs():
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), (kind, keys.tolist(), *rest), random.getstate()
