"""Lightning's own Trainer over an InfoBatchLoader, in two processes with gloo. torchrun runs this file as them."""

import os
import shutil
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from support.ddp.launch import process_group
from support.framework_runs import (
    BATCH,
    EPOCHS,
    check_example,
    check_full_precision,
    check_like_plain,
    check_refused,
    check_rest,
    check_whole,
    digits,
    ended_with,
    loader_at,
    losses_of,
    network,
    one_process,
    optimizer_of,
    plain_run,
    ranks_of,
    report,
    steps_of,
    validation,
)
from torch.utils.data import DataLoader

from infobatch_stream import ConfigError

pytestmark = pytest.mark.ddp

# Where a run is gone on with, given in which step its epochs end.
MOMENTS = {
    "within an epoch": lambda ends: f"batch-{ends[0] + 5:03d}",
    "after the last batch, before a shorter epoch": lambda ends: f"batch-{ends[0]:03d}",
    "after the last batch, before a longer epoch": lambda ends: f"batch-{ends[2]:03d}",
    "after the validation of an epoch": lambda ends: f"validation-{ends[1]:03d}",
    "after an epoch": lambda ends: f"epoch-{ends[1]:03d}",
    "after all": lambda ends: f"epoch-{ends[3]:03d}",
}
# With constant steps, of which an epoch has 15: checkpoint, and whether the callback is needed.
RESUMED = {
    "by steps, within an epoch": ("batch-020", False),
    "by steps, after a validation": ("validation-023", False),
    "by steps, after the last batch": ("batch-030", True),
    "by steps, after an epoch": ("epoch-030", True),
    "by steps, after all": ("epoch-060", True),
}
REFUSED = {
    "max_epochs": ({"max_epochs": 9}, "max_epochs=loader.epochs"),
    "max_steps": ({"max_steps": 30}, "Leave max_steps out"),
    "max_steps alone": ({"max_steps": 30, "max_epochs": None}, "Leave max_steps out"),
    "too many steps": (
        {"max_steps": 61, "max_epochs": None, "loader_options": {"constant_steps": True}},
        "has 60 steps of the optimizer left",
    ),
    "limit_train_batches": ({"limit_train_batches": 0.5}, "limit_train_batches is 0.5"),
    "overfit_batches": ({"overfit_batches": 3}, "overfit_batches"),
    "val_check_interval": ({"val_check_interval": 5}, "a share of the epoch"),
}


# ---- in each of the processes


