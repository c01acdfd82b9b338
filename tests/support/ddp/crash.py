"""Kill runs again and again, and hold what they leave, and how they go on, against runs that were never killed.

    crash.py [--kills 200 | --rounds 1] [--label LABEL] [--extra 4] [--seed 0] [--only EXPERIMENT] [--share 0/2]
             [--report FILE]

An experiment is a run that is killed (kill -9) a few times and goes on, from its last checkpoint or with
existing="continue", until it is through. It depends on the seed and its number alone, but for the moments at which
the system lets processes run. After each kill every store must be whole, of the epoch that was trained or the next,
and hold the losses that were recorded; what follows must be, on every rank, the steps of a run that was never killed.
"""

import argparse
import collections
import gc
import json
import os
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from infobatch_stream import InfoBatchLoader
from support.ddp.crash_checks import Found, Reference, check_history, check_steps, look
from support.ddp.data import Noisy, loss_of, wds, write_wds
from support.ddp.forked import Launch, asked
from support.ddp.kill_plans import EPOCHS, Kill, N, plans
from support.ddp.kill_points import POINTS, small_blocks

GLOBAL_BATCH, SAVE_EVERY = 8, 3
ORPHANS = 20  # seconds in which the workers of a killed rank must end; torch lets them look every 5


# ---- what a rank does


