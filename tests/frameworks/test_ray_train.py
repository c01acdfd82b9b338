"""Ray Train over an InfoBatchLoader: two workers with gloo, on two nodes of a Ray cluster that is all on this machine.

`ran` runs this file as the driver, once for all tests.
"""

import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from support.ddp.launch import environment
from support.framework_runs import (
    check_equal,
    check_whole,
    ended_with,
    loader_at,
    losses_of,
    network,
    optimizer_of,
    plain_run,
    report,
)
from support.paths import ROOT

pytestmark = pytest.mark.ddp

PAGE = "docs/trainers/ray.md"
MODES = {"published": {}, "constant": {"constant_steps": True}}
EARLY, SAVED, LATE = (1, 2), (1, 3), (1, 5)  # (epoch, step): a kill without a checkpoint; a checkpoint; another kill
SECONDS = 900  # half a minute on an idle machine
ADDRESSES = "127.0.0.2", "127.0.0.3"  # of the nodes: Ray tells them apart by that
OPTIONS = {  # of Ray: quiet, on loopback, and patient where other work runs beside it
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # between looks at the workers
    "RAY_worker_register_timeout_seconds": "300",
    "GLOO_SOCKET_IFNAME": "lo",
}


# ---- in each of the workers


def steps_of(out, mode, parts):
    """The README's loop, a step at a time; ``parts`` is what it made, and then found."""
    from ray.train.torch import prepare_model

    parts["loader"], parts["seen"] = loader_at(out / f"{mode}-{{node}}.zarr", existing="overwrite", **MODES[mode])
    loader, parts["rates"] = parts["loader"], []
    net = parts["net"] = network()
    model = prepare_model(net)
    parts["optimizer"], parts["schedule"] = optimizer_of(net.parameters(), loader)
    yield
    for _ in range(loader.epoch, loader.epochs):
        for data, picks in loader:
            loader.update(losses_of(model, data), picks).backward()
            parts["rates"].append(parts["optimizer"].param_groups[0]["lr"])
            parts["optimizer"].step()
            parts["optimizer"].zero_grad()
            parts["schedule"].step()
            yield
    loader.commit()
    parts["found"] = report(loader, parts["seen"], net, rates=parts["rates"])


def work(config):
    """Both modes, step by step beside each other, so that one kill strikes both; then the plain loop of each."""
    import ray.train
    from ray.train import Checkpoint
    from ray.train.torch import prepare_data_loader

    out, rank = Path(config["out"]), ray.train.get_context().get_world_rank()
    tries = len(list(out.glob(f"try-*-{rank}.pt")))
    stateful = "net", "optimizer", "schedule", "loader"
    runs = {mode: {} for mode in MODES}
    loops = [steps_of(out, mode, parts) for mode, parts in runs.items()]
    for loop in loops:
        next(loop)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            states = torch.load(Path(folder, "state.pt"), weights_only=True)
        for mode, parts in runs.items():
            for part in stateful:
                parts[part].load_state_dict(states[mode][part])
    for _ in zip_longest(*loops):
        torch.save({mode: parts["seen"] for mode, parts in runs.items()}, out / f"try-{tries}-{rank}.pt")
        at = runs["published"]["loader"].epoch, runs["published"]["loader"].step
        if tries == 1 and at == SAVED:
            states = {mode: {part: parts[part].state_dict() for part in stateful} for mode, parts in runs.items()}
            with tempfile.TemporaryDirectory() as folder:
                if rank == 0:
                    torch.save(states, Path(folder, "state.pt"))
                ray.train.report({}, checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None)
        if rank == 1 and (tries, at) in {(0, EARLY), (1, LATE)}:
            if tries:
                ray.train.get_all_reported_checkpoints()  # until Ray has taken note of it
            os.kill(os.getpid(), signal.SIGKILL)
    found = {mode: parts["found"] for mode, parts in runs.items()}
    found["prepared"] = ended_with(prepare_data_loader, runs["published"]["loader"])
    found["nodes"] = runs["published"]["loader"]._run.ranks.nodes
    for mode, options in MODES.items():
        found[f"plain {mode}"] = plain_run(out / f"plain-{mode}-{{node}}.zarr", **options)
    torch.save(found, out / f"{rank}.pt")


# ---- the driver


def drive(out):
    """Have all cases run on one cluster."""
    import ray
    from ray.cluster_utils import Cluster
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    small = {"object_store_memory": 100 << 20}
    head = {**small, "num_cpus": 2, "include_dashboard": False, "node_ip_address": ADDRESSES[0]}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1, node_ip_address=ADDRESSES[1], **small)
        ray.init(address=cluster.address, _node_ip_address=ADDRESSES[0])
        TorchTrainer(
            work,
            train_loop_config={"out": str(out)},
            scaling_config=ScalingConfig(num_workers=2, placement_strategy="STRICT_SPREAD"),
            run_config=RunConfig(
                name="killed", storage_path=str(out / "runs"), failure_config=FailureConfig(max_failures=2)
            ),
        ).fit()
        os.environ["RAY_ADDRESS"] = cluster.address  # the rest uses this cluster, and does not start its own
        for name, run in (("page", run_page), ("example", run_example)):
            (out / name).mkdir()
            os.chdir(out / name)
            try:
                run()
            except Exception:
                (out / name / "error").write_text(traceback.format_exc())
    finally:
        ray.shutdown()
        cluster.shutdown()


