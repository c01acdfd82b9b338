"""Watching a run: the line on the terminal, what loggers get, and what docs/seeing.md shows."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.paths import ROOT
from torch.utils.data import TensorDataset

from infobatch_stream import InfoBatchLoader
from infobatch_stream.errors import MissingExtraError
from infobatch_stream.live import progress
from infobatch_stream.store.history import epochs

DATA = TensorDataset(torch.rand(200, 3, generator=torch.Generator().manual_seed(0)))

PREAMBLE = """
import torch
from torch.utils.data import TensorDataset
from infobatch_stream import InfoBatchLoader
loader = InfoBatchLoader(TensorDataset(torch.rand(100, 4)), "scores-page.zarr", batch_size=10, epochs=1)
"""


def loader_at(path, **options):
    return InfoBatchLoader(DATA, path, batch_size=32, epochs=3, delta=1, **options)


def train(batches, loader):
    """Which samples there were."""
    index = []
    for (x,), picks in batches:
        loader.update(x.sum(1), picks)
        index += picks.index.tolist()
    return index


@pytest.mark.parametrize("constant", [False, True])
def test_the_line_says_where_the_run_stands_and_changes_no_batch(tmp_path, constant):
    shown, plain = (loader_at(tmp_path / f"{name}.zarr", constant_steps=constant) for name in ("shown", "plain"))
    for epoch in range(3):
        out = io.StringIO()
        assert train(progress(shown, file=out, mininterval=0), shown) == train(plain, plain)
        stats = shown.stats
        last = re.split(r"[\r\n]", out.getvalue().strip())[-1]
        assert last.startswith(f"epoch {epoch + 1}/3: 100%")
        assert f"{stats['steps']}/{stats['steps']} [" in last
        assert f"kept={stats['kept'] / 200:.1%}, saved={stats['saved']:.1%}]" in last
    assert stats["saved"] > 0


def test_after_a_resume_it_goes_on_in_mid_epoch(tmp_path):
    loader = loader_at(tmp_path / "s.zarr")
    for (x,), picks in loader:
        loader.update(x.sum(1), picks)
        if loader.step == 3:
            break
    again = loader_at(tmp_path / "again.zarr")
    again.load_state_dict(loader.state_dict())
    out = io.StringIO()
    train(progress(again, file=out, mininterval=0), again)
    assert "43%" in out.getvalue()  # 3 of 7 steps
    assert re.split(r"[\r\n]", out.getvalue().strip())[-1].startswith("epoch 1/3: 100%")


def test_without_tqdm_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(MissingExtraError, match=r"infobatch-stream\[live\]"):
        progress(loader_at(tmp_path / "s.zarr"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which examples/live.py was run, and what it printed."""
    folder = tmp_path_factory.mktemp("live")
    return folder, ended(folder, sys.executable, ROOT / "examples" / "live.py")


def ended(folder, *command):
    """What a command printed, which ended well."""
    run = list(map(str, command))
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_example_gives_all_facts_to_tensorboard(made):
    folder, printed = made
    assert "epoch 10/10: 100%" in printed
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "runs"))
    events.Reload()
    assert {f"infobatch/{name}" for name in loader_at(folder / "s.zarr").stats} <= set(events.Tags()["scalars"])
    kept = [event.value for event in events.Scalars("infobatch/kept")]
    assert kept == [epoch.kept for epoch in epochs(folder / "scores-live.zarr")]
    steps = [event.step for event in events.Scalars("infobatch/saved")]
    assert steps == sorted(steps)


def test_every_command_and_example_of_the_page_runs(made):
    folder, _ = made
    page = (ROOT / "docs" / "seeing.md").read_text()
    commands = [line.split("#")[0].split() for line in re.findall(r"^    (infobatch-stream .*)$", page, re.M)]
    assert {command[1] for command in commands} == {"inspect", "report", "export", "simulate"}
    (folder / "scores.zarr").symlink_to("scores-live.zarr")
    for _, *arguments in commands:
        if "SHARDS" not in arguments:  # tests/report/test_report.py has some
            ended(folder, Path(sys.executable).with_name("infobatch-stream"), *arguments)
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    code = "\n".join([PREAMBLE, *blocks])
    assert len(blocks) == 4
    assert "kept=" in ended(folder, sys.executable, "-c", code)