def train(rank, run, part, opens, kill=None):
    small_blocks()
    if kill and kill.what in POINTS and rank == kill.whom:
        POINTS[kill.what].install(_striking(run, kill))
    options = {"num_workers": run.workers, "persistent_workers": run.persistent} if run.workers else {}
    loader = InfoBatchLoader(
        Noisy(N) if run.kind == "map" else wds(run.shards),
        run.stores[rank // run.local],
        batch_size=GLOBAL_BATCH // run.world,
        epochs=EPOCHS,
        seed=5,
        canonical_nodes=2,
        shuffle_window=16,
        existing="error" if opens == "checkpoint" else "continue",
        history=True,
        **options,
    )
    if opens == "checkpoint":
        loader.load_state_dict(torch.load(run.checkpoint, weights_only=True))
    log = os.open(run.folder / f"part{part}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with loader:
        for epoch in range(loader.epoch, loader.epochs):
            for (_, noise), picks in loader:
                found = [epoch, loader.step, picks.index.tolist(), picks.weight.tolist(), noise.tolist()]
                os.write(log, json.dumps(found).encode() + b"\n")
                loader.update(loss_of(picks.index, epoch), picks)
                if loader.step % SAVE_EVERY == 0:
                    save(loader, rank, run.checkpoint)


def save(loader, rank, checkpoint):
    state = loader.state_dict()
    if rank == 0:
        temporary = checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.rename(checkpoint)


def _striking(run, kill):
    left = kill.nth

    def strike():
        nonlocal left
        if left == 0:
            (run.folder / "struck").touch()
            if kill.everyone:
                os.killpg(0, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    return strike


# ---- experiments


@dataclass
class Tally:
    kills: collections.Counter = field(default_factory=collections.Counter)
    errors: collections.Counter = field(default_factory=collections.Counter)  # with which survivors ended
    parts: int = 0
    through: int = 0  # a worker was killed and the run went on


def experiment(run, references, seconds, tally, *, most):
    """Carry out ``run`` with up to ``most`` of its kills; should it be through before them, begin it anew."""
    kills = list(run.kills[:most])
    for _ in range(2 * len(kills)):
        shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir()
        if kills[0].what in POINTS and POINTS[kills[0].what].aside:  # which needs stores, and a checkpoint
            kills.insert(0, Kill("reset: on the disk", 0, nth=1, layout=(run.nodes, run.local)))
        _until_through(run, references, seconds, tally, kills)
        if not kills:
            return
    raise AssertionError(f"the run never came to {kills[0]}")


def _until_through(whole, references, seconds, tally, kills):
    """One run. What was carried out of ``kills`` is taken from them."""
    found, launches, codes = Found([None, None], None), [], [1]
    while any(codes):
        kill, part = kills[0] if kills else None, len(launches)
        nodes, local = kill.layout if kill else (whole.nodes, whole.local)
        run = replace(whole, nodes=nodes, local=local)
        reference = references(run)
        opens = kill.opens if kill else run.opens
        if not found.checkpoint:
            opens = "continue"
        if kill and kill.lost:
            shutil.rmtree(run.stores[1], ignore_errors=True)
            found.epochs[1] = None
        known = [epoch for epoch in found.epochs[:nodes] if epoch is not None]
        start = found.checkpoint if opens == "checkpoint" else (max(known, default=0), 0)
        launch = Launch(run.folder, f"part{part}", run.world, train, run, part, opens, kill, local=local)
        launches.append(launch)
        launch.wait_until_begun()
        begin = time.monotonic()
        killed = kill is not None and _carry_out(kill, launch, run, seconds)
        codes = launch.wait()
        tally.parts += 1
        if killed:
            tally.kills[kill.what + (" (all)" if kill.everyone else "")] += 1
            tally.through += kill.what == "worker" and not any(codes)
            tally.errors.update(_last_words(launch, codes))
        else:
            assert not any(codes), f"a run that was not killed failed: {launch.said()}"
            seconds[run.world, run.workers] = time.monotonic() - begin
        if killed or (kill and kill.what not in POINTS):  # a random moment may be too late
            kills.pop(0)
        check_steps(run, reference, part, start, whole=not any(codes))
        found = asked(look, run, reference, part, found)
    alone = whole.nodes == 1 and all(kill.layout[0] == 1 for kill in whole.kills)
    _check_end(run, reference, found, launches, alone=alone)


def _carry_out(kill, launch, run, seconds):
    """Whether somebody was killed."""
    if kill.what in POINTS:
        launch.wait_until_ended()
        struck = run.folder / "struck"
        with suppress(FileNotFoundError):
            struck.unlink()
            return True
        return False
    time.sleep(kill.moment * seconds.get((run.world, run.workers), 1.0))
    if kill.what == "worker":
        while launch.ranks[kill.whom].is_alive():
            if workers := launch.workers(kill.whom):
                with suppress(ProcessLookupError):
                    os.kill(workers[0], signal.SIGKILL)
                    return True
            time.sleep(0.001)
        return False
    if not all(process.is_alive() for process in launch.ranks):
        return False
    if kill.what == "all":
        launch.kill_all()
    else:
        os.kill(launch.ranks[kill.whom].pid, signal.SIGKILL)
    return True


def _last_words(launch, codes):
    """How those that were not killed ended: with an error, or through."""
    for rank, code in enumerate(codes):
        if code == -signal.SIGKILL:
            continue
        assert code in (0, 1), f"rank {rank} ended by {code}: {launch.said()}"
        text = Path(launch._folder, f"{launch._name}-{rank}.err").read_text()
        lines = [line for line in text.splitlines() if line and not line.startswith((" ", "[")) and ":" in line]
        named = [line.partition(":")[0].rpartition(".")[2] for line in lines if "Error" in line.partition(":")[0]]
        assert code == 0 or named, f"rank {rank} ended without an error: {text}"
        yield named[-1] if code else "through"


def _check_end(run, reference, found, launches, *, alone):
    for path in run.stores[: run.nodes]:
        check_history(path, reference, whole=alone)
    assert found.epochs[: run.nodes] == [EPOCHS] * run.nodes, found
    allowed = {"checkpoint.pt", "checkpoint.tmp", "scores-0.zarr", "scores-1.zarr"}
    gone = ("part", ".scores-1") if run.nodes == 1 else ("part",)  # of a node that is none of the run's any more
    left = [
        entry.name for entry in run.folder.iterdir() if entry.name not in allowed and not entry.name.startswith(gone)
    ]
    assert not left, f"left behind: {left}"
    end = time.monotonic() + ORPHANS
    while orphans := [pid for launch in launches for pid in launch.left()]:
        assert time.monotonic() < end, f"processes are left: {orphans}"
        time.sleep(0.05)


def _reference(folder, known, seconds, run):
    """The run that was never killed: of one kind and layout it is made once."""
    key = run.kind, run.nodes, run.local
    if key not in known:
        plain = replace(run, folder=folder / "-".join(map(str, key)), workers=0, persistent=False, kills=())
        plain.folder.mkdir()
        launch = Launch(plain.folder, "part0", run.world, train, plain, 0, "continue", local=run.local)
        launch.wait_until_begun()
        begin = time.monotonic()
        assert not any(launch.wait()), launch.said()
        seconds.setdefault((run.world, 0), time.monotonic() - begin)
        known[key] = Reference(plain)
    return known[key]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10**6)
    parser.add_argument("--rounds", type=int, default=10**6, help="in each of which every label has its turn")
    parser.add_argument("--label", action="append", help="kill only there; may be repeated")
    parser.add_argument("--extra", type=int, default=4, help="most kills at random moments in an experiment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of the experiment")
    parser.add_argument("--share", default="0/1", help="K/M: of M such commands, this is number K")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    mine, shares = map(int, args.share.split("/"))
    gc.collect()
    gc.freeze()  # else each fork copies what its collections touch
    begin, tally, known, seconds, lost = time.monotonic(), Tally(), {}, {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = write_wds(folder / "shards", samples=N // 4)
        for number, (round_, run) in enumerate(plans(folder, shards, args.seed, args.extra, args.label or POINTS)):
            left = args.kills - tally.kills.total()
            if left <= 0 or round_ >= args.rounds or (args.only is not None and number > args.only):
                break
            if args.only not in (None, number) or number % shares != mine:
                continue
            try:
                experiment(run, partial(_reference, folder, known, seconds), seconds, tally, most=left)
            except (AssertionError, TimeoutError) as error:
                lost.append(number)
                print(f"LOST: seed {args.seed}, experiment {number}: {run}\n{error}\n", flush=True)
            shutil.rmtree(run.folder, ignore_errors=True)
    report = {
        "kills": tally.kills.total(),
        "losses": len(lost),
        "experiments": number,
        "parts": tally.parts,
        "seconds": round(time.monotonic() - begin, 1),
        "labels": sorted(set(POINTS) & {what.removesuffix(" (all)") for what in tally.kills}),
        "missed": sorted(set(POINTS) - {what.removesuffix(" (all)") for what in tally.kills}),
        "by kind": dict(sorted(tally.kills.items())),
        "ends of survivors": dict(tally.errors),
        "workers killed and the run went on": tally.through,
    }
    print(json.dumps(report, indent=1))
    if args.report:
        args.report.write_text(json.dumps(report))
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
