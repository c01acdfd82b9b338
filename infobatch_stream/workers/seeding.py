"""Random state while a batch is made: set where code of the user's runs, and put back in the main process."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from hashlib import blake2b
from struct import Struct
from threading import RLock
from typing import Final

import numpy as np
import torch
from torch.utils.data import get_worker_info

from infobatch_stream._process_wide import waiting_normal

__all__ = ["random_state_kept", "seeded", "set_seed"]

_SEED: Final = Struct("<4Q")
_GENERATOR: Final = np.random.MT19937(0)  # that NumPy draws from while a batch is made in the main process
_LENT: Final = RLock()  # held meanwhile: of two threads that lent it, the second would put it back for the user's


@contextmanager
def seeded(seed: tuple[int, int, int, int]) -> Iterator[None]:
    """Random state of `random`, NumPy and torch (CPU) from ``seed``; what the user had in this process comes back."""
    with random_state_kept() if get_worker_info() is None else nullcontext():
        set_seed(seed)
        yield


def set_seed(seed: tuple[int, int, int, int]) -> None:
    """Random state of `random`, NumPy and torch (CPU) from ``seed``: seed, epoch, step and rank."""
    words = blake2b(_SEED.pack(*seed), digest_size=20).digest()
    random.seed(int.from_bytes(words[:8], "little"))
    np.random.seed(int.from_bytes(words[8:12], "little"))  # noqa: NPY002 - as below; 32 bits are quickest
    # Not torch.manual_seed: it would seed the accelerators of the main process too.
    torch.default_generator.manual_seed(int.from_bytes(words[12:], "little"))


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever happens within, random state is afterwards what it was.

    NumPy takes 40 us to give its state and as much to take it. So within, it draws from another bit generator.
    """
    with _LENT:
        numbers, torchs = random.getstate(), torch.get_rng_state()
        generator, normal = np.random.get_bit_generator(), waiting_normal()
        np.random.set_bit_generator(_GENERATOR if generator is not _GENERATOR else np.random.MT19937(0))  # nested
        try:
            yield
        finally:
            np.random.set_bit_generator(generator)
            if normal["has_gauss"]:
                np.random.set_state({**generator.state, **normal})  # noqa: NPY002 - users' code uses it
            random.setstate(numbers)
            torch.set_rng_state(torchs)
