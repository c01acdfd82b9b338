"""The Trainer of transformers over an InfoBatchLoader, in two processes with gloo. torchrun runs this file as them."""

import math
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.ddp.launch import process_group
from support.framework_runs import (
    BATCH,
    EPOCHS,
    LR,
    check_example,
    check_full_precision,
    check_like_plain,
    check_refused,
    check_rest,
    check_whole,
    digits,
    ended_with,
    loader_at,
    one_process,
    optimizer_of,
    plain_run,
    ranks_of,
    report,
    steps_of,
)

from infobatch_stream import ConfigError

pytestmark = pytest.mark.ddp

ENDS = (1, 3)  # epochs after which a run is gone on with
REFUSED = {
    "num_train_epochs": ({"num_train_epochs": 9}, "num_train_epochs=9"),
    "per_device_train_batch_size": ({"per_device_train_batch_size": 8}, "per_device_train_batch_size=8"),
    "max_steps": ({"max_steps": 30}, "Leave max_steps out"),
    "too many steps": ({"max_steps": 61, "loader_options": {"constant_steps": True}}, "have 60 steps of the optimizer"),
    "include_tokens_per_second": ({"include_tokens_per_second": True}, "include_num_input_tokens_seen=True"),
    "auto_find_batch_size": ({"auto_find_batch_size": True}, "auto_find_batch_size"),
}


# With constant steps, of which an epoch has 15: nothing here is of InfoBatch.
BY_STEPS = {
    "max_steps": EPOCHS * 15,
    "lr_scheduler_type": "linear",
    "warmup_steps": 6,
    "eval_strategy": "steps",
    "eval_steps": 7,
    "save_strategy": "steps",
    "save_steps": 20,
    "include_num_input_tokens_seen": True,
}


# ---- in each of the processes


class Pictures:
    """Digits as dicts."""

    def __init__(self):
        self.pixels, self.labels = digits().tensors

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index].view(1, 8, 8), "labels": self.labels[index]}


