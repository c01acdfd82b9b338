"""What the Trainers over an InfoBatchLoader share: batches, epochs, learning rates, checkpoints and logs."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from infobatch_stream import ConfigError, InfoBatchLoader, Picks
from infobatch_stream.frameworks._processes import check_processes

__all__ = ["LoaderTrainer"]

_STATE = "infobatch.pt"  # of the loader, in the folder of a checkpoint


class LoaderTrainer(Trainer):
    """A Trainer of transformers that trains from a loader. Base beside another Trainer, or alone.

    A subclass calls `_use` at the end of its ``__init__``, and `_weighted` for the batches of its ``compute_loss`` that
    have "picks" among their inputs.
    """

    def _use(self, loader: InfoBatchLoader) -> None:
        """Train from ``loader``. Raises ConfigError for arguments that do not go with it."""
        self._loader = loader
        self._check()
        self.args.ignore_data_skip = True  # the loader itself goes on where it stood
        self.model_accepts_loss_kwargs = False  # a mean over samples: nothing is to be divided by a count of labels
        self.add_callback(_Epochs(loader))  # type: ignore[no-untyped-call]
        self._steps_before = 0  # of the optimizer, in the part of the run that is resumed
        self._sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)

    def _check(self) -> None:
        args, loader = self.args, self._loader
        check_processes(loader, "the Trainer", args.world_size, "Without GPUs, give TrainingArguments(use_cpu=True).")
        by_steps = args.max_steps > 0  # then the Trainer itself does not look at num_train_epochs
        if by_steps and not loader.constant_steps:
            raise ConfigError(
                f"TrainingArguments(max_steps={args.max_steps}): how many steps a run has is not known in advance, "
                "since pruned epochs are shorter. Leave max_steps out, and give num_train_epochs; or give the loader "
                "constant_steps=True."
            )
        if by_steps and args.max_steps > (most := self._updates(0)):
            raise ConfigError(
                f"TrainingArguments(max_steps={args.max_steps}): the {loader.epochs} epochs of the loader have {most} "
                "steps of the optimizer. Give at most as many, or the loader more epochs."
            )
        for name, found, wanted in (
            ("num_train_epochs", args.num_train_epochs, args.num_train_epochs if by_steps else loader.epochs),
            ("per_device_train_batch_size", args.per_device_train_batch_size, loader.batch_size),
        ):
            if found != wanted:
                raise ConfigError(f"TrainingArguments({name}={found}), the loader has {wanted}: give both the same.")
        if args.include_tokens_per_second:
            raise ConfigError(
                "include_tokens_per_second counts tokens in all batches before it trains, which would use up an epoch "
                "of the loader. Give include_num_input_tokens_seen=True instead: it counts while it trains."
            )
        if args.auto_find_batch_size:
            raise ConfigError("auto_find_batch_size cannot change the batch size of the loader: leave it out.")
        if args.n_gpu > 1:
            raise ConfigError(
                f"the Trainer would split each batch over {args.n_gpu} GPUs in one process; start it with torchrun, "
                "one process per GPU (or show it one: CUDA_VISIBLE_DEVICES=0)."
            )

    # Losses ------------------------------------------------------------------------------------------------------

    def _weighted(self, losses: Tensor, picks: Picks, score: Tensor | None = None) -> Tensor:
        """What `InfoBatchLoader.update` gives for the losses of a batch, float[b]; they are counted for the logs."""
        picks = picks.to(losses.device)
        loss = self._loader.update(losses, picks, score=score)
        found, weight, kept = losses.detach(), picks.weight, picks.weight > 0
        self._sums += torch.stack([(weight * found).sum(), weight.sum(), found[kept].sum(), kept.sum()])
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer; with ``loss`` also these, of all ranks since it was logged last.

        data_loss: weighted mean, an estimate of the mean over all data, pruned samples included. kept_loss: plain
        mean over the samples trained on. saved: share of all samples so far that was not trained on.
        """
        if "loss" in logs and self.is_in_train:
            weighted, weights, plain, kept = self.accelerator.reduce(self._sums, "sum").tolist()
            self._sums.zero_()
            logs |= {"data_loss": weighted / weights, "kept_loss": plain / kept, "saved": self._loader.stats["saved"]}
        super().log(logs, start_time)

    # Epochs, steps, learning rates -------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """The loader's batches, with the picks among the inputs."""
        return _Batches(self._loader)

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: Any, total_train_batch_size: int
    ) -> tuple[Any, ...]:
        """What the Trainer takes for the size of the run: that of one that prunes nothing, which no run exceeds.

        With constant_steps it is the size.
        """
        loader = self._loader
        epochs = loader.epochs if self._steps_before else loader.epochs - loader.epoch
        updates = self._updates(loader.epochs - epochs)
        # By this the Trainer divides the steps of the resumed part to learn in which epoch it is.
        per_epoch = self._steps_before / (loader.epoch + 0.5) if self._steps_before else -(-updates // epochs)
        # Without a checkpoint it counts from 0, and so gets as many epochs as the loader has left.
        most = min(args.max_steps, updates) if args.max_steps > 0 else updates
        samples = min(loader.num_samples * epochs, most * total_train_batch_size)
        return epochs, per_epoch, loader.num_samples, samples, True, len(dataloader), most

    def _updates(self, first: int) -> int:
        """Steps of the optimizer in the epochs first.. if they pruned nothing."""
        loader, each = self._loader, self.args.gradient_accumulation_steps
        return sum(math.ceil(loader.unpruned_steps_of(epoch) / each) for epoch in range(first, loader.epochs))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The scheduler that ``args`` name; unless steps are constant, along the loader's progress instead of them."""
        own = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, cast(Any, optimizer))
        if own and isinstance(scheduler, LambdaLR) and not self._loader.constant_steps:
            scheduler.lr_lambdas = [self._by_progress(rate, num_training_steps) for rate in scheduler.lr_lambdas]
        return scheduler

    def _by_progress(self, rate: Callable[[Any], float], steps: int) -> Callable[[int], float]:
        return lambda _: rate(steps * self._loader.progress)

    # Checkpoints -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer; the loader goes on where it stood when the checkpoint was saved (collective).

        Without a checkpoint it trains for the epochs that the loader has left, of one with existing="continue" fewer
        than all. Raises ConfigError when none is left.
        """
        self._steps_before = 0
        folder: Any = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)  # type: ignore[no-untyped-call]
        if folder:  # if there is none, the Trainer says so
            self._go_on(Path(folder))
            return super().train(folder, *args, **kwargs)
        # Opens the store, without which the length of a first epoch that prunes is not known; and ends the epoch of a
        # training that was broken off, as the iterator would.
        self._loader.commit()
        if not resume_from_checkpoint and self._loader.epoch >= self._loader.epochs:
            raise ConfigError(
                f"all {self._loader.epochs} epochs of the loader are done, so there is nothing to train. To train on, "
                "make the loader (and num_train_epochs) with more epochs; to begin anew, with existing='overwrite'."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ConfigError: the trials would train on with each other's scores."""
        raise ConfigError(
            "hyperparameter_search runs train() once per trial on one loader, which is one run over one store. Write "
            "the loop over the trials yourself, with a loader, a store and an InfoBatchTrainer for each."
        )

    def _go_on(self, folder: Path) -> None:
        if not (folder / _STATE).exists():
            raise ConfigError(
                f"{folder} has no {_STATE}, the state of the loader: it was saved with save_only_model, by another "
                "Trainer, or not to the end. Resume from another checkpoint."
            )
        try:
            state = torch.load(folder / _STATE, weights_only=True, map_location="cpu", mmap=True)
        except Exception as error:  # torch's own say nothing of the file
            raise ConfigError(
                f"{folder / _STATE} cannot be read ({type(error).__name__}: {error}): it is cut short or damaged. "
                "Resume from another checkpoint."
            ) from error
        self._loader.load_state_dict(state)
        self._steps_before = TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[no-untyped-call]
        state = self._loader.state_dict()
        if self.args.should_save:
            new = Path(output_dir, f"{_STATE}.new")
            torch.save(state, new)
            new.replace(Path(output_dir, _STATE))  # whole, or not there


