"""Hugging Face's Trainer over an InfoBatchLoader."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from infobatch_stream import ConfigError, InfoBatchLoader
from infobatch_stream.frameworks._trainer import LoaderTrainer

__all__ = ["InfoBatchTrainer", "causal_lm_loss"]


def causal_lm_loss(outputs: Any, labels: Tensor) -> Tensor:
    """The loss of each sequence under a causal language model: the mean over the tokens that have a label.

    Args:
        outputs: Of the model; ``logits`` float[b, n, words], those at position i for the label at i + 1.
        labels: int64[b, n]; -100 where nothing is to be learnt.

    Returns:
        float32[b]; 0 for a sequence without labels.
    """
    logits = getattr(outputs, "logits", None)
    if logits is None:
        raise ConfigError(
            "the model gives no logits, so there is no loss of each token: leave out what fuses the head with the "
            "loss (use_liger_kernel)."
        )
    labels = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, reduction="none")  # 0 where ignored
    return losses.sum(1) / (labels != -100).sum(1).clamp(min=1)


class InfoBatchTrainer(LoaderTrainer):
    """A Trainer that trains from ``loader``, and evaluates, saves and logs as it always does:

        args = TrainingArguments("out", num_train_epochs=loader.epochs, per_device_train_batch_size=64)
        trainer = InfoBatchTrainer(model, args, loader=loader, eval_dataset=held_out)
        trainer.train()  # resume_from_checkpoint=True to go on

    Its gradient is that of ``sum(weight * loss) / batch_size`` over the global batch. Learning rates follow
    `loader.progress`; with constant_steps they follow the steps, and ``max_steps`` may be given.

    Args:
        loader: its batches are dicts of what the model takes and "labels", so give it a ``collate_fn`` that makes them.
        sample_loss: (outputs of the model, labels) -> float[b], the loss of each sample; default the cross-entropy of
            a classifier's ``outputs.logits``, float[b, classes]. For causal language models: `causal_lm_loss`.
        *args: as of Trainer.
        **kwargs: as of Trainer, but no train_dataset.

    Raises ConfigError for arguments that do not go with the loader.
    """

    def __init__(
        self,
        *args: Any,
        loader: InfoBatchLoader,
        sample_loss: Callable[[Any, Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._sample_loss = sample_loss or self._cross_entropy
        self._use(loader)

    def _check(self) -> None:
        super()._check()
        if self.train_dataset is not None or self.compute_loss_func is not None:
            raise ConfigError(
                "train_dataset and compute_loss_func are not for InfoBatchTrainer: the loader has the dataset, and "
                "sample_loss= gives the loss of each sample."
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """``mean(weight * loss)`` of a batch of the loader; the plain mean of one without picks, as in evaluation."""
        inputs = dict(inputs)
        picks, labels = inputs.pop("picks", None), inputs.pop("labels")
        outputs = model(**inputs)
        losses = self._sample_loss(outputs, labels)
        loss = losses.mean() if picks is None else self._weighted(losses, picks)
        return (loss, outputs) if return_outputs else loss

    def _cross_entropy(self, outputs: Any, labels: Tensor) -> Tensor:
        logits = outputs.logits
        if logits.ndim != 2 or labels.ndim != 1:
            raise ConfigError(
                f"the model gives logits {list(logits.shape)} for labels {list(labels.shape)}; without sample_loss= "
                "they are [b, classes] and [b]. Give sample_loss=, a function of outputs and labels to float[b]."
            )
        smoothing = self.args.label_smoothing_factor
        return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