def model_of():
    """A vision transformer of 4 patches."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    picture = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTForImageClassification(ViTConfig(**sizes, **picture, **dropout))


def losses_of(net, data):
    return F.cross_entropy(net(pixel_values=data["pixel_values"]).logits, data["labels"], reduction="none")


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=LR, momentum=0.9)


def linear(parameters, loader, accumulate):
    """The schedule that BY_STEPS names."""
    from transformers import get_linear_schedule_with_warmup

    optimizer = sgd(parameters)
    return optimizer, get_linear_schedule_with_warmup(optimizer, BY_STEPS["warmup_steps"], loader.total_steps)


def fit(
    out,
    name,
    checkpoint=None,
    named_schedule=None,
    stop_at=None,
    loader_options=None,
    batches=None,
    by_steps=False,
    **options,
):
    """What a run reports, with a store of its own. named_schedule: one of the Trainer's own.

    by_steps: with constant steps and BY_STEPS.
    """
    from transformers import TrainerCallback, TrainingArguments

    from infobatch_stream.frameworks.transformers import InfoBatchTrainer

    loader_options = {"constant_steps": by_steps, **(loader_options or {})}
    loader, seen = loader_at(out / f"{name}.zarr", batches or Pictures(), **loader_options)
    model = model_of()
    validated, rates = [], []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            validated.append((loader.epoch, loader.step, state.epoch))

        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append((loader.progress, optimizer.param_groups[0]["lr"]))

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == stop_at

    length = BY_STEPS if by_steps else {"num_train_epochs": loader.epochs, "eval_strategy": "epoch"}
    choices = {"per_device_train_batch_size": BATCH, "max_grad_norm": 0, "use_cpu": True, **length, **options}
    optimizers = (sgd(model.parameters()), None) if by_steps else optimizer_of(model.parameters(), loader)
    if named_schedule:
        choices |= {"lr_scheduler_type": named_schedule, "warmup_ratio": 0.1, "learning_rate": LR}
        optimizers = None, None
    args = TrainingArguments(
        str(out / f"of-{name}"),
        per_device_eval_batch_size=512,
        logging_steps=5,
        report_to=[],
        disable_tqdm=True,
        **choices,
    )
    trainer = InfoBatchTrainer(
        model,
        args,
        loader=loader,
        eval_dataset=Pictures(),
        callbacks=[Watch()],
        optimizers=optimizers,
    )
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    logs = trainer.state.log_history
    facts = {"steps": trainer.state.global_step, "last rate": trainer.lr_scheduler.get_last_lr()}
    return report(loader, seen, model, validated=validated, rates=rates, logs=logs, **facts)


def main(out):
    # Else the Trainer cannot load its optimizer: on several processes it takes their CPU for "cpu:0".
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    two = {"gradient_accumulation_steps": 2, "save_strategy": "no"}
    plain = {"by_number": True, "losses_of": losses_of, "dataset": Pictures()}
    with process_group() as (rank, _):
        found = {
            "plain": plain_run(out / "plain.zarr", model=model_of(), **plain),
            "whole": fit(out, "whole", save_strategy="epoch"),
            "plain accumulating": plain_run(out / "plain2.zarr", accumulate=2, model=model_of(), **plain),
            "accumulating": fit(out, "accumulating", **two),
            "named schedule": fit(out, "named", named_schedule="cosine", save_strategy="no"),
            "stopped": fit(out, "stopped", stop_at=20, save_strategy="epoch"),
            "after the stop": fit(out, "rest", out / "of-stopped" / "checkpoint-20", save_strategy="no"),
        }
        for epoch in ENDS:
            checkpoint = out / "of-whole" / f"checkpoint-{sum(steps_of(found['whole'])[: epoch + 1])}"
            found[f"after epoch {epoch}"] = fit(out, f"after-{epoch}", checkpoint, save_strategy="no")
        fit(out, "stopped2", stop_at=10, **{**two, "save_strategy": "epoch"})
        found["accumulating after the stop"] = fit(out, "rest2", out / "of-stopped2" / "checkpoint-10", **two)
        options = {**plain, "optimizer_of": linear, "constant_steps": True}
        found["plain by steps"] = plain_run(out / "plain3.zarr", model=model_of(), **options)
        found["by steps"] = fit(out, "steps", by_steps=True)
        found["rest by steps"] = fit(out, "rest3", out / "of-steps" / "checkpoint-20", by_steps=True)
        for case, (options, _) in REFUSED.items():
            found[case] = ended_with(fit, out, case, **options)
        found["no state"] = ended_with(fit, out, "none", out)
        found["tuples"] = ended_with(fit, out, "tuples", batches=digits())
        found["bf16"] = fit(out, "bf16", bf16=True, save_strategy="no")  # for all that follow in these processes
        found["alone"] = ended_with(fit, out, "alone", use_cpu=False)  # and without GPUs
        torch.save(found, out / f"{rank}.pt")


# ---- what they found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("trainer")
    return ranks_of(__file__, out), out


@pytest.mark.parametrize("case", ["whole", "accumulating", "named schedule", "bf16"])
def test_every_planned_step_is_made_and_every_kept_sample_occurs_once(runs, case):
    check_whole(runs[0][case])


@pytest.mark.parametrize("kind", ["", " accumulating"])
def test_picks_scores_weights_and_learning_rates_are_those_of_a_plain_loop(runs, kind):
    mine, plain = runs[0][kind.strip() or "whole"], runs[0][f"plain{kind}"]
    check_like_plain(mine, plain, lambda rates: [rate for _, rate in rates])


@pytest.mark.parametrize("case", ["whole", "accumulating"])
def test_each_epoch_is_validated_and_counted_whatever_its_length(runs, case):
    for rank in runs[0][case]:
        assert rank["validated"] == [(epoch, 0, pytest.approx(epoch)) for epoch in range(1, EPOCHS + 1)]


def test_schedules_of_the_trainer_run_along_the_progress_of_the_loader(runs):
    def rate(progress, warmup=0.1):
        if progress < warmup:
            return LR * progress / warmup
        return LR * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2

    for rank in runs[0]["named schedule"]:
        reached = [0.0, *(progress for progress, _ in rank["rates"])][:-1]  # a rate is that of the step before
        assert [found for _, found in rank["rates"]] == pytest.approx([rate(done) for done in reached])
        assert rank["rates"][-1][0] == 1


@pytest.mark.parametrize("epoch", ENDS)
def test_a_run_resumed_after_an_epoch_is_the_rest_of_the_one_that_was_not_stopped(runs, epoch):
    whole, rest = runs[0]["whole"], runs[0][f"after epoch {epoch}"]
    check_rest(whole, rest, sum(steps_of(whole[0])[: epoch + 1]))
    assert [rank["validated"] for rank in rest] == [rank["validated"][epoch + 1 :] for rank in whole]
    assert [rank["steps"] for rank in rest] == [rank["steps"] for rank in whole]


def test_a_run_resumed_within_an_epoch_is_the_rest_of_the_one_that_was_not_stopped(runs):
    for rank in runs[0]["stopped"]:
        assert (len(rank["seen"]), rank["epoch"]) == (20, 1)
    whole, rest = runs[0]["whole"], runs[0]["after the stop"]
    check_rest(whole, rest, 20)
    assert [rank["validated"] for rank in rest] == [rank["validated"][1:] for rank in whole]
    for mine, its in zip(whole, rest, strict=True):  # of the steps before the stop too
        assert losses_logged(mine) == losses_logged(its)


def losses_logged(rank):
    return [(log["step"], log["epoch"], log["data_loss"]) for log in rank["logs"] if "data_loss" in log]


def test_a_resumed_run_accumulates_as_the_one_that_was_not_stopped(runs):
    whole, rest = runs[0]["accumulating"], runs[0]["accumulating after the stop"]
    check_rest(whole, rest, 15 + 2 * 2)  # 8 steps of the optimizer in the first epoch, then 2
    assert [rank["steps"] for rank in rest] == [rank["steps"] for rank in whole]


def test_with_constant_steps_the_trainer_counts_steps_as_without_a_loader_of_its_own(runs):
    check_whole(runs[0]["by steps"], constant_steps=True)
    check_like_plain(runs[0]["by steps"], runs[0]["plain by steps"], lambda rates: [rate for _, rate in rates])
    for rank in runs[0]["by steps"]:
        assert rank["steps"] == len(rank["seen"]) == 60
        assert rank["last rate"] == [0]
        assert [epoch * 15 + step for epoch, step, _ in rank["validated"]] == [*range(7, 60, 7)]
        assert [log["step"] for log in rank["logs"] if "loss" in log] == [*range(5, 61, 5)]


def test_with_constant_steps_a_run_that_counts_steps_goes_on_exactly(runs):
    whole, rest = runs[0]["by steps"], runs[0]["rest by steps"]
    check_rest(whole, rest, 20)
    for mine, its in zip(whole, rest, strict=True):
        assert its["validated"] == mine["validated"][2:]
        assert (its["steps"], its["last rate"]) == (60, [0])


def test_what_the_trainer_counts_of_its_inputs_is_what_batches_of_changing_size_hold(runs):
    ranks = runs[0]["by steps"]
    samples = sum(len(step[2]) for rank in ranks for step in rank["seen"])
    assert ranks[0]["logs"][-1]["num_input_tokens_seen"] == 64 * samples  # of a picture that many pixels
    assert samples < EPOCHS * 1797


def test_a_checkpoint_holds_one_state_with_scores(runs):
    state = torch.load(runs[1] / "of-stopped" / "checkpoint-20" / "infobatch.pt", weights_only=True)
    assert sum(isinstance(value, torch.Tensor) for value in state.values()) == 2


def test_logged_losses_are_those_of_all_ranks(runs):
    ranks = runs[0]["whole"]
    done = 0
    for log in (log for log in ranks[0]["logs"] if "data_loss" in log):
        steps = [step for rank in ranks for step in rank["seen"][done : log["step"]]]
        done = log["step"]
        weight, losses = (torch.cat([step[k] for step in steps]) for k in (3, 4))
        assert log["loss"] == pytest.approx((weight * losses).mean().item(), abs=1e-3)
        assert log["data_loss"] == pytest.approx(((weight * losses).sum() / weight.sum()).item(), rel=1e-4)
        assert log["kept_loss"] == pytest.approx(losses[weight > 0].mean().item(), rel=1e-4)
    assert done == sum(steps_of(ranks[0])) // 5 * 5


def test_losses_under_mixed_precision_are_recorded_in_full_precision(runs):
    check_full_precision(runs[0]["bf16"])


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_do_not_go_with_the_loader_are_refused(runs, case):
    check_refused(runs[0][case], REFUSED[case][1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs the Trainer knows of all processes")
def test_a_trainer_that_takes_each_process_for_a_run_of_its_own_is_refused(runs):
    check_refused(runs[0]["alone"], "use_cpu=True")


def test_a_checkpoint_without_the_state_of_the_loader_is_refused(runs):
    check_refused(runs[0]["no state"], "has no infobatch.pt")


def test_batches_that_are_no_dicts_are_refused(runs):
    check_refused(runs[0]["tuples"], "collate_fn")


# ---- in this process


@one_process
def test_a_run_that_is_continued_without_a_checkpoint_trains_for_the_epochs_that_are_left(tmp_path):
    whole = fit(tmp_path, "whole", save_strategy="no")
    ends = sum(steps_of(whole)[:2])
    fit(tmp_path, "half", stop_at=ends, save_strategy="no")
    going_on = {"existing": "continue"}
    rest = fit(tmp_path, "half", loader_options=going_on, named_schedule="cosine", save_strategy="epoch")
    assert rest["validated"] == [(3, 0, pytest.approx(3)), (4, 0, pytest.approx(4))]
    assert [step[:2] for step in rest["seen"]] == [step[:2] for step in whole["seen"] if step[0] > 1]
    assert rest["rates"][-1] == (1, pytest.approx(0, abs=1e-3))
    assert rest["logs"][-1]["train_runtime"] > 0  # the Trainer's own end
    last = tmp_path / "of-half" / f"checkpoint-{rest['steps']}"
    assert (last / "infobatch.pt").exists()
    with pytest.raises(ConfigError, match=r"all 4 epochs of the loader are done.*existing='overwrite'"):
        fit(tmp_path, "half", loader_options=going_on)
    first = tmp_path / "of-half" / f"checkpoint-{steps_of(whole)[2]}"
    again = fit(tmp_path, "again", first, named_schedule="cosine", save_strategy="no")
    check_rest([rest], [again], steps_of(whole)[2])
    with (first / "infobatch.pt").open("r+b") as state:
        state.truncate(1000)
    with pytest.raises(ConfigError, match=r"infobatch.pt cannot be read.*Resume from another"):
        fit(tmp_path, "again", first)


def plain_trainer(loader, folder, epochs=EPOCHS, **options):
    from transformers import TrainingArguments

    from infobatch_stream.frameworks.transformers import InfoBatchTrainer

    sizes = {"num_train_epochs": epochs, "per_device_train_batch_size": BATCH}
    args = TrainingArguments(str(folder), **sizes, use_cpu=True, report_to=[], save_strategy="no")
    return InfoBatchTrainer(model_of(), args, loader=loader, **options)


@one_process
def test_a_second_training_after_one_that_was_stopped_begins_the_next_epoch(tmp_path):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == 20

    loader, seen = loader_at(tmp_path / "scores.zarr", Pictures())
    plain_trainer(loader, tmp_path, callbacks=[Stop()]).train()
    assert (loader.epoch, loader.step) == (0, 20)
    trainer = plain_trainer(loader, tmp_path)
    trainer.train()
    steps = steps_of({"seen": seen})
    assert steps[0] == 20
    assert sum(steps[1:]) == trainer.state.global_step
    assert loader.epoch == EPOCHS


@one_process
def test_samples_may_change_between_trainings_and_not_within_one(tmp_path):
    from transformers import TrainerCallback

    class Grow(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            loader.include = None

    few = range(3 * BATCH)
    loader, _ = loader_at(tmp_path / "scores.zarr", Pictures(), constant_steps=True, include=few)
    with pytest.raises(ConfigError, match=r"loader\.include was changed.*between two trainings"):
        plain_trainer(loader, tmp_path, callbacks=[Grow()]).train()
    loader, seen = loader_at(tmp_path / "stages.zarr", Pictures(), constant_steps=True, include=few)
    plain_trainer(loader, tmp_path).train()
    assert Counter(epoch for epoch, *_ in seen) == dict.fromkeys(range(EPOCHS), 3)
    loader.include, loader.epochs = None, EPOCHS + 2
    second = plain_trainer(loader, tmp_path, epochs=EPOCHS + 2)
    second.train()
    assert sum(epoch >= EPOCHS for epoch, *_ in seen) == second.state.global_step == 2 * loader.unpruned_steps > 6


@one_process
def test_trials_of_one_loader_are_refused(tmp_path):
    loader, _ = loader_at(tmp_path / "scores.zarr", Pictures())
    with pytest.raises(ConfigError, match="for each"):
        plain_trainer(loader, tmp_path).hyperparameter_search(n_trials=1)


@pytest.mark.parametrize(("ranks", "epochs", "samples"), [(1, 2, 96), pytest.param(2, 3, 600, marks=pytest.mark.slow)])
def test_the_example_goes_on_with_its_checkpoint(tmp_path, ranks, epochs, samples):
    from support.real_data import spam

    options = [spam(), "--epochs", epochs, "--samples", samples]
    accuracy = check_example("hf_trainer.py", tmp_path, ranks, options, stop_after=3 if samples < 500 else 8)
    assert accuracy > (0.7 if samples > 500 else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
