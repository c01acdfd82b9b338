"""Lightning's Trainer over an InfoBatchLoader."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from infobatch_stream import ConfigError, InfoBatchLoader
from infobatch_stream.frameworks._processes import check_processes

__all__ = ["InfoBatchCallback"]


class InfoBatchCallback(Callback):
    """Has a Trainer run the epochs of ``loader`` in full, go on from its checkpoints, and commit at the end:

        trainer = Trainer(max_epochs=loader.epochs, callbacks=[InfoBatchCallback(loader)])
        trainer.fit(model, loader, val_loader)

    Lightning itself saves the loader's state in its checkpoints. The callback loads it, also from those that were
    saved at the end of an epoch (Lightning would not), and asks for the length of every epoch anew. Without a
    checkpoint the Trainer counts from the epoch of the loader, which is not 0 with existing="continue".

    With constant_steps ``Trainer(max_steps=loader.total_steps)`` does as well as ``max_epochs``.

    Raises ConfigError for options of the Trainer that do not go with epochs of changing length (which constant_steps
    makes equal), for the Tuner, and when no epoch is left, or fewer steps than ``max_steps`` asks for.
    """

    def __init__(self, loader: InfoBatchLoader) -> None:
        self._loader = loader
        self._nothing_left = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and have Lightning look at the loader anew in each epoch. Collective."""
        if stage != "fit":
            return
        check_processes(self._loader, "the Trainer", trainer.world_size, "See devices= and strategy= of the Trainer.")
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        _check_tuner(trainer)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _check(trainer, self._loader)
            if self._loader.spent:  # of a fit that was broken off: the iterator would begin the next epoch
                self._loader.commit()
            _count_from(trainer, self._loader.epoch)  # a checkpoint, which is loaded later, says otherwise

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ConfigError when no epoch is left, unless a checkpoint says so: Lightning would train nothing."""
        loader = self._loader
        if self._nothing_left or trainer.strategy.restore_checkpoint_after_setup:
            return
        if loader.epoch >= loader.epochs and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ConfigError(
                f"all {loader.epochs} epochs of the loader are done, so there is nothing to fit. To train on, make the "
                "loader (and Trainer(max_epochs=)) with more epochs; to begin anew, with existing='overwrite'."
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load the loader's state (collective), and have the counters of Lightning stand where the loader stands."""
        if trainer.state.fn != "fit":
            return
        loader, loop = self._loader, checkpoint["loops"]["fit_loop"]
        states = loop["state_dict"].pop("combined_loader", [])  # popped: Lightning would load it once more
        if len(states) != 1:
            raise ConfigError(
                f"the checkpoint holds the state of {len(states)} loaders; one that was saved while training from an "
                "InfoBatchLoader holds one. Resume from such a checkpoint."
            )
        loader.load_state_dict(states[0])
        going_on = loader.epoch < loader.epochs
        _stand_at(loop, loader.epoch, loader.step, restarts=trainer.max_steps != -1 and going_on)
        if not going_on:
            self._nothing_left = True
            trainer.limit_train_batches = 0  # else Lightning takes an iterator before it sees that all is done

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ConfigError when it is another loader that is trained from, or one that has too few steps left."""
        if trainer.train_dataloader is not self._loader:
            raise ConfigError(
                "the Trainer trains from another loader than that of the InfoBatchCallback: "
                f"{type(trainer.train_dataloader).__name__}. Give the same InfoBatchLoader, alone, to both, and return "
                "it from train_dataloader() each time."
            )
        _check_steps(trainer, self._loader)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the Trainer as it was given."""
        if self._nothing_left:
            self._nothing_left = False
            trainer.limit_train_batches = 1.0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Commit the last epoch (collective); one that was broken off can still be gone on with."""
        if self._loader.step == len(self._loader):
            self._loader.commit()


def _check_tuner(trainer: Trainer) -> None:
    """Raise ConfigError for what trains a few steps to try something, and then goes back."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # the Tuner puts its own there
        if isinstance(callback, LearningRateFinder | BatchSizeFinder):
            raise ConfigError(
                f"{type(callback).__name__} (Tuner.lr_find, Tuner.scale_batch_size) trains for a few steps and goes "
                "back, but their losses would stay recorded, and the loader would not go back. Search beforehand: with "
                "a Trainer of its own, without InfoBatchCallback, on torch.utils.data.DataLoader(dataset, batch_size); "
                "then make the loader, and the Trainer anew, with what was found."
            )


