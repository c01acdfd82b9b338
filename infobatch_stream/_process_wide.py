"""What the library does to the whole process it runs in, and not to objects of its own: all of it is here.

Two of these reach into private parts of other libraries, where nothing public does what is needed; both do without
where the part is not there.
"""

import atexit
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np

__all__ = [
    "at_exit",
    "at_fork_in_child",
    "keep_batch_memory",
    "let_gloo_end",
    "name_files_by_own_draws",
    "waiting_normal",
]

_GLOO_ENDS = 0.1  # seconds

if sys.version_info < (3, 11, 10):
    # A process that is forked while another thread holds the interpreter's list of threads hangs (CPython's issue
    # 112275). Gloo's threads do so when a collective has ended, and workers are forked after one. This waits for it;
    # a thread may still come between the two, but none did in 7,200 forks of which some 8 would have hung.
    os.register_at_fork(before=sys._current_frames)


def at_exit(act: Callable[[], None]) -> None:
    """Have this process call ``act`` when the interpreter ends, while threads still run."""
    atexit.register(act)


def at_fork_in_child(act: Callable[[], None]) -> None:
    """Have each process that is forked from this one call ``act`` first."""
    os.register_at_fork(after_in_child=act)


@cache
def keep_batch_memory() -> None:
    """Have the GNU allocator keep the memory of a batch for the next one: freeing a large block tells it to.

    Faulting it in again for each batch takes longer than reading the samples.
    """
    bytearray(31 << 20)


def let_gloo_end() -> None:
    """Give the threads of process groups the time to let go of the last tensors, before Python ends.

    A thread of gloo that still has to is stopped for want of Python when that ends, and torch then ends the process by
    SIGABRT ("terminate called without an active exception"): seen with torch 2.14 in 2 of 12 runs on one busy core.
    """
    atexit.unregister(_rest)  # once only, and before what was registered since
    atexit.register(_rest)


def _rest() -> None:
    time.sleep(_GLOO_ENDS)


def name_files_by_own_draws() -> None:
    """Have s3transfer name unfinished files by a generator of this process alone.

    It draws from Python's global one, from which the augmentation of a batch may draw meanwhile.
    """
    import s3transfer.utils  # type: ignore[import-untyped]

    if hasattr(s3transfer.utils, "random"):
        s3transfer.utils.random = Random()  # noqa: S311 - a name


def waiting_normal() -> dict[str, Any]:
    """The normal number that NumPy may keep for the next call: ``has_gauss`` and ``gauss``.

    It is lost with a change of the bit generator. No function gives that alone. So it is asked for with a bit generator
    in place whose state costs nothing; or, in a NumPy that has no such place, with all the rest.
    """
    numpys: Any = getattr(np.random.mtrand, "_rand", None)
    generator = getattr(numpys, "_bit_generator", None)
    if generator is None:
        state = np.random.get_state(legacy=False)  # noqa: NPY002 - users' code uses it
        return {"has_gauss": state["has_gauss"], "gauss": state["gauss"]}
    numpys._bit_generator = SimpleNamespace(state={"bit_generator": "MT19937"})
    try:
        state = numpys.get_state(legacy=False)
    finally:
        numpys._bit_generator = generator
    return {"has_gauss": state["has_gauss"], "gauss": state["gauss"]}
