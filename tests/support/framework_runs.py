"""What the tests of the framework adapters share: digits, a small model, a plain loop, and what must hold of a run."""

import math
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from infobatch_stream import InfoBatchLoader
from support.ddp.launch import environment, torchrun
from support.paths import ROOT

one_process = pytest.mark.filterwarnings("ignore")  # frameworks warn of what is well here

EPOCHS, BATCH, LR = 4, 64, 0.2  # of the epochs 1 and 2 are pruned; batch per rank


def digits():
    """1,797 pictures float32[64] with their classes."""
    found = load_digits()
    return TensorDataset(torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target))


def loader_at(store, dataset=None, **options):
    """A loader of digits, and the list of what each update of this rank was given."""
    options = {"batch_size": BATCH, "epochs": EPOCHS, "delta": 0.75, **options}
    loader = InfoBatchLoader(dataset or digits(), store, **options)
    seen, update = [], loader.update

    def recorded(losses, picks, **score):
        place = loader.epoch, picks._origin.step
        seen.append((*place, picks.index.clone(), picks.weight.cpu().clone(), losses.detach().clone()))
        return update(losses, picks, **score)

    loader.update = recorded
    return loader, seen


def validation():
    return DataLoader(digits(), batch_size=512)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def shape(progress):
    """Factor of the learning rate at ``progress``."""
    return 0.1 + 0.9 * math.cos(math.pi / 2 * progress)


def optimizer_of(parameters, loader, accumulate=1):
    """And its schedule: along the progress of the loader; with constant steps one of torch's own, by steps."""
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=0.9)
    if not loader.constant_steps:
        return optimizer, LambdaLR(optimizer, lambda _: shape(loader.progress))
    steps = loader.total_steps if accumulate == 1 else loader.epochs * math.ceil(loader.unpruned_steps / accumulate)
    return optimizer, OneCycleLR(optimizer, max_lr=LR, total_steps=steps)


def report(loader, seen, model, **more):
    """What a test looks at."""
    weights = [weight.detach().clone() for weight in model.parameters()]
    scores = torch.tensor(loader.store.scores)
    return {"seen": seen, "scores": scores, "weights": weights, "epoch": loader.epoch, **more}


def losses_of(net, data):
    x, y = data
    return F.cross_entropy(net(x), y, reduction="none")


def plain_run(
    store, accumulate=1, by_number=False, model=None, losses_of=losses_of, optimizer_of=optimizer_of, **options
):
    """The loop of the README under DDP; without DDP in a single process.

    accumulate: steps whose gradients are averaged; the last ones of an epoch are divided by their number if
    ``by_number``, else as if there were as many as ever.
    """
    loader, seen = loader_at(store, **options)
    model = model or network()
    distributed = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    net = nn.parallel.DistributedDataParallel(model) if distributed else model
    optimizer, schedule = optimizer_of(model.parameters(), loader, accumulate)
    rates = []
    for _ in range(loader.epochs):
        batches = iter(loader)
        steps = len(loader)
        for step, (data, picks) in enumerate(batches):
            here = min(accumulate, steps - step // accumulate * accumulate) if by_number else accumulate
            steps_now = (step + 1) % accumulate == 0 or step + 1 == steps
            with net.no_sync() if distributed and not steps_now else nullcontext():
                loss = loader.update(losses_of(net, data), picks)
                (loss / here).backward()
            if steps_now:
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    loader.commit()
    return report(loader, seen, model, rates=rates)


# ---- what must hold; ``ranks`` is what the ranks of a run reported


def check_whole(ranks, *, constant_steps=False):
    """Every planned step was made, and every kept sample occurs once; epochs are of changing length, or batches are."""
    lengths = []
    for epoch in range(EPOCHS):
        steps = [[step for step in rank["seen"] if step[0] == epoch] for rank in ranks]
        assert len({len(mine) for mine in steps}) == 1
        assert [step[1] for step in steps[0]] == list(range(len(steps[0])))
        index = torch.cat([step[2][step[3] > 0] for mine in steps for step in mine])
        assert index.unique().numel() == index.numel()
        entries = 1797 if constant_steps else index.numel()
        assert len(steps[0]) == math.ceil(entries / (BATCH * len(ranks)))
        assert (index.numel() == 1797) == (epoch in {0, EPOCHS - 1})
        lengths.append(len(steps[0]))
        if constant_steps:
            sizes = {len(step[2]) for mine in steps for step in mine}
            assert max(sizes) - min(sizes) == 1
            assert index.numel() == sum(len(step[2]) for mine in steps for step in mine)
    assert lengths[1] == lengths[0] if constant_steps else lengths[1] < lengths[0]
    assert lengths[0] == lengths[-1]
    assert ranks[0]["epoch"] == EPOCHS


def steps_of(run):
    """How many steps each epoch has."""
    return [sum(step[0] == epoch for step in run["seen"]) for epoch in range(EPOCHS)]


def check_rest(whole, rest, done):
    """On all ranks ``rest`` is what is left of ``whole`` after ``done`` steps, learning rates included."""
    for all_of_it, part in zip(whole, rest, strict=True):
        assert len(part["seen"]) == len(all_of_it["seen"]) - done
        check_equal(all_of_it, part, skip=done)
        assert part["rates"] == all_of_it["rates"][len(all_of_it["rates"]) - len(part["rates"]) :]
        assert part["epoch"] == EPOCHS


def check_equal(one, other, skip=0):
    """Two runs made the same steps, of which ``other`` left out the first ``skip``; with equal scores and weights."""
    for mine, its in zip(one["seen"][skip:], other["seen"], strict=True):
        assert mine[:2] == its[:2]
        assert torch.equal(mine[2], its[2])
        assert torch.equal(mine[3], its[3])
    assert torch.equal(one["scores"], other["scores"])
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], other["weights"], strict=True))


def check_like_plain(mine, plain, rates_of=list):
    """On all ranks ``mine`` is what the plain loop did, learning rates included."""
    for rank, its in zip(mine, plain, strict=True):
        check_equal(its, rank)
        assert rates_of(rank["rates"]) == its["rates"]


def check_full_precision(ranks):
    """Losses under mixed precision were recorded in full precision."""
    for rank in ranks:
        assert {step[4].dtype for step in rank["seen"]} == {torch.float32}
        assert rank["scores"].unique().numel() > rank["scores"].bfloat16().unique().numel()


def check_refused(ranks, says):
    """On all ranks the case ended with a ConfigError that says so."""
    for error, text in ranks:
        assert error == "ConfigError"
        assert says in text


def check_example(script, cwd, ranks, options, stop_after):
    """An example that is stopped goes on with its checkpoint; -> its accuracy in the end."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*run, ROOT / "examples" / script, *map(str, options)]
    for more in (["--stop-after", str(stop_after)], []):
        done = subprocess.run([*command, *more], cwd=cwd, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "goes on at step" in done.stdout
    return float(done.stdout.split("accuracy ")[-1].split()[0])


# ---- between the processes and the test


def ended_with(call, *args, **kwargs):
    """Name and text of the error of a call."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def ranks_of(file, out):
    """By case, what each of two ranks that ran ``file`` saved in ``out``."""
    torchrun(file, out, seconds=240)
    found = [torch.load(file, weights_only=False) for file in sorted(out.glob("[0-9].pt"))]
    return {case: [rank[case] for rank in found] for case in found[0]}