def _count_from(trainer: Trainer, epoch: int) -> None:
    """Have the Trainer stand where ``epoch`` epochs are over."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    progress.ready = progress.started = progress.processed = progress.completed = epoch


def _check(trainer: Trainer, loader: InfoBatchLoader) -> None:
    """Raise ConfigError for what takes epochs to be of one length, unless they are, or leaves samples out."""
    if trainer.max_steps != -1 and not loader.constant_steps:
        raise ConfigError(
            f"Trainer(max_steps={trainer.max_steps}): how many steps a run has is not known in advance, since pruned "
            "epochs are shorter. Leave max_steps out, and give max_epochs; or give the loader constant_steps=True."
        )
    by_steps = trainer.max_steps != -1 and trainer.max_epochs == -1  # as Trainer(max_steps=) alone has it
    if trainer.max_epochs != loader.epochs and not by_steps:
        raise ConfigError(
            f"Trainer(max_epochs={trainer.max_epochs}) and InfoBatchLoader(epochs={loader.epochs}) differ: the loader "
            "plans the whole run. Give both the same number; max_epochs=loader.epochs."
        )
    if trainer.limit_train_batches != 1.0:
        raise ConfigError(
            f"limit_train_batches is {trainer.limit_train_batches} (overfit_batches sets it too): epochs that are cut "
            "off leave samples out. Leave both out; for a short try, use fewer samples or fast_dev_run."
        )
    by_batches = isinstance(trainer.val_check_interval, int) and trainer.check_val_every_n_epoch is not None
    if by_batches and not loader.constant_steps:
        raise ConfigError(
            f"Trainer(val_check_interval={trainer.val_check_interval}): an epoch may have fewer batches than that. "
            "Give a share of the epoch, as 0.5, or check_val_every_n_epoch=None to count the batches of the whole run; "
            "or give the loader constant_steps=True."
        )


def _check_steps(trainer: Trainer, loader: InfoBatchLoader) -> None:
    """Raise ConfigError when ``max_steps`` asks for more than the loader has: it would end in the loader's error."""
    module: Any = trainer.lightning_module
    if trainer.max_steps == -1 or trainer.max_epochs != -1 or not module.automatic_optimization:
        return  # else it is for the user what a step is
    parts = trainer.accumulate_grad_batches
    left = (loader.epochs - loader.epoch) * math.ceil(loader.unpruned_steps / parts) - loader.step // parts
    if trainer.max_steps - trainer.global_step > left:
        raise ConfigError(
            f"Trainer(max_steps={trainer.max_steps}) stands at step {trainer.global_step}, and the loader has {left} "
            "steps of the optimizer left. Give at most as many as its epochs have, as "
            "max_steps=loader.total_steps, or give max_epochs=loader.epochs instead."
        )


def _stand_at(loop: dict[str, Any], epoch: int, step: int, *, restarts: bool) -> None:
    """Have the saved counters say that ``epoch`` epochs are over, and of the next one ``step`` batches.

    They may differ by one. A checkpoint that was saved after the last batch of an epoch is, for Lightning, still in it:
    it compares the batches with the length of the epoch, but the loader already has that of the next. And an epoch
    that was broken off (by trainer.should_stop) is over for Lightning.

    restarts: Lightning takes itself to be within an epoch whatever the counters say, as with max_steps. Then they are
    those that it saves after the last batch, the one end of an epoch from which it goes on rightly.
    """
    over = loop["epoch_progress"]["current"]["processed"]
    batches, stepped = loop["epoch_loop.batch_progress"], loop["epoch_loop.state_dict"]
    if restarts and step == 0 and epoch:
        _say(loop, begun=epoch, over=epoch - 1)
        for part in (batches["total"], batches["current"]):
            part["completed"] = part["processed"] - 1
        stepped["_batches_that_stepped"] -= over == epoch
    elif over < epoch and step == 0:
        _say(loop, begun=epoch, over=epoch)
        batches["total"]["completed"] = batches["total"]["processed"]
        stepped["_batches_that_stepped"] += 1  # Lightning counts a batch after saving
    elif over > epoch and step:
        _say(loop, begun=epoch + 1, over=epoch)


def _say(loop: dict[str, Any], *, begun: int, over: int) -> None:
    """Have the saved counters of epochs say so."""
    for part in loop["epoch_progress"].values():
        part.update(ready=begun, started=begun, processed=over, completed=over)
