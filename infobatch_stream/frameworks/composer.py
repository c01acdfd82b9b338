"""MosaicML Composer's Trainer over an InfoBatchLoader."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, cast

from composer import Callback, DataSpec, Logger, State
from composer.core import Time, TimeUnit
from composer.optim import ComposerScheduler
from composer.utils import dist, reproducibility
from torch import Tensor

from infobatch_stream import ConfigError, InfoBatchLoader, Picks
from infobatch_stream.frameworks._processes import check_processes

__all__ = ["InfoBatchCallback"]


class InfoBatchCallback(Callback):  # type: ignore[misc]  # untyped where it is not installed
    """Has a Trainer train from ``loader``, with a model whose ``loss()`` returns one number per sample:

        infobatch = InfoBatchCallback(loader)
        trainer = Trainer(
            model=model, train_dataloader=infobatch.data_spec, callbacks=[infobatch], max_duration=f"{loader.epochs}ep"
        )

    The model gets the data alone, as from any other loader. The callback keeps the picks of each microbatch, records
    its losses and makes them ``sum(weight * loss) / batch_size`` of the whole batch. The state of the loader is in
    Composer's checkpoints; from them training goes on with the picks that were to come, and with the random state.

    Args:
        loader: The loader; made after ``composer.utils.dist.initialize_dist`` where there are several processes.
        score: (outputs, batch) -> float[b], recorded instead of the losses.
        rows: (data, slice) -> the data of these rows of a batch; default as Composer splits batches.
        **options: As of DataSpec, for the data alone, as get_num_tokens_in_batch; but no split_batch.

    Attributes:
        data_spec: What the Trainer takes as train_dataloader.

    Raises ConfigError for what cannot work with the loader, when ``fit`` begins.
    """

    def __init__(
        self,
        loader: InfoBatchLoader,
        *,
        score: Callable[[Any, Any], Tensor] | None = None,
        rows: Callable[[Any, slice], Any] | None = None,
        **options: Any,
    ) -> None:
        self._loader, self._score, self._rows = loader, score, rows or _rows
        self._batches = _Batches(loader)
        self._data = DataSpec(self._batches, **options)
        self._picks: tuple[Picks, float] | None = None  # of the microbatch, and its share of the loss of its batch
        self._began = 0  # epoch of the loader at Composer's time 0
        self._rng: Any = None  # of a checkpoint
        self.data_spec = DataSpec(
            self._batches,
            batch_transforms=lambda batch: (self._data.batch_transforms(batch[0]), batch[1]),
            split_batch=self._split,
            microbatch_transforms=self._unpack,
            get_num_samples_in_batch=lambda batch: _count(batch, len),
            get_num_tokens_in_batch=lambda batch: _count(batch, lambda _: self._data.get_num_tokens_in_batch(batch[0])),
        )

    # Batches and losses ------------------------------------------------------------------------------------------

    def _split(self, batch: tuple[Any, Picks], size: int | float) -> list[tuple[Any, Picks, bool, float]]:
        """Parts of at most ``size`` rows, equally many on all ranks, as FSDP needs it: (data, picks, first, share)."""
        if not isinstance(size, int):
            raise ConfigError(f"device_train_microbatch_size={size}: the loader's samples cannot be cut into parts.")
        (data, picks), stats = batch, self._loader.stats
        largest = len(picks)
        if self._loader.constant_steps:  # a rank may have a sample less than another
            largest = max(largest, -int(-stats["kept"] // (stats["steps"] * self._loader.processes)))
        parts = min(-(-largest // size), len(picks))
        ends = [len(picks) * part // parts for part in range(parts + 1)]
        found = []
        for start, end in pairwise(ends):
            rows = slice(start, end)
            share = 1.0 if self._loader.constant_steps else (end - start) / len(picks)
            found.append((self._rows(data, rows) if parts > 1 else data, picks[rows], start == 0, share))
        return found

    def _unpack(self, part: tuple[Any, Picks, bool, float]) -> Any:
        """The data of a microbatch, which is all that the model sees."""
        data, picks, _, share = part
        self._picks = picks, share
        return self._data.microbatch_transforms(data)

    def after_loss(self, state: State, logger: Logger) -> None:
        """Record the losses, and go backward from the weighted ones."""
        assert self._picks is not None
        picks, share = self._picks
        score = None if self._score is None else self._score(state.outputs, state.batch)
        state.loss = self._loader.update(cast(Tensor, state.loss), picks, score=score) * share

    # Epochs ------------------------------------------------------------------------------------------------------

    def after_load(self, state: State, logger: Logger) -> None:
        """Take the length of the epoch that was loaded."""
        if state.train_dataloader is self._batches:
            self._check_length(state)
            state.dataloader_len = -1

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse what cannot work, and have the loader stand where Composer does. Collective."""
        loader, time = self._loader, state.timestamp
        check_processes(
            loader, "Composer", dist.get_world_size(), "Call composer.utils.dist.initialize_dist before the loader."
        )
        if state.train_dataloader is not self._batches:
            raise ConfigError("the Trainer trains from another loader: give train_dataloader=infobatch.data_spec.")
        self._check_length(state)
        if loader.spent:  # of a fit that ended within an epoch: go on with it, not with the next
            loader.load_state_dict(loader.state_dict())
        epoch, batch = int(time.epoch), int(time.batch_in_epoch)
        if epoch == batch == 0:
            self._began = loader.epoch
        here = (loader.epoch, loader.step)
        self._batches.over = batch > 0 and here == (self._began + epoch + 1, 0)  # saved after an epoch's last batch
        if here != (self._began + epoch, batch) and not self._batches.over:
            raise ConfigError(
                f"Composer stands at batch {batch} of epoch {epoch}, the loader at step {here[1]} of epoch "
                f"{here[0] - self._began}: the checkpoint is without the state of the loader, or a training was broken "
                "off by an error. Make loader and Trainer anew, and load a checkpoint saved with this callback."
            )
        self._check_duration(state)
        state.dataset_resumption["train"] = True  # the loader itself goes on where it stood

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Restore the random state of a checkpoint, and take the length of the epoch, which has begun now."""
        if self._rng is not None and state.timestamp.batch_in_epoch:  # else Composer has done it
            reproducibility.load_rng_state(self._rng)
        self._rng = None
        state.dataloader_len = -1

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Log the loader's stats, commit, and take the length of the next epoch. Collective."""
        logger.log_metrics({f"infobatch/{name}": value for name, value in self._loader.stats.items()})
        self._loader.commit()
        self._batches.over = False
        state.dataloader_len = -1

    def state_dict(self) -> dict[str, Any]:
        """The state of the loader and the random state of all ranks. Collective."""
        rng = reproducibility.get_rng_state()
        return {"loader": self._loader.state_dict(), "began": self._began, "rng": rng}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was saved. Collective."""
        self._loader.load_state_dict(state["loader"])
        self._began, self._rng = state["began"], state["rng"]

    def _check_length(self, state: State) -> None:
        if state.dataloader_len is not None and int(state.dataloader_len) != self._batches.length:
            raise ConfigError(
                f"train_subset_num_batches={int(state.dataloader_len)} would cut epochs off, which leaves samples out: "
                "leave it away. For a short try, use fewer samples."
            )

    def _check_duration(self, state: State) -> None:
        """Raise ConfigError for a duration that the loader does not have, or that cannot be known in advance."""
        loader, time, wanted = self._loader, state.timestamp, state.max_duration
        assert wanted is not None
        allowed = (TimeUnit.EPOCH, TimeUnit.BATCH) if loader.constant_steps else (TimeUnit.EPOCH,)
        if wanted.unit not in allowed:
            raise ConfigError(
                f"max_duration={wanted.to_timestring()}: how much of that a run has is not known in advance, since "
                'skipped samples do not count. Give epochs, as f"{loader.epochs}ep"; or batches ("ba"), for which the '
                "loader needs constant_steps=True."
            )
        epochs = range(loader.epoch, loader.epochs)
        left = len(epochs) + int(time.epoch)
        if self._batches.over:
            left += 1
        if wanted.unit == TimeUnit.BATCH:
            left = sum(map(loader.unpruned_steps_of, epochs)) - loader.step + int(time.batch)
        if wanted.value > left:
            raise ConfigError(
                f"max_duration={wanted.to_timestring()}, but with what is left of the {loader.epochs} epochs of the "
                f"loader it ends at {Time(left, wanted.unit).to_timestring()}. Give the loader more epochs, or the "
                "Trainer (fit(duration=)) fewer."
            )
        for schedule in () if loader.constant_steps else state.schedulers:
            for rate in filter(inspect.isfunction, getattr(schedule, "lr_lambdas", ())):
                kind = inspect.getclosurevars(rate).nonlocals.get("scheduler")
                if isinstance(kind, ComposerScheduler):
                    raise ConfigError(
                        f"{type(kind).__name__} takes all epochs to be as long as the current one, but pruned epochs "
                        "are shorter. Give schedulers=lambda state: rate(loader.progress), where rate takes 0 to 1; or "
                        "give the loader constant_steps=True."
                    )


class _Batches:
    """The loader, as Composer takes it.

    Attributes:
        over: Whether the epoch that Composer is in has no batch left, and the loader is at the next.
        length: What len() said last.
    """

    def __init__(self, loader: InfoBatchLoader) -> None:
        self._loader = loader
        self.batch_size = loader.batch_size
        self.over, self.length = False, -1

    def __len__(self) -> int:
        self.length = len(self._loader)
        return self.length

    def __iter__(self) -> Iterator[tuple[Any, Picks]]:
        return iter(()) if self.over else iter(self._loader)


def _count(batch: Any, of: Callable[[Picks], int]) -> int:
    """What Composer counts of a batch; of parts 1 in all, since it weighs their losses by that, which are weighted."""
    if not isinstance(batch, tuple) or len(batch) < 2 or not isinstance(batch[1], Picks):
        return 1  # the data of a microbatch
    return of(batch[1]) if len(batch) == 2 else int(batch[2])


def _rows(data: Any, rows: slice) -> Any:
    """These rows of a batch: a tensor, a dict, a tuple or a list of columns, or a list of numbers or strings."""
    if isinstance(data, Mapping):
        return {key: part if isinstance(part, int | float | str) else _rows(part, rows) for key, part in data.items()}
    if isinstance(data, tuple | list) and data and not isinstance(data[0], int | float | str):
        return [part[rows] if isinstance(part, list | tuple) else _rows(part, rows) for part in data]
    if isinstance(data, Tensor | tuple | list):
        return data[rows]
    raise ConfigError(
        f"the data of a batch holds a {type(data).__name__}, which cannot be split into microbatches. Give "
        "InfoBatchCallback(rows=), a function of the data and a slice; or leave device_train_microbatch_size out."
    )
