"""Accelerate over an InfoBatchLoader, in two processes with gloo. torchrun runs this file as them."""

import sys
from pathlib import Path

import pytest
import torch
from support.ddp.launch import process_group
from support.framework_runs import (
    check_example,
    check_full_precision,
    check_like_plain,
    check_refused,
    check_rest,
    check_whole,
    ended_with,
    loader_at,
    losses_of,
    network,
    optimizer_of,
    plain_run,
    ranks_of,
    report,
    steps_of,
)

pytestmark = pytest.mark.ddp

MOMENTS = {"within": (1, 5), "end": (1, None), "all": (3, None)}  # (epoch, step; None: its last) where a run goes on


# ---- in each of the processes


def fit(
    out, name, checkpoint=None, save_at=None, accumulate=1, mixed_precision="no", adapter=True, cpu=True, **options
):
    """What a run reports, with a store of its own."""
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.state import AcceleratorState, GradientState

    from infobatch_stream.frameworks.accelerate import AcceleratedLoader

    AcceleratorState._reset_state(True)  # it is one for the process, and another run may have other options
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=cpu,
        gradient_accumulation_steps=accumulate,
        mixed_precision=mixed_precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True),  # a schedule steps once for all processes
    )
    loader, seen = loader_at(out / f"{name}.zarr", **options)
    batches = AcceleratedLoader(loader, accelerator) if adapter else loader
    if not adapter:
        accelerator.register_for_checkpointing(loader)
    net = network()
    model, optimizer, schedule = accelerator.prepare(net, *optimizer_of(net.parameters(), loader, accumulate))
    if checkpoint:
        accelerator.load_state(checkpoint)
    rates, ends = [], []
    with loader:
        for _ in range(loader.epoch, loader.epochs):
            for data, picks in batches:
                with accelerator.accumulate(model):
                    loss = loader.update(losses_of(model, data), picks)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        rates.append(optimizer.param_groups[0]["lr"])
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                for moment, (epoch, step) in (save_at or {}).items():
                    if (loader.epoch, loader.step) == (epoch, step or len(loader)):
                        accelerator.save_state(out / moment)
            ends.append(accelerator.sync_gradients)
    steps = schedule.scheduler.last_epoch, len(rates)
    return report(loader, seen, net, rates=rates, ends=ends, steps=steps)


def main(out):
    with process_group() as (rank, _):
        found = {
            "plain": plain_run(out / "plain.zarr"),
            "whole": fit(out, "whole", save_at=MOMENTS),
            "plain accumulating": plain_run(out / "plain2.zarr", accumulate=2),
            "accumulating": fit(out, "accumulating", accumulate=2, save_at={"accumulated": (0, 4)}),
            "rest accumulating": fit(out, "rest", out / "accumulated", accumulate=2),
            "accumulating alone": fit(out, "alone", accumulate=2, adapter=False),
            "bf16": fit(out, "bf16", mixed_precision="bf16"),
            "saving between": ended_with(fit, out, "between", accumulate=2, save_at={"between": (0, 3)}),
        }
        constant = {"constant_steps": True}
        for kind, accumulate, adapter in (("", 1, False), (" accumulating", 2, True)):
            name = f"constant{kind}"
            found[f"plain {name}"] = plain_run(out / f"plain {name}.zarr", accumulate=accumulate, **constant)
            options = {"accumulate": accumulate, "adapter": adapter, **constant}
            found[name] = fit(out, name, save_at={f"{name} within": (1, 4)}, **options)
            found[f"rest {name}"] = fit(out, f"rest {name}", out / f"{name} within", **options)
        for moment in MOMENTS:
            found[moment] = fit(out, f"from-{moment}", out / moment)
        found["alone"] = ended_with(fit, out, "alone2", cpu=False)  # and without GPUs
        torch.save(found, out / f"{rank}.pt")


# ---- what they found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("accelerate")
    return ranks_of(__file__, out), out


@pytest.mark.parametrize("case", ["whole", "accumulating", "bf16"])
def test_every_planned_step_is_made_and_every_kept_sample_occurs_once(runs, case):
    check_whole(runs[0][case])


@pytest.mark.parametrize("kind", ["", " accumulating"])
def test_picks_scores_weights_and_learning_rates_are_those_of_a_plain_loop(runs, kind):
    check_like_plain(runs[0][kind.strip() or "whole"], runs[0][f"plain{kind}"])


@pytest.mark.parametrize("kind", ["", " accumulating"])
def test_with_constant_steps_a_schedule_of_total_steps_and_the_loader_itself_do(runs, kind):
    """Without the adapter, that is; where gradients are accumulated it tells of the last batch of an epoch."""
    whole = runs[0][f"constant{kind}"]
    check_whole(whole, constant_steps=True)
    check_like_plain(whole, runs[0][f"plain constant{kind}"])
    for rank in whole:
        assert rank["steps"] == (32, 32) if kind else (60, 60)  # made by the schedule, made by the optimizer
    check_rest(whole, runs[0][f"rest constant{kind}"], 15 + 4)


def test_gradients_left_at_the_end_of_an_epoch_are_stepped_by_the_adapter(runs):
    for mine, alone in zip(runs[0]["accumulating"], runs[0]["accumulating alone"], strict=True):
        assert all(mine["ends"])
        assert not all(alone["ends"])  # the reason for it


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_resumed_run_is_the_rest_of_the_one_that_was_not_stopped(runs, moment):
    whole = runs[0]["whole"]
    steps = steps_of(whole[0])
    epoch, step = MOMENTS[moment]
    check_rest(whole, runs[0][moment], sum(steps[:epoch]) + (step or steps[epoch]))


def test_a_resumed_run_steps_at_the_last_batch_of_the_epoch_too(runs):
    assert steps_of(runs[0]["accumulating"][0])[0] % 2 == 1
    check_rest(runs[0]["accumulating"], runs[0]["rest accumulating"], 4)


def test_a_checkpoint_holds_one_state_with_scores(runs):
    (file,) = (runs[1] / "within").glob("custom_checkpoint_*.pkl")
    state = torch.load(file, weights_only=True)
    assert sum(isinstance(value, torch.Tensor) for value in state.values()) == 2


def test_saving_while_gradients_are_accumulated_is_refused(runs):
    check_refused(runs[0]["saving between"], "sync_gradients")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs the Accelerator knows of all processes")
def test_an_accelerator_that_takes_each_process_for_a_run_of_its_own_is_refused(runs):
    check_refused(runs[0]["alone"], "Accelerator(cpu=True)")


def test_losses_under_mixed_precision_are_recorded_in_full_precision(runs):
    check_full_precision(runs[0]["bf16"])


@pytest.mark.parametrize(("ranks", "epochs"), [(1, 2), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_the_example_goes_on_with_its_checkpoint(tmp_path, ranks, epochs):
    accuracy = check_example("accelerate_ddp.py", tmp_path, ranks, ["--epochs", epochs], stop_after=20)
    assert accuracy > (0.85 if epochs > 2 else 0.5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
