"""Hugging Face Accelerate over an InfoBatchLoader."""

from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from accelerate.utils import send_to_device

from infobatch_stream import ConfigError, InfoBatchLoader, Picks
from infobatch_stream.frameworks._processes import check_processes

__all__ = ["AcceleratedLoader"]


class AcceleratedLoader(DataLoaderStateMixin):  # type: ignore[misc]  # untyped
    """The batches of ``loader`` on the accelerator's device, as a loader that Accelerate knows:

        batches = AcceleratedLoader(loader, accelerator)
        for epoch in range(loader.epoch, loader.epochs):
            for (x, y), picks in batches:
                with accelerator.accumulate(model): ...

    ``accelerator.prepare`` leaves an InfoBatchLoader alone, which is right: it is split among the ranks already. What
    is missing then is done here: batches are moved to the device, ``accumulate`` steps at the last batch of an epoch,
    however many it has, and ``save_state`` and ``load_state`` take the state of the loader along.

    A schedule by steps (constant_steps) that is prepared needs ``DataLoaderConfiguration(split_batches=True)``:
    Accelerate steps it once per process otherwise.

    Raises ConfigError when the accelerator knows of other processes than the loader.
    """

    def __init__(self, loader: InfoBatchLoader, accelerator: Accelerator) -> None:
        remedy = "Without GPUs, give Accelerator(cpu=True)."
        check_processes(loader, "the Accelerator", accelerator.num_processes, remedy)
        self.gradient_state = GradientState()
        self._loader = loader
        self._accelerator = accelerator
        accelerator.register_for_checkpointing(self)

    def __len__(self) -> int:
        """Steps of the current epoch, as of the loader."""
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Any, Picks]]:
        """Batches of the next epoch. Collective, as the loader's."""
        batches = iter(self._loader)
        left = len(self._loader) - self._loader.step
        self.begin()
        try:
            for number, batch in enumerate(batches, 1):
                self.end_of_dataloader = number == left
                yield send_to_device(batch, self._accelerator.device)
        finally:
            self.end()

    def state_dict(self) -> dict[str, Any]:
        """The loader's. Collective. Raises ConfigError between two steps of the optimizer: gradients are not saved."""
        if not self._accelerator.sync_gradients:
            raise ConfigError(
                "save_state() was called while gradients are accumulated: they would be lost, and their samples not "
                "trained on. Save when accelerator.sync_gradients is true."
            )
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was saved. Collective."""
        self._loader.load_state_dict(state)