class _Batches:
    """What is left of the loader's epoch, as dicts."""

    def __init__(self, loader: InfoBatchLoader) -> None:
        self._loader = loader
        self._include = loader.include

    def __len__(self) -> int:
        return len(self._loader) - self._loader.step

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._loader.include is not self._include:
            raise ConfigError(
                "loader.include was changed in the midst of train(), and the Trainer counts steps by the samples that "
                "it began with. Change it between two trainings, each with as many epochs as its stage, or write the "
                "loop yourself."
            )
        for data, picks in self._loader:
            if not isinstance(data, Mapping) or "labels" not in data:
                found = f"keys {sorted(map(str, data))}" if isinstance(data, Mapping) else type(data).__name__
                raise ConfigError(
                    f"a batch of the loader is of {found}; the Trainer needs a dict of what the model takes, with "
                    '"labels". Let the samples be dicts, or give the loader a collate_fn that makes one.'
                )
            yield {**data, "picks": picks}


class _Epochs(TrainerCallback):
    """Commits when an epoch ends, since the Trainer asks for the length of the next before it takes an iterator."""

    def __init__(self, loader: InfoBatchLoader) -> None:
        self._loader = loader

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        state.epoch = self._loader.progress * self._loader.epochs

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        broken_off = self._loader.step < len(self._loader) and control.should_training_stop
        if not broken_off:  # else it can be gone on with
            self._loader.commit()
