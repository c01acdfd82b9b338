"""FSDP2, tensor parallelism and distributed checkpoints, in four processes with gloo: torchrun runs this file."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.ddp.launch import process_group, torchrun
from support.framework_runs import (
    BATCH,
    EPOCHS,
    LR,
    check_equal,
    check_example,
    check_refused,
    check_whole,
    digits,
    ended_with,
    loader_at,
    losses_of,
    network,
    report,
    shape,
    steps_of,
)
from support.paths import ROOT
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from infobatch_stream import InfoBatchLoader

pytestmark = [pytest.mark.ddp, pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")]

SAVED_AT = (1, 4)  # epoch and how many of its steps were made; epoch 1 is pruned
FIRST_SCORES = np.linspace(0.1, 5, 1797, dtype=np.float32)


class Model:
    """Model and optimizer, as torch's tutorial of DCP has them."""

    def __init__(self, net, optimizer):
        self.parts = net, optimizer

    def state_dict(self):
        net, optimizer = get_state_dict(*self.parts)
        return {"net": net, "optimizer": optimizer}

    def load_state_dict(self, state):
        set_state_dict(*self.parts, model_state_dict=state["net"], optim_state_dict=state["optimizer"])


# ---- in each of the processes


def sharded(mesh):
    """A network over ``mesh``: parameters sharded over dp, layers split over tp if there is such a dimension."""
    net = network()
    if "tp" in mesh.mesh_dim_names:
        parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        return fully_shard(net, mesh=mesh["dp"])
    return fully_shard(net, mesh=mesh)


def train(mesh, store, *, save=None, wait=None, resume=None, **options):
    """A run over ``mesh``, saved on the way to ``save``, or gone on with from ``resume``."""
    loader, seen = loader_at(store, process_group=mesh["dp"] if mesh.ndim > 1 else mesh, **options)
    net = sharded(mesh)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)
    parts = {"model": Model(net, optimizer), "loader": loader}
    if resume:
        dcp.load(parts, checkpoint_id=resume)
    rates, saving = [], None
    for _ in range(loader.epoch, EPOCHS):
        for data, picks in loader:
            optimizer.param_groups[0]["lr"] = LR * shape(loader.progress)
            loader.update(losses_of(net, data), picks).backward()
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            optimizer.zero_grad()
            if save and (loader.epoch, loader.step) == SAVED_AT:
                saving = (dcp.save if wait is None else dcp.async_save)(parts, checkpoint_id=save)
    if wait is not None:
        saving.result()
    loader.commit()
    found = report(loader, seen, net, rates=rates)
    return found | {"weights": [part.full_tensor() if isinstance(part, DTensor) else part for part in found["weights"]]}


def masked(out, mesh, name, **options):
    """The picks of a run that began with scores, and of which other samples were included later."""
    loader, seen = loader_at(out / f"{name}.zarr", process_group=mesh, **options)
    if options:
        first = iter(loader)
        for _ in range(3):
            (x, _), picks = next(first)
            loader.update(x.sum(1), picks)
        loader.include = np.arange(0, 1797, 2)
        dcp.save({"loader": loader}, checkpoint_id=out / "masked")
        seen.clear()
        rest = first
    else:
        dcp.load({"loader": loader}, checkpoint_id=out / "masked")
        rest = iter(loader)
    for _ in range(2):
        for (x, _), picks in rest:
            loader.update(x.sum(1), picks)
        rest = iter(loader)
    return report(loader, seen, network()) | {"stats": loader.stats}


def main(out):
    with process_group(60) as (rank, _):
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        flat = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
        hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        found = {
            "fsdp": train(flat, out / "fsdp.zarr", save=out / "fsdp"),
            "rest fsdp": train(flat, out / "fsdp2.zarr", resume=out / "fsdp"),
            "tp": train(both, out / "tp.zarr", save=out / "tp", wait=True),
            "rest tp": train(both, out / "tp2.zarr", resume=out / "tp"),
            "constant": train(both, out / "constant.zarr", save=out / "constant", constant_steps=True),
            "rest constant": train(both, out / "constant2.zarr", resume=out / "constant", constant_steps=True),
            "masked": masked(out, flat, "masked", initial_scores=FIRST_SCORES),
            "rest masked": masked(out, flat, "rest masked"),
            "hybrid": ended_with(lambda: iter(loader_at(out / "hybrid.zarr", process_group=hybrid)[0])),
        }
        hybrid["replicate", "shard"]._flatten("dp")
        found["flattened"] = [index.tolist() for _, _, index, *_ in few(out, "flattened", hybrid["dp"])]
        found["all"] = [index.tolist() for _, _, index, *_ in few(out, "all", None)]
        torch.save(found, out / f"{rank}.pt")


