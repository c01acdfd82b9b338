"""A run: where it stands, what its epochs hold, and its scores, alike on all ranks."""

import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from infobatch_stream.checkpoint import Saved, pack, unpack
from infobatch_stream.curriculum import Curriculum
from infobatch_stream.distributed import Ranks, collective
from infobatch_stream.errors import ConfigError, OutOfStepError
from infobatch_stream.initial_scores import InitialScores
from infobatch_stream.per_sample import SampleValues
from infobatch_stream.picks import Picks
from infobatch_stream.planning.config import RunConfig
from infobatch_stream.planning.epoch_plan import EpochPlan
from infobatch_stream.planning.global_batch import GlobalBatch
from infobatch_stream.planning.position import RunPosition
from infobatch_stream.run_store import RunStore
from infobatch_stream.sources import Source
from infobatch_stream.store.bootstrap import Contents, Existing
from infobatch_stream.store.history import Epoch

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Run"]

_NUMBERS = count(1)  # and not random: ranks that do the same have the same, so that they may exchange picks
_FLIPPED = "(was a bit flipped on the disk?); their samples count as never seen"


class Run:
    """A run of ``epochs`` over a dataset. Methods marked "Collective" are called by all ranks.

    The arguments are as of `InfoBatchLoader`, validated. Making one communicates only with existing="continue".

    Attributes:
        number: Tells its picks from those of another run, and from those of before a state was loaded.
        position: Where it stands.
        epochs: How many epochs it has; may be raised.
        curriculum: Of which samples its epochs are.
        iteration: Another object whenever an iterator that was begun before is out of date.
        unreadable: Samples that this process could not read so far.
    """

    def __init__(
        self,
        source: Source,
        path: Path,
        config: RunConfig,
        *,
        batch_size: int,
        epochs: int,
        canonical_nodes: int | None,
        existing: Existing,
        history: bool,
        process_group: "dist.ProcessGroup | DeviceMesh | None",
        include: SampleValues | None,
        sample_weight: SampleValues | None,
        initial_scores: InitialScores | None = None,
    ) -> None:
        self.source, self.config, self.epochs = source, config, epochs
        self.curriculum, self._sample_weight = Curriculum(include), sample_weight
        self.scores = RunStore(path, source, existing, history, initial_scores)
        self.number, self.unreadable = next(_NUMBERS), 0
        self._batch_size, self._canonical_nodes, self._process_group = batch_size, canonical_nodes, process_group
        self._known_ranks: Ranks | None = None
        self._warned: set[str] = set()
        self._stand_at(RunPosition())
        samples = source.num_samples if include is None else int(np.count_nonzero(include.values))
        config.check_start(samples, epochs=epochs)
        if Ranks.known():
            _ = self.batch.lanes
            # Early, where nobody else waits for this process; else all hear of it when they open the store.
            if self.ranks.processes == 1:
                self.scores.check_dataset()
        if existing == "continue":
            with collective("InfoBatchLoader(existing='continue')"):
                self.open()
            assert self.scores.store is not None
            self._stand_at(RunPosition(self.scores.store.epoch, knows_all=not self.scores.store.epoch))

    def _stand_at(self, position: RunPosition) -> None:
        """Stand there; nothing is planned or iterated yet."""
        self.position = position
        self.iteration: object = None
        self._planned: tuple[int, EpochPlan] | None = None
        self._started = 0.0

    def warn_once(self, kind: str, text: str) -> None:
        """Warn of ``text``, unless it is empty or something of its kind was said before."""
        if text and kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"InfoBatchLoader: {text}", RuntimeWarning, stacklevel=4)

    # Who, and what the epochs hold -------------------------------------------------------------------------------

    @property
    def ranks(self) -> Ranks:
        """This process among the others."""
        if self._known_ranks is None or self.scores.store is None:  # a process group may be made after the loader
            self._known_ranks = Ranks(self._process_group)
        return self._known_ranks

    @property
    def batch(self) -> GlobalBatch:
        """What all ranks take in a step."""
        ranks = self.ranks
        return GlobalBatch(self._batch_size, ranks.world_size, ranks.nodes, self._canonical_nodes)

    @property
    def _settings(self) -> dict[str, Any]:
        """What has to be equal on all ranks, and in every resumed part of a run."""
        source = self.source
        return {
            "num_samples": source.num_samples,
            "fingerprint": source.fingerprint,
            "global_batch": self.batch.size,
            "mixing": repr(source.mixing),
            **self.config.facts(),
            "include": self.curriculum.first and self.curriculum.first.digest,
            "sample_weight": self._sample_weight and self._sample_weight.digest,
        }

    def plan(self) -> EpochPlan:
        """The plan of this epoch, from the scores as they are known to this process."""
        epochs = self.position.begun or self.epochs  # an epoch that was begun stays what it is when epochs are raised
        if self._planned is None or self._planned[0] != epochs:
            self._planned = epochs, self._plan_at(self.position, self.scores.scores, self.batch.lanes, self.curriculum)
        return self._planned[1]

    def _plan_at(self, position: RunPosition, scores: NDArray[np.float32], lanes: int, masks: Curriculum) -> EpochPlan:
        epochs, size, include = position.begun or self.epochs, self.batch.size, masks.samples
        facts: dict[str, Any] = {"include": include, "seeded": self.scores.seeded(position.epoch, scores, include)}
        return self.config.plan(scores, self.source, position, epochs, lanes=lanes, global_batch=size, **facts)

    def change_include(self, mask: SampleValues | None) -> None:
        """Train on the samples of ``mask`` from the next epoch that begins on. Raises as `Curriculum.change` does."""
        if self.curriculum.change(mask, self.position):
            self._stand_at(self.position)
            self.position.begun = None
            self.number = next(_NUMBERS)  # picks of before are of other samples

    # An epoch ----------------------------------------------------------------------------------------------------

    def begin(self) -> EpochPlan:
        """Commit what was recorded, and begin the next epoch, or go on with one of which nothing is spent yet.

        Collective. Raises ConfigError past the last epoch, OutOfStepError when the ranks are not equally far.
        """
        with collective("iter(loader)"):
            self.open()
            self._meet("iter(loader)")
            if self.position.spent:
                self._advance()
        epoch, position = self.position.epoch, self.position
        if epoch >= self.epochs:
            raise ConfigError(
                f"all {self.epochs} epochs are done. Loop with 'for epoch in range(loader.epoch, loader.epochs)'; to "
                "train on, call loader.commit() and raise loader.epochs before it."
            )
        position.begun = position.begun or self.epochs
        plan = self.plan()
        if plan.infinite:
            self.warn_once("infinite", f"{plan.infinite} scores of {self.scores.path} are infinite {_FLIPPED}")
        seeded = self.scores.seeded(epoch, self.scores.scores, self.curriculum.samples)
        advice = self.config.check(position, plan.entries, epochs=position.begun, seeded=seeded)
        self.warn_once("policy" if epoch else "nothing to prune", advice)
        if self.config.constant_steps and plan.kept < plan.entries:
            self.warn_once(f"small batches {plan.smallest.bit_length()}", self.batch.advice(plan.smallest))
        self.iteration, self._started = object(), self._started or time.monotonic()
        return plan

    def iterate(self, batches: Iterator[Any]) -> Iterator[tuple[Any, Picks]]:
        """``batches`` of the epoch that was begun, as long as the run stands there."""
        found = self._each(batches, self.iteration)
        self.scores.iterated_by(found)
        return found

    def _each(self, batches: Iterator[Any], mine: object) -> Iterator[tuple[Any, Picks]]:
        while True:
            if self.iteration is not mine:
                raise OutOfStepError(
                    "this iterator belongs to an epoch that was left: iter(), commit() or load_state_dict() was "
                    "called since. Take a new one with iter(loader)."
                )
            self.scores.check_scores()  # the plan reads them as it goes
            batch = next(batches, None)
            if batch is None:
                break
            if replaced := batch[1]._origin.replaced:
                self.unreadable += len(replaced)
                self.warn_once("unreadable", f"a sample could not be read and was replaced: {replaced[0]}")
            yield batch
        self.position.exhausted = True

    def record(self, losses: Tensor, picks: Picks) -> None:
        """Take the losses (float[b]) of a step, which is done with it."""
        assert picks._origin.step is not None
        if self.ranks.records:
            self.scores.recorder.add(picks.index.numpy(), picks._record.numpy(), losses)
            self._warn_of_losses()
        self.position.step = max(self.position.step, picks._origin.step + 1)
        self.position.updated = True

    def _warn_of_losses(self) -> None:
        if self.scores.recorder.not_finite:
            self.warn_once("finite", "a loss was NaN or infinite; such losses are not recorded (see stats)")

    # Acting together ---------------------------------------------------------------------------------------------

    def open(self, contents: Contents | None = None) -> None:
        """Have the store open on all ranks. Collective when it is not yet, or when there are ``contents``."""
        self.ranks.count_nodes()
        facts = {"lanes": self.batch.lanes, "epochs": self.epochs, "epoch": self.position.epoch}
        if self.scores.open(self.ranks, contents, **self._settings, **facts):
            self._planned = None

    def _meet(self, call: str) -> None:
        """Have all losses in the store, and all ranks at the same place. Collective."""
        self.ranks.together(call, self.scores.settle)
        self._warn_of_losses()
        at = self.position
        facts = {"epoch": at.epoch, "step": at.step, "spent": at.spent, "epochs": self.epochs}
        self.ranks.agree(call, **facts, **self.curriculum.facts())

    def _advance(self) -> None:
        """Commit this epoch and stand before the next. Collective; the ranks have met."""
        plan, position = self.plan(), self.position  # of the scores before the commit
        if not position.updated and position.step < plan.steps:
            self.warn_once(
                "update",
                f"epoch {position.epoch} went by without update(): its losses are not known, and "
                "nothing can be pruned without losses. Call loss = loader.update(losses, picks) for every batch",
            )
        seconds = time.monotonic() - self._started if self._started else math.nan
        self.scores.commit(Epoch(position.epoch, plan.entries, plan.kept, plan.trained, plan.threshold, seconds))
        position.advance(plan.entries, plan.trained)
        self.curriculum.now = self.curriculum.next
        self._stand_at(position)

    @collective("commit()")
    def commit(self) -> None:
        """Make what was recorded the scores of the next epoch, and stand before it; nothing if nothing is spent.

        Collective.
        """
        self.open()
        self._meet("commit()")
        if self.position.spent:
            self._advance()

    @collective("state_dict()")
    def state_dict(self) -> dict[str, Any]:
        """Where the run stands; on process 0 with the scores. Collective."""
        self.open()
        self._meet("state_dict()")
        progress = self.position.to_state(self.plan().steps, self.batch.lanes)
        parts = self._settings, progress, self.curriculum.to_state(), self.scores.merge()
        leads = self.ranks.process == 0
        return self.ranks.together("state_dict()", lambda: pack(*parts, with_scores=leads))

    @collective("load_state_dict()")
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was saved; its scores replace those of the store. Collective."""
        leads = self.ranks.process == 0
        saved, curriculum = self.ranks.together("load_state_dict()", lambda: self._unpack(state, with_scores=leads))
        facts = {**asdict(saved.position), "lanes": saved.lanes, "chosen": self._canonical_nodes, **curriculum.facts()}
        self.ranks.agree("load_state_dict()", **facts)
        self.open(Contents(saved.scores, saved.pending, saved.position.epoch, saved.seeded))
        self._canonical_nodes, self.curriculum = saved.lanes, curriculum
        self.number = next(_NUMBERS)  # picks of before are of another place
        self._stand_at(saved.position)
        if saved.done:
            self.position.updated = True
            self._advance()

    def _unpack(self, state: dict[str, Any], *, with_scores: bool) -> tuple[Saved, Curriculum]:
        """What ``state`` holds. Raises ConfigError before anything is replaced when this run has no such place."""
        saved = unpack(state, self._settings, with_scores=with_scores)
        curriculum = self.curriculum.of_state(saved.masks, self.source.num_samples)
        epoch, step = saved.position.epoch, saved.position.step
        if (epoch, step) > (self.epochs, 0):
            raise ConfigError(f"the state was saved in epoch {epoch}; this run has {self.epochs}: raise epochs.")
        if step and saved.scores is not None:
            steps = self._plan_at(saved.position, saved.scores, saved.lanes, curriculum).steps
            if step > steps:
                raise ConfigError(f"the state is damaged: it is of step {step} of epoch {epoch}, which has {steps}.")
        return saved, curriculum
