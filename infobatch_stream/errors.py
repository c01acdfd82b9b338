"""What can go wrong, by what the user has to do about it.

Every message says what was found, what is allowed, and what to do.
"""

__all__ = [
    "InfoBatchError",
    "ConfigError",
    "DataError",
    "StoreError",
    "OutOfStepError",
    "LostRanksError",
    "MissingExtraError",
]


class InfoBatchError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(InfoBatchError, ValueError):
    """An argument, or a combination of them, that cannot work."""


class DataError(InfoBatchError, RuntimeError):
    """A shard or a sample that is missing, damaged or in a form that cannot be read by index."""


class StoreError(InfoBatchError, RuntimeError):
    """A score store that is missing, damaged, foreign, or made for another dataset."""


class OutOfStepError(InfoBatchError, RuntimeError):
    """Ranks, picks or iterators that do not belong to the same moment of the same run."""


class LostRanksError(InfoBatchError, RuntimeError):
    """Other processes of the run that cannot be reached any more: one ended, or the network between them did."""


class MissingExtraError(InfoBatchError, ImportError):
    """An optional dependency that is not installed; the message names the pip extra."""

    @classmethod
    def of(cls, package: str, extra: str) -> "MissingExtraError":
        """Error for ``package``, which comes with ``infobatch-stream[extra]``."""
        return cls(
            f"{package} is needed here and could not be imported. "
            f"Install it with: pip install 'infobatch-stream[{extra}]'"
        )
