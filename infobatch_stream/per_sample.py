"""One value for each sample, as users give it: an array, or a file with one."""

import os
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infobatch_stream.errors import ConfigError
from infobatch_stream.sample_file import read_sample_file

__all__ = ["PerSample", "SampleValues", "mask_of", "weights_of"]

PerSample = ArrayLike | str | os.PathLike[str]


class SampleValues:
    """One value for each sample; nobody may change them.

    values: [N], any dtype.
    """

    def __init__(self, values: NDArray[Any]) -> None:
        self.values = values
        values.flags.writeable = False

    @cached_property
    def digest(self) -> str:
        """A short text that is another for other values."""
        packed = np.packbits(self.values) if self.values.dtype == np.bool_ else self.values
        return blake2b(np.ascontiguousarray(packed).data, digest_size=8).hexdigest()


def mask_of(include: PerSample | None, num_samples: int) -> SampleValues | None:
    """Which samples ``include`` names: bool[N]; None for all.

    include: bool[N]; or indices, int[k], each once; or a file of either (`read_sample_file`), in which samples that
    have no row are not included.

    Raises ConfigError for what is neither, names no sample, or one twice, or one that there is not.
    """
    if include is None:
        return None
    values = _values("include", include, num_samples, missing=False)
    if not values.size:
        values = values.astype(np.int64)  # an empty list has the type of a float
    if values.dtype == np.bool_ and values.shape == (num_samples,):
        mask = np.array(values)
    elif values.dtype.kind in "iu" and values.ndim == 1:
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < num_samples:
            raise ConfigError(
                f"include has indices from {values.min()} to {values.max()}; the dataset has the samples 0 to "
                f"{num_samples - 1}."
            )
        mask = np.zeros(num_samples, dtype=np.bool_)
        mask[values] = True
        if (once := int(mask.sum())) < values.size:
            raise ConfigError(
                f"include names {once} samples by {values.size} indices, so some more than once. Give each once, or a "
                "mask as bool. To train on a sample more often, give sample_weight."
            )
    else:
        raise ConfigError(
            f"include is {values.dtype}{list(values.shape)}; give bool[{num_samples}], or the indices of samples, "
            "int[k]."
        )
    if not mask.any():
        raise ConfigError("include names no sample, so there is nothing to train on.")
    return None if mask.all() else SampleValues(mask)


def weights_of(sample_weight: PerSample | None, num_samples: int) -> SampleValues | None:
    """What a user gives for weights of samples, float[N] or a file as of `mask_of`: float32[N].

    Raises ConfigError unless it is one number for each sample, finite and not negative.
    """
    if sample_weight is None:
        return None
    values = _values("sample_weight", sample_weight, num_samples, missing=None)
    if values.dtype.kind not in "fiu" or values.shape != (num_samples,):
        raise ConfigError(f"sample_weight is {values.dtype}{list(values.shape)}; give float[{num_samples}].")
    with np.errstate(over="ignore"):  # it is told below
        weights = values.astype(np.float32)
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if wrong.size:
        raise ConfigError(
            f"sample_weight of sample {wrong[0]} is {values[wrong[0]]}, and {wrong.size} in all are like it; they must "
            "be finite and not negative. To leave samples out, give include=."
        )
    return SampleValues(weights)


def _values(name: str, given: PerSample, num_samples: int, missing: bool | None) -> NDArray[Any]:
    if isinstance(given, str | os.PathLike):
        return read_sample_file(name, given, num_samples, missing=missing)
    return np.asarray(given)