def few(out, name, group):
    loader, seen = loader_at(out / f"{name}.zarr", process_group=group)
    for (x, _), picks in loader:
        loader.update(x.sum(1), picks)
        if loader.step == 3:
            return seen
    raise AssertionError


# ---- what they found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("fsdp")
    torchrun(__file__, out, processes=4, seconds=240)
    found = [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(4)]
    return {case: [rank[case] for rank in found] for case in found[0]}, out


def dp_ranks(ranks):
    """One of each pair of peers, of the mesh of 2 times 2."""
    return [ranks[0], ranks[2]]


@pytest.mark.parametrize(("case", "one_each"), [("fsdp", list), ("tp", dp_ranks), ("constant", dp_ranks)])
def test_every_kept_sample_is_trained_on_once_by_the_ranks_over_which_data_is_split(runs, case, one_each):
    check_whole(one_each(runs[0][case]), constant_steps=case == "constant")


@pytest.mark.parametrize("case", ["tp", "constant"])
def test_peers_of_a_mesh_get_equal_batches(runs, case):
    for one, other in ((0, 1), (2, 3)):
        check_equal(runs[0][case][one], runs[0][case][other])


@pytest.mark.parametrize("case", ["fsdp", "tp", "constant"])
def test_a_run_from_a_distributed_checkpoint_is_the_rest_of_the_one_that_was_not_stopped(runs, case):
    """That of "tp" was saved asynchronously, while the run went on."""
    for whole, rest in zip(runs[0][case], runs[0][f"rest {case}"], strict=True):
        done = steps_of(whole)[0] + SAVED_AT[1]
        assert len(rest["seen"]) == len(whole["seen"]) - done > 0
        check_equal(whole, rest, skip=done)
        assert whole["rates"][done:] == rest["rates"]


def test_masks_and_first_scores_come_from_a_distributed_checkpoint_though_the_new_loader_has_none(runs):
    for whole, rest in zip(runs[0]["masked"], runs[0]["rest masked"], strict=True):
        check_equal(whole, rest)
        assert whole["stats"] == rest["stats"]
        assert {epoch for epoch, *_ in rest["seen"]} == {0, 1}


def test_a_distributed_checkpoint_goes_on_in_one_process_with_the_same_global_batch(runs, tmp_path):
    loader = InfoBatchLoader(digits(), tmp_path / "one.zarr", batch_size=2 * BATCH, epochs=EPOCHS, delta=0.75)
    dcp.load({"loader": loader}, checkpoint_id=runs[1] / "tp")
    assert (loader.epoch, loader.step) == SAVED_AT
    ranks = dp_ranks(runs[0]["tp"])
    first = steps_of(ranks[0])[0] + SAVED_AT[1]
    for number, (_, picks) in zip(range(first, first + 3), loader, strict=False):
        assert picks.index.sort().values.equal(torch.cat([rank["seen"][number][2] for rank in ranks]).sort().values)


def test_a_mesh_of_two_dimensions_is_refused_and_goes_flattened(runs):
    check_refused(runs[0]["hybrid"], '_flatten("dp")')
    assert runs[0]["flattened"] == runs[0]["all"]


def test_a_loader_is_what_the_distributed_checkpoint_calls_stateful(tmp_path):
    loader = InfoBatchLoader(digits(), tmp_path / "scores.zarr", batch_size=BATCH, epochs=EPOCHS)
    assert isinstance(loader, Stateful)


def test_the_page_runs_as_a_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "trainers" / "fsdp.md").read_text(), re.M | re.S)
    script = tmp_path / "page.py"
    script.write_text("".join([*blocks, "dist.destroy_process_group()\n"]))
    torchrun(script)


def test_the_example_goes_on_with_its_checkpoint(tmp_path):
    accuracy = check_example("fsdp.py", tmp_path, 2, ["--epochs", 4], stop_after=20)
    assert accuracy > 0.8


if __name__ == "__main__":
    main(Path(sys.argv[1]))
