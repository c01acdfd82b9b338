"""MosaicML Composer's Trainer over an InfoBatchLoader."""

from collections.abc import Callable, Iterator
from typing import Any, cast

from composer import Callback, DataSpec, Logger, State
from composer.utils import dist, reproducibility
from torch import Tensor

from infobatch_stream import ConfigError, InfoBatchLoader, Picks
from infobatch_stream.frameworks._composer_checks import check_duration, check_length
from infobatch_stream.frameworks._microbatches import count, rows_of, split
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
        self._loader, self._score = loader, score
        self._batches = _Batches(loader)
        self._data = DataSpec(self._batches, **options)
        self._picks: tuple[Picks, float] | None = None  # of the microbatch, and its share of the loss of its batch
        self._began = 0  # epoch of the loader at Composer's time 0
        self._rng: Any = None  # of a checkpoint
        self.data_spec = DataSpec(
            self._batches,
            batch_transforms=lambda batch: (self._data.batch_transforms(batch[0]), batch[1]),
            split_batch=lambda batch, size: split(batch, size, loader, rows or rows_of),
            microbatch_transforms=self._unpack,
            get_num_samples_in_batch=lambda batch: count(batch, len),
            get_num_tokens_in_batch=lambda batch: count(batch, lambda _: self._data.get_num_tokens_in_batch(batch[0])),
        )

    # Batches and losses ------------------------------------------------------------------------------------------

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
            check_length(state, self._batches.length)
            state.dataloader_len = -1

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse what cannot work, and have the loader stand where Composer does. Collective."""
        loader, time = self._loader, state.timestamp
        check_processes(
            loader, "Composer", dist.get_world_size(), "Call composer.utils.dist.initialize_dist before the loader."
        )
        if state.train_dataloader is not self._batches:
            raise ConfigError("the Trainer trains from another loader: give train_dataloader=infobatch.data_spec.")
        check_length(state, self._batches.length)
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
        check_duration(state, loader, epoch_over=self._batches.over)
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
