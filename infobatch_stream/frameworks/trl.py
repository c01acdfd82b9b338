"""TRL's SFTTrainer over an InfoBatchLoader."""

from collections.abc import Callable, Sized
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import trl
from numpy.typing import NDArray
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.sft_trainer import SFTTrainer

from infobatch_stream import ConfigError, InfoBatchLoader
from infobatch_stream.frameworks._trainer import LoaderTrainer

__all__ = ["InfoBatchSFTTrainer"]

_LENGTHS = "sample_lengths"  # in a flattened batch: list[int], how many tokens each sample has


class InfoBatchSFTTrainer(LoaderTrainer, SFTTrainer):
    """An SFTTrainer that trains from a loader over the dataset that it has prepared:

        def loader_of(trainer):
            return InfoBatchLoader(
                trainer.train_dataset, "scores.zarr", batch_size=8, epochs=3, collate_fn=trainer.data_collator
            )

        args = SFTConfig("out", num_train_epochs=3, per_device_train_batch_size=8)
        trainer = InfoBatchSFTTrainer(model, args, train_dataset=texts, processing_class=tokenizer, loader=loader_of)
        trainer.train()  # resume_from_checkpoint=True to go on

    A sample is a row of the prepared dataset: a sequence, or with ``packing`` all those that lie in a row. Its loss is
    the mean over its tokens that have a label. Else it is as InfoBatchTrainer.

    Args:
        loader: (this trainer) -> the loader over its ``train_dataset``, which is prepared then, with its
            ``data_collator``. Called once.
        *args: as of SFTTrainer.
        **kwargs: as of SFTTrainer.

    Raises ConfigError for arguments that do not go with the loader.

    Attributes:
        loader: what that function returned.
    """

    args: Any
    model: Any
    train_dataset: Any
    data_collator: Any

    def __init__(self, *args: Any, loader: Callable[["InfoBatchSFTTrainer"], InfoBatchLoader], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refuse()
        self.train_dataset = self._remove_unused_columns(self.train_dataset, description="training")
        if self.padding_free:
            self.data_collator = _Flattened(self.data_collator)
        self.loader = loader(self)
        self._use(self.loader)

    def _refuse(self) -> None:
        """What cannot work with any loader, before one is made, for which the model may go over all data."""
        if Version(trl.__version__) < Version("1.16"):
            raise ConfigError(f"trl {trl.__version__} gives no loss of each token: update it to 1.16 or newer.")
        if not isinstance(self.train_dataset, Sized):
            raise ConfigError("train_dataset is streamed, and the loader needs its samples by number: load it whole.")
        if self.compute_loss_func is not None or self.args.label_smoothing_factor:
            raise ConfigError(
                "compute_loss_func gives a loss of the whole batch, and with label_smoothing_factor TRL gives no loss "
                "of each token: leave them out."
            )
        split = self.accelerator.parallelism_config
        if split is not None and split.non_data_parallel_size > 1:
            raise ConfigError(
                "with tensor, context or sequence parallelism several processes share a sample, and the loader gives "
                "each its own: leave tp_size, cp_size and sp_size at 1."
            )

    def _check(self) -> None:
        super()._check()
        if self._loader.num_samples != len(self.train_dataset):
            found = f"{self._loader.num_samples} samples, the prepared dataset {len(self.train_dataset)}"
            raise ConfigError(
                f"the loader has {found}: let loader= make it of the trainer.train_dataset that it is given."
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """``mean(weight * loss)`` of a batch of the loader, with SFTTrainer's metrics; its own loss in evaluation."""
        inputs = dict(inputs)
        picks, lengths = inputs.pop("picks", None), inputs.pop(_LENGTHS, None)
        if picks is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        if self.padding_free and lengths is None:
            raise ConfigError(
                "a flattened batch is without the lengths of its samples: give collate_fn=trainer.data_collator."
            )
        found: list[Any] = []
        hook = model.register_forward_hook(lambda _, __, outputs: found.append(outputs))
        try:
            super().compute_loss(model, inputs)  # type: ignore[no-untyped-call] # counts for the logs
        finally:
            hook.remove()
        outputs = found[0]
        losses = score = _means(outputs, -outputs.log_probs, lengths)
        if self.args.loss_type == "dft":  # low for tokens of low probability too, so that it is no score
            losses = _means(outputs, -outputs.log_probs * outputs.log_probs.detach().exp(), lengths)
        loss = self._weighted(losses, picks, score)
        if self.aux_loss_enabled:  # balances experts: of the batch
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def sample_losses(self) -> NDArray[np.float32]:
        """float32[N]: the loss of each sample under the model as it is, for the loader's initial_scores. Collective.

        Rows in the order of ``train_dataset``.
        """
        trains, size = self.model.training, self.args.per_device_eval_batch_size
        self.model.eval()
        losses = torch.zeros(len(self.train_dataset), device=self.args.device)
        mine = range(self.args.process_index, len(losses), self.args.world_size)
        for first in range(0, len(mine), size):
            rows = list(mine[first : first + size])
            inputs: dict[str, Any] = self._prepare_inputs(self.data_collator([self.train_dataset[row] for row in rows]))
            lengths = inputs.pop(_LENGTHS, None)
            with self.accelerator.autocast():
                outputs = self.model(**inputs, fused_lm_head=True)
            losses[rows] = _means(outputs, -outputs.log_probs, lengths)
        self.model.train(trains)
        return np.asarray(self.accelerator.reduce(losses, "sum").cpu())


def _means(outputs: Any, losses: Tensor, lengths: list[int] | None) -> Tensor:
    """float32[b]: the mean of each sample over its tokens with a label. losses: float[rows, n], 0 for those without.

    lengths: the tokens of each sample, where all lie in one row.
    """
    counted = outputs.label_mask
    if lengths is not None:  # a loss is of the token at the next position, and the first has none
        whole = [F.pad(part, (1, 0))[0, : sum(lengths)] for part in (losses, counted)]
        losses, counted = (pad_sequence(list(torch.split(part, lengths)), batch_first=True) for part in whole)
    means: Tensor = losses.float().sum(1) / counted.sum(1).clamp(min=1)
    return means


class _Flattened:
    """A collator that lays its samples end to end in one row, and says how long each is."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self._collate = collate

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        return {**self._collate(samples), _LENGTHS: [len(sample["input_ids"]) for sample in samples]}