def module_of(loader, stop_at):
    from lightning.pytorch import LightningModule

    class Digits(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.validated, self.rates, self.steps = [], [], None

        def training_step(self, batch, batch_idx):
            data, picks = batch
            return loader.update(losses_of(self.net, data), picks)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.trainer.should_stop |= self.trainer.global_step == stop_at

        def on_before_optimizer_step(self, optimizer):
            self.rates.append(optimizer.param_groups[0]["lr"])

        def validation_step(self, batch, batch_idx):
            self.log("loss", losses_of(self.net, batch).mean(), sync_dist=True)

        def on_validation_end(self):
            self.validated.append((loader.epoch, loader.step))

        def configure_optimizers(self):
            if loader.constant_steps:
                self.steps = self.trainer.estimated_stepping_batches
            optimizer, schedule = optimizer_of(self.net.parameters(), loader, self.trainer.accumulate_grad_batches)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Digits()


def notes_end(ended):
    """A callback that notes where loader and Trainer are when a training ends."""
    from lightning.pytorch.callbacks import LambdaCallback

    return LambdaCallback(
        on_train_end=lambda trainer, _: ended.append((trainer.train_dataloader.epoch, trainer.current_epoch))
    )


def ends_of(run):
    return list(accumulate(steps_of(run)))


def half_of(run):
    """The step in the middle of the second epoch."""
    steps = steps_of(run)
    return steps[0] + steps[1] // 2


def saving(folder):
    """Lightning's callbacks that save a checkpoint whenever one may be saved."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    for moment, choice in {
        "batch": {"every_n_train_steps": 1},
        "validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
        "epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    }.items():
        kind = type(moment, (ModelCheckpoint,), {})  # it takes one of a class and interval
        name = moment + "-{step:03d}"
        yield kind(folder, filename=name, auto_insert_metric_name=False, save_top_k=-1, **choice)


def trainer_of(loader, saves=None, also=(), adapter=True, by_steps=False, **options):
    from lightning.pytorch import Trainer

    from infobatch_stream.frameworks.lightning import InfoBatchCallback

    length = {"max_steps": loader.total_steps} if by_steps else {"max_epochs": loader.epochs}
    options = {**length, "num_sanity_val_steps": 0, **options}
    return Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        callbacks=[*([InfoBatchCallback(loader)] if adapter else []), *(saving(saves) if saves else ()), *also],
        enable_checkpointing=bool(saves),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit(
    out,
    name,
    checkpoint=None,
    saves=None,
    stop_at=None,
    loader_options=None,
    train_loader=None,
    also=(),
    adapter=True,
    **options,
):
    """What a run reports, with a store of its own."""
    loader, seen = loader_at(out / f"{name}.zarr", **(loader_options or {}))
    model = module_of(loader, stop_at)
    trainer = trainer_of(loader, saves, also, adapter, **options)
    trainer.fit(model, train_loader or loader, validation(), ckpt_path=checkpoint)
    if not adapter:
        loader.commit()  # nobody else does
    facts = {"validated": model.validated, "rates": model.rates, "estimated": model.steps}
    return report(loader, seen, model, steps=trainer.global_step, **facts)


def state_in(file):
    return torch.load(file, weights_only=False)["loops"]["fit_loop"]["state_dict"]["combined_loader"]


def main(out):
    with process_group() as (rank, _):
        found = {
            "plain": plain_run(out / "plain.zarr"),
            "whole": fit(out, "whole", saves=out / "saved"),
            "halves": fit(out, "halves", saves=out / "halves", val_check_interval=0.5),
            "plain accumulating": plain_run(out / "plain2.zarr", accumulate=2),
            # With workers that outlive the epochs.
            "accumulating": fit(
                out,
                "accumulating",
                accumulate_grad_batches=2,
                loader_options={"num_workers": 1, "persistent_workers": True},
            ),
            "bf16": fit(out, "bf16", precision="bf16-mixed"),
        }
        for number, (moment, file) in enumerate(MOMENTS.items()):
            saved = out / "saved" / f"{file(ends_of(found['whole']))}.ckpt"
            found[moment] = fit(out, f"rest-{number}", saved, saves=out / "again" if "shorter" in moment else None)
        within = MOMENTS["within an epoch"](ends_of(found["whole"]))
        found["resumed twice"] = fit(out, "twice", out / "again" / f"{within}.ckpt")
        half = out / "halves" / f"validation-{half_of(found['halves']):03d}.ckpt"
        found["half"] = fit(out, "half", half, val_check_interval=0.5)
        found["stopped"] = fit(out, "stopped", saves=out / "stopped", stop_at=20)
        for moment in ("validation", "epoch"):
            saved = out / "stopped" / f"{moment}-020.ckpt"
            found[f"after the stop, {moment}"] = fit(out, f"rest-{moment}", saved)
        found["plain, constant steps"] = plain_run(out / "plain3.zarr", constant_steps=True)
        by_steps = {"loader_options": {"constant_steps": True}, "by_steps": True, "val_check_interval": 4}
        found["by steps"] = fit(out, "steps", saves=out / "steps", adapter=False, **by_steps)
        for name, (file, adapter) in RESUMED.items():
            found[name] = fit(out, f"rest {name}", out / "steps" / f"{file}.ckpt", adapter=adapter, **by_steps)
        for case, (options, _) in REFUSED.items():
            found[case] = ended_with(fit, out, case, **options)
        found["another loader"] = ended_with(fit, out, "another", train_loader=validation())
        fit(out, "tried", fast_dev_run=True)
        found["after a try"] = fit(out, "tried")
        torch.save(found, out / f"{rank}.pt")


# ---- what they found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("lightning")
    return ranks_of(__file__, out), out / "saved"


@pytest.mark.parametrize("case", ["whole", "accumulating", "bf16", "after a try"])
def test_every_planned_step_is_made_and_every_kept_sample_occurs_once(runs, case):
    check_whole(runs[0][case])


def test_picks_scores_weights_and_learning_rates_are_those_of_a_plain_loop(runs):
    check_like_plain(runs[0]["whole"], runs[0]["plain"])


def test_accumulated_gradients_are_those_of_a_plain_loop_to_the_last_batch_of_each_epoch(runs):
    check_like_plain(runs[0]["accumulating"], runs[0]["plain accumulating"])


@pytest.mark.parametrize("case", ["whole", "accumulating"])
def test_each_epoch_is_validated_whatever_its_length(runs, case):
    for rank in runs[0][case]:
        assert rank["validated"] == list(enumerate(steps_of(rank)))


def test_validations_in_the_middle_of_an_epoch_follow_its_length(runs):
    for rank in runs[0]["halves"]:
        halves = [steps // 2 for steps in steps_of(rank)]
        assert rank["validated"] == [(epoch, half * n) for epoch, half in enumerate(halves) for n in (1, 2)]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_resumed_run_is_the_rest_of_the_one_that_was_not_stopped(runs, moment):
    whole, rest = runs[0]["whole"], runs[0][moment]
    done = int(MOMENTS[moment](ends_of(whole[0])).split("-")[1])
    check_rest(whole, rest, done)
    for rank in rest:
        assert rank["validated"] == [place for place in whole[0]["validated"] if place in rank["validated"]]
        assert len(rank["validated"]) == len({step[0] for step in rank["seen"]})


def test_a_resumed_run_can_be_resumed(runs):
    whole, rest = runs[0]["whole"], runs[0]["resumed twice"]
    check_rest(whole, rest, steps_of(whole[0])[0] + 5)
    assert [rank["validated"] for rank in rest] == [rank["validated"][1:] for rank in whole]


def test_a_run_resumed_from_a_validation_within_an_epoch_is_the_rest_of_it(runs):
    whole, rest = runs[0]["halves"], runs[0]["half"]
    check_rest(whole, rest, half_of(whole[0]))
    assert [rank["validated"] for rank in rest] == [rank["validated"][3:] for rank in whole]


@pytest.mark.parametrize("moment", ["validation", "epoch"])
def test_an_epoch_that_was_broken_off_is_gone_on_with(runs, moment):
    for rank in runs[0]["stopped"]:
        assert (len(rank["seen"]), rank["epoch"]) == (20, 1)
    check_rest(runs[0]["whole"], runs[0][f"after the stop, {moment}"], 20)
    whole = runs[0]["whole"][0]
    for rank in runs[0][f"after the stop, {moment}"]:
        assert rank["validated"] == whole["validated"][1:]
        assert rank["steps"] == whole["steps"]


def test_steps_are_counted_on_after_resuming(runs):
    for moment in MOMENTS:
        assert [rank["steps"] for rank in runs[0][moment]] == [rank["steps"] for rank in runs[0]["whole"]]


def test_with_constant_steps_nothing_but_lightning_is_needed_for_a_whole_run(runs):
    check_whole(runs[0]["by steps"], constant_steps=True)
    check_like_plain(runs[0]["by steps"], runs[0]["plain, constant steps"])
    for rank in runs[0]["by steps"]:
        assert rank["estimated"] == rank["steps"] == len(rank["seen"]) == 60
        assert rank["validated"] == [(epoch, step) for epoch in range(EPOCHS) for step in (4, 8, 12)]


@pytest.mark.parametrize("case", RESUMED)
def test_with_constant_steps_a_run_that_counts_steps_goes_on_exactly(runs, case):
    whole, rest = runs[0]["by steps"], runs[0][case]
    done = int(RESUMED[case][0].split("-")[1])
    check_rest(whole, rest, done)
    for rank in rest:
        assert rank["steps"] == 60
        assert rank["validated"] == [place for place in whole[0]["validated"] if place[0] * 15 + place[1] > done]


def test_a_checkpoint_holds_one_state_with_scores(runs):
    (state,) = state_in(runs[1] / "batch-020.ckpt")  # rank 0 wrote it, after all ranks had asked for theirs
    assert sum(isinstance(value, torch.Tensor) for value in state.values()) == 2


def test_losses_under_mixed_precision_are_recorded_in_full_precision(runs):
    check_full_precision(runs[0]["bf16"])


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_count_on_epochs_of_one_length_are_refused(runs, case):
    check_refused(runs[0][case], REFUSED[case][1])


def test_another_loader_than_that_of_the_callback_is_refused(runs):
    check_refused(runs[0]["another loader"], "another loader")


# ---- in this process


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The folder of a run that ended after two epochs of ``half.zarr``; and what a whole run reports."""
    out = tmp_path_factory.mktemp("half")
    whole = fit(out, "whole")
    fit(out, "half", stop_at=ends_of(whole)[1])
    return out, whole


@one_process
def test_a_run_that_is_continued_without_a_checkpoint_trains_for_the_epochs_that_are_left(half, tmp_path):
    out, whole = half
    shutil.copytree(out / "half.zarr", tmp_path / "half.zarr")
    ended = []
    rest = fit(tmp_path, "half", saves=tmp_path, loader_options={"existing": "continue"}, also=[notes_end(ended)])
    assert rest["validated"] == whole["validated"][2:]
    assert [step[:2] for step in rest["seen"]] == [step[:2] for step in whole["seen"] if step[0] > 1]
    assert ended == [(EPOCHS, EPOCHS)]
    assert rest["epoch"] == EPOCHS
    assert (tmp_path / f"epoch-{rest['steps']:03d}.ckpt").exists()


@one_process
def test_a_second_fit_after_one_that_was_stopped_begins_the_next_epoch(tmp_path):
    loader, seen = loader_at(tmp_path / "scores.zarr")
    trainer_of(loader).fit(module_of(loader, 20), loader)
    model = module_of(loader, None)
    trainer_of(loader).fit(model, loader, validation())
    assert [epoch for epoch, _ in model.validated] == [1, 2, 3]
    assert steps_of({"seen": seen}) == [20, *(steps for _, steps in model.validated)]
    assert loader.epoch == EPOCHS


@one_process
def test_a_run_of_which_nothing_is_left_is_refused_before_it_trains_nothing(half, tmp_path):
    loader, _ = loader_at(half[0] / "whole.zarr", existing="continue")
    with pytest.raises(ConfigError, match=r"all 4 epochs of the loader are done.*existing='overwrite'"):
        trainer_of(loader).fit(module_of(loader, None), loader)


@one_process
@pytest.mark.parametrize("method", ["lr_find", "scale_batch_size"])
def test_the_tuner_is_refused_before_it_records_anything(tmp_path, method):
    from lightning.pytorch.tuner import Tuner

    loader, seen = loader_at(tmp_path / "scores.zarr")
    model = module_of(loader, None)
    model.lr, model.batch_size, model.train_dataloader = 0.1, BATCH, lambda: loader
    with pytest.raises(ConfigError, match=r"Search beforehand.*without InfoBatchCallback"):
        getattr(Tuner(trainer_of(loader)), method)(model)
    assert not seen
    assert not loader._run.scores.path.exists()


@one_process
def test_after_a_search_with_a_trainer_of_its_own_a_run_is_as_ever(tmp_path):
    """The remedy that the error names."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.tuner import Tuner

    loader, _ = loader_at(tmp_path / "scores.zarr")
    model = module_of(loader, None)
    model.lr = 0.1
    model.training_step = lambda batch: losses_of(model.net, batch).mean()
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    found = Tuner(trainer).lr_find(model, DataLoader(digits(), BATCH), num_training=20)
    assert found.suggestion() > 0
    check_whole([fit(tmp_path, "scores")])


@pytest.mark.parametrize(("ranks", "epochs"), [(1, 2), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_the_example_goes_on_with_its_checkpoint(tmp_path, ranks, epochs):
    accuracy = check_example("lightning_ddp.py", tmp_path, ranks, ["--epochs", epochs], stop_after=20)
    assert accuracy > (0.85 if epochs > 2 else 0.5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
