"""Which runs crash.py tries, and where it kills them."""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

from support.ddp.kill_points import POINTS

N, EPOCHS = 44, 5
LAYOUTS = [(1, 1), (1, 2), (2, 2)]  # nodes, ranks of each
RANDOM = {0: ["rank", "all"], 2: ["rank", "all", "worker", "worker"]}  # what is killed at random moments, by workers


@dataclass(frozen=True)
class Kill:
    """What: a label of `POINTS`, or "rank", "all", "worker" at a random moment. whom: a rank. nth: time there."""

    what: str
    whom: int
    everyone: bool = False  # at a label: all processes, or only that rank
    nth: int = 0
    moment: float = 0.0  # share of a run's duration
    opens: str = "continue"  # how the part that is killed begins
    lost: bool = False  # the second node has lost its store before that
    layout: tuple[int, int] = (1, 1)  # nodes, ranks of each, in that part


@dataclass(frozen=True)
class Run:
    """A way of training. nodes, local: machines and ranks of each, in a part of it. kills: what ends its parts."""

    folder: Path
    shards: str
    kind: str
    nodes: int
    local: int
    workers: int = 0
    persistent: bool = False
    kills: tuple[Kill, ...] = ()
    opens: str = "continue"  # how the last part begins

    @property
    def world(self):
        return self.nodes * self.local

    @property
    def stores(self):
        return [self.folder / f"scores-{node}.zarr" for node in range(self.nodes)]

    @property
    def checkpoint(self):
        return self.folder / "checkpoint.pt"

    def log(self, part, rank):
        """What rank ``rank`` did in a part: a line a step."""
        file = self.folder / f"part{part}-{rank}.log"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def plans(folder, shards, seed, extra, labels=POINTS):
    """(round, Run) without end. In a round each of ``labels`` has its turn.

    extra: most kills of a Run at random moments.
    """
    rng, due, round_, number = random.Random(seed), [], -1, 0
    while True:
        if not due:
            due = rng.sample(list(labels), len(labels))
            round_ += 1
        run = _way(folder / str(number), shards, due[0], rng)
        chosen = [label for label in due if _fits(label, run.nodes, run.local)][:4]
        due = [label for label in due if label not in chosen]
        kills = [_kill(label, run, rng) for label in chosen]
        for _ in range(rng.randint(0, extra)):
            kill = Kill(
                rng.choice(RANDOM[run.workers]),
                rng.randrange(run.world),
                moment=rng.random(),
                opens=rng.choice(["continue", "checkpoint"]),
                layout=(run.nodes, run.local),
            )
            kills.insert(rng.randint(0, len(kills)), kill)
        yield round_, replace(run, kills=tuple(kills), opens=rng.choice(["continue", "checkpoint"]))
        number += 1


def _way(folder, shards, label, rng):
    """A way of training in which ``label`` comes by."""
    nodes, local = rng.choice(LAYOUTS)
    if POINTS[label].who in ("second", "two nodes"):
        nodes, local = 2, 2
    elif POINTS[label].who == "several ranks":
        local = 2
    workers = rng.choice([0, 2])
    persistent = workers > 0 and rng.random() < 0.5
    return Run(folder, shards, rng.choice(["map", "wds"]), nodes, local, workers, persistent)


def _fits(label, nodes, local):
    who = POINTS[label].who
    if who in ("second", "two nodes"):
        return nodes > 1
    return nodes * local > 1 or who != "several ranks"


def _kill(what, run, rng):
    """Mostly in the layout of ``run``, sometimes after it was changed."""
    point, layout = POINTS[what], (run.nodes, run.local)
    if rng.random() < 0.25:
        layout = rng.choice([other for other in LAYOUTS if _fits(what, *other)])
    nodes, local = layout
    leaders = list(range(0, nodes * local, local))
    whom = {"leader": leaders, "second": leaders[1:], "saver": [0]}.get(point.who, range(nodes * local))
    opens = point.opens or rng.choice(["continue", "checkpoint"])
    return Kill(
        what,
        rng.choice(whom),
        everyone=rng.random() < 0.4,
        nth=rng.randrange(point.most),
        opens=opens,
        lost=point.lost,
        layout=layout,
    )
