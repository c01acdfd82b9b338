"""What a Trainer of Composer may ask for: a duration, a length of epochs and schedules that the loader has."""

import inspect

from composer import State
from composer.core import Time, TimeUnit
from composer.optim import ComposerScheduler

from infobatch_stream import ConfigError, InfoBatchLoader

__all__ = ["check_duration", "check_length"]


def check_length(state: State, length: int) -> None:
    """Raise ConfigError where the Trainer's epochs are cut to other than ``length`` batches."""
    if state.dataloader_len is not None and int(state.dataloader_len) != length:
        raise ConfigError(
            f"train_subset_num_batches={int(state.dataloader_len)} would cut epochs off, which leaves samples out: "
            "leave it away. For a short try, use fewer samples."
        )


def check_duration(state: State, loader: InfoBatchLoader, *, epoch_over: bool) -> None:
    """Raise ConfigError for a duration that the loader does not have, or that cannot be known in advance.

    Args:
        state: Of the Trainer, whose schedules are looked at too.
        loader: That it trains from.
        epoch_over: Whether the Trainer stands at the end of an epoch, and the loader before the next.
    """
    time, wanted = state.timestamp, state.max_duration
    assert wanted is not None
    allowed = (TimeUnit.EPOCH, TimeUnit.BATCH) if loader.constant_steps else (TimeUnit.EPOCH,)
    if wanted.unit not in allowed:
        raise ConfigError(
            f"max_duration={wanted.to_timestring()}: how much of that a run has is not known in advance, since "
            'skipped samples do not count. Give epochs, as f"{loader.epochs}ep"; or batches ("ba"), for which the '
            "loader needs constant_steps=True."
        )
    epochs = range(loader.epoch, loader.epochs)
    left = len(epochs) + int(time.epoch) + epoch_over
    if wanted.unit == TimeUnit.BATCH:
        left = sum(map(loader.unpruned_steps_of, epochs)) - loader.step + int(time.batch)
    if wanted.value > left:
        raise ConfigError(
            f"max_duration={wanted.to_timestring()}, but with what is left of the {loader.epochs} epochs of the "
            f"loader it ends at {Time(left, wanted.unit).to_timestring()}. Give the loader more epochs, or the "
            "Trainer (fit(duration=)) fewer."
        )
    if not loader.constant_steps:
        _check_schedules(state)


def _check_schedules(state: State) -> None:
    """Raise ConfigError for schedules of Composer's own, which take pruned epochs to be as long as others."""
    for schedule in state.schedulers:
        for rate in filter(inspect.isfunction, getattr(schedule, "lr_lambdas", ())):
            kind = inspect.getclosurevars(rate).nonlocals.get("scheduler")
            if isinstance(kind, ComposerScheduler):
                raise ConfigError(
                    f"{type(kind).__name__} takes all epochs to be as long as the current one, but pruned epochs "
                    "are shorter. Give schedulers=lambda state: rate(loader.progress), where rate takes 0 to 1; or "
                    "give the loader constant_steps=True."
                )
