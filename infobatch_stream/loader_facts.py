"""What can be asked of a loader: where its run stands, and what its epochs hold."""

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.per_sample import PerSample, mask_of
from infobatch_stream.run import Run
from infobatch_stream.store.score_store import ScoreStore

__all__ = ["LoaderFacts"]


class LoaderFacts:
    """The facts about a loader's run. Base of `InfoBatchLoader`; asking changes and communicates nothing."""

    _run: Run  # set by the loader

    @property
    def epochs(self) -> int:
        """How many epochs the whole run has; may be raised, on resume or after the last."""
        return self._run.epochs

    @epochs.setter
    def epochs(self, epochs: int) -> None:
        self._run.epochs = epochs

    @property
    def include(self) -> NDArray[np.bool_] | None:
        """bool[N]: the samples that are trained on from the next epoch that begins; None: all. May be set."""
        mask = self._run.curriculum.next
        return None if mask is None else mask.values

    @include.setter
    def include(self, include: PerSample | None) -> None:
        self._run.change_include(None if include is None else mask_of(include, self.num_samples))

    @property
    def epoch(self) -> int:
        """The epoch that is trained, or comes next."""
        return self._run.position.epoch

    @property
    def step(self) -> int:
        """How many steps of it were updated."""
        return self._run.position.step

    @property
    def spent(self) -> bool:
        """Whether something of this epoch was used, so that the next iteration is of the next one."""
        return self._run.position.spent

    @property
    def store(self) -> ScoreStore | None:
        """The score store of this node; None before the first iteration opens it."""
        return self._run.scores.store

    @property
    def num_samples(self) -> int:
        """N: samples of the dataset, with the indices 0..N-1."""
        return self._run.source.num_samples

    @property
    def process(self) -> int:
        """The number of this process among all, 0 in a run of one."""
        return self._run.ranks.process

    @property
    def processes(self) -> int:
        """How many processes there are."""
        return self._run.ranks.processes

    @property
    def unpruned_steps(self) -> int:
        """Steps of an epoch that prunes nothing."""
        return self._unpruned(0)

    def _unpruned(self, epoch: int) -> int:
        run = self._run
        return run.config.steps_unpruned(run.source, epoch, run.batch.size, run.curriculum.include)

    @property
    def constant_steps(self) -> bool:
        """Whether every epoch has as many steps as one that prunes nothing."""
        return self._run.config.constant_steps

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, as OneCycleLR takes them.

        Raises:
            ConfigError: Where that is not known in advance, since pruned epochs have fewer steps.
        """
        run = self._run
        return run.config.total_steps(run.source, run.epochs, run.batch.size, run.curriculum.include)

    def __len__(self) -> int:
        """Steps of the current epoch; before the first is begun, of one that prunes nothing.

        With constant_steps all epochs have equally many.
        """
        run = self._run
        return self._unpruned(self.epoch) if run.scores.store is None else run.plan().steps

    @property
    def progress(self) -> float:
        """How much of the whole run is done, 0 to 1, evenly however many steps an epoch has. For schedules."""
        within = self.step / self._run.plan().steps if self.step else 0.0
        return min(1.0, (self.epoch + within) / self.epochs)

    @property
    def kept_share(self) -> float:
        """Share of the current epoch's entries that are kept, over 0 to 1. For learning rates.

        A step stands for 1 / kept_share times as many samples as it holds, and its expected gradient is larger by that.
        """
        plan = self._run.plan()
        return plan.kept / plan.entries

    @property
    def stats(self) -> dict[str, float]:
        """Facts about the current epoch: flat, for a logger.

        epoch, step, steps; kept, pruned: entries of the epoch. threshold: the score from which most is kept: the mean
        under SoftPruning, the last quantile under QuantilePruning, the lowest score that is kept for certain under
        BudgetPruning; NaN without one, as in the first epoch and in annealing. mean_score: of the scores that this
        epoch was planned with, those of the epochs before; infobatch-stream inspect shows in the row of an epoch the
        mean when it was over, which is the mean_score of the next one. saved: share of all entries so far that was not
        trained on, this epoch's included (since the run was continued, if that was without a checkpoint). not_finite,
        unreadable: losses and samples of this process so far.
        """
        plan, before = self._run.plan(), self._run.position
        going = self.epoch < self.epochs
        kept, trained, entries = (plan.kept, plan.trained, plan.entries) if going else (0, 0, 0)
        return {
            "epoch": self.epoch,
            "step": self.step,
            "steps": plan.steps,
            "kept": kept,
            "pruned": entries - kept,
            "threshold": plan.threshold,
            "mean_score": plan.mean_score,
            "saved": 1 - (before.trained + trained) / (before.entries + entries) if before.entries + entries else 0.0,
            "not_finite": self._run.scores.recorder.not_finite,
            "unreadable": self._run.unreadable,
        }