def blocks():
    return re.findall(r"^```python\n(.*?)^```", (ROOT / PAGE).read_text(), re.M | re.S)


def run_page():
    names = {}
    for number, block in enumerate(blocks()):
        exec(compile(block, f"block {number} of ray.md", "exec"), names)
    assert names["result"].metrics["epoch"] == 4


def run_example():
    for epochs in ("3", "4"):  # of the second run there is one epoch left
        sys.argv = ["ray_train.py", "--epochs", epochs, "--kill-after", "35"]
        runpy.run_path(str(ROOT / "examples" / "ray_train.py"), run_name="__main__")


# ---- what they found


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(the folder of all that was found, what was printed)."""
    for _ in range(3):
        out = tmp_path_factory.mktemp("ray")
        with (out / "log").open("wb") as log:
            command = [sys.executable, __file__, out]
            driver = subprocess.Popen(command, env=environment() | OPTIONS, stdout=log, stderr=log)
            try:
                code = driver.wait(SECONDS)
            except subprocess.TimeoutExpired:
                driver.send_signal(signal.SIGINT)  # so that it ends the cluster
                code = driver.wait(60)
        text = (out / "log").read_text()
        if code == 0 or "timed out during startup" not in text:  # Ray gives each node 30 s, and no option
            break
    assert code == 0, text
    return out, text


@pytest.fixture(scope="module")
def found(ran):
    """What each rank found."""
    return [torch.load(ran[0] / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def tried(out, number, rank, mode):
    return torch.load(out / f"try-{number}-{rank}.pt", weights_only=False)[mode]


def check_begins(whole, part):
    """The steps of ``part`` are the first of ``whole``: same picks, weights and losses."""
    for mine, its in zip(part, whole, strict=False):
        assert mine[:2] == its[:2]
        assert all(torch.equal(one, other) for one, other in zip(mine[2:], its[2:], strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_after_a_worker_was_killed_in_mid_epoch_picks_weights_and_scores_are_those_of_an_undisturbed_run(
    ran, found, mode
):
    """Index and weight of every pick, learning rates, and the weights of the model bit for bit."""
    check_whole([rank[f"plain {mode}"] for rank in found], **MODES[mode])
    for rank in (0, 1):
        plain, rest = found[rank][f"plain {mode}"], found[rank][mode]
        before = tried(ran[0], 1, rank, mode)
        done = len(plain["seen"]) - len(rest["seen"])
        assert rest["seen"][0][:2] == plain["seen"][done][:2] == (SAVED if mode == "published" else before[done][:2])
        assert 0 < done < len(before)  # what was done after the checkpoint is done again
        check_begins(plain["seen"], before)
        check_equal(plain, rest, skip=done)
        assert rest["rates"] == plain["rates"][done:]


@pytest.mark.parametrize("mode", MODES)
def test_after_a_kill_before_the_first_checkpoint_the_run_begins_anew_whatever_was_committed(ran, found, mode):
    for rank in (0, 1):
        first, again = (tried(ran[0], number, rank, mode) for number in (0, 1))
        assert first[-1][0] == 1  # an epoch was committed
        assert len(first) < len(again)
        check_begins(again, first)


def test_node_in_a_path_is_the_number_that_ray_gives_to_a_node_and_their_stores_are_equal(ran, found):
    assert [rank["nodes"] for rank in found] == [2, 2]
    for mode in MODES:
        places = sorted(ran[0].glob(f"{mode}-*.zarr"))
        assert [place.name for place in places] == [f"{mode}-0.zarr", f"{mode}-1.zarr"]
        parts = [{file.relative_to(place): file.read_bytes() for file in place.glob("scores/c/*")} for place in places]
        assert parts[0] == parts[1] != {}


def test_rays_own_preparation_of_loaders_is_refused(found):
    assert found[0]["prepared"][0] == "AttributeError"


def test_every_example_of_the_page_runs(ran):
    assert blocks()
    error = ran[0] / "page" / "error"
    assert not error.exists(), error.read_text() + ran[1]


def test_the_example_goes_on_with_its_checkpoint_after_a_kill_and_when_it_is_started_again(ran):
    error = ran[0] / "example" / "error"
    assert not error.exists(), error.read_text() + ran[1]
    assert "goes on at step 10 of epoch 1" in ran[1]
    assert "goes on at step 0 of epoch 3" in ran[1]
    assert float(ran[1].split("accuracy ")[-1].split()[0]) > 0.5


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
