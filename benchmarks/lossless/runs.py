"""The runs of the lossless study: a line of JSON each, in results/lossless.jsonl."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

__all__ = ["DOCS", "RESULTS", "Run", "append", "read"]

_BENCHMARKS = Path(__file__).resolve().parent.parent
RESULTS = _BENCHMARKS / "results" / "lossless.jsonl"
DOCS = _BENCHMARKS.parent / "docs"


@dataclass
class Run:
    """One training run. accuracy: after each epoch, in percent, or at the end alone; trained: samples trained on by the
    end of each epoch; seconds: of training, loading and planning, on a CPU of the processor's time; saved: share of the
    samples of the full run that was not trained on; test_loss: as accuracy; steps: in all, 0 where they were not
    counted yet; elapsed: seconds by the end of each epoch."""

    task: str
    variant: str
    seed: int
    device: str
    threads: int
    accuracy: list[float] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    seconds: float = 0.0
    saved: float = 0.0
    test_loss: list[float] = field(default_factory=list)
    steps: int = 0
    elapsed: list[float] = field(default_factory=list)


def read(results: Path) -> list[Run]:
    """The runs in ``results``."""
    lines = results.read_text().splitlines() if results.exists() else []
    return [Run(**json.loads(line)) for line in lines]


def append(results: Path, run: Run) -> None:
    """Add ``run``: one write of one line, for several processes append."""
    with results.open("a") as file:
        file.write(json.dumps(asdict(run)) + "\n")
