"""The demo and the example script, run as a user runs them."""

import gzip
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.paths import ROOT

COMMAND = Path(sys.executable).with_name("infobatch-stream")


def run(*command, cwd, timeout=170):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_idx(folder, split, count):
    rng = np.random.default_rng(count)
    labels = rng.integers(0, 3, count, dtype=np.uint8)
    images = (rng.integers(0, 60, (count, 12, 12)) + 80 * labels[:, None, None]).astype(np.uint8)
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">4I", 0x803, count, 12, 12) + images.tobytes())
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">2I", 0x801, count) + labels.tobytes())


@pytest.mark.ddp
@pytest.mark.parametrize(("ranks", "count"), [(1, 60), pytest.param(2, 1200, marks=pytest.mark.slow)])
def test_demo_trains_on_idx_files_and_tells_what_it_saved(tmp_path, ranks, count):
    write_idx(tmp_path, "train", count)
    write_idx(tmp_path, "t10k", 100)
    out = run(COMMAND, "demo", "--data", tmp_path, "--nproc", ranks, "--epochs", 4, "--seeds", 1, cwd=tmp_path)
    rows = re.findall(r"(all data|InfoBatch), (MDS|WebDataset) .*?([\d.]+) % .*?([\d,]+) .*?([\d.]+)%", out)
    assert [row[:2] for row in rows] == [
        ("all data", "MDS"), ("InfoBatch", "MDS"), ("all data", "WebDataset"), ("InfoBatch", "WebDataset"),
    ]  # fmt: skip
    for kind, _, accuracy, trained, saved in rows:
        assert float(accuracy) > (90 if count > 1000 else 0)  # the three classes differ in brightness
        trained = int(trained.replace(",", ""))
        assert (trained == 4 * count) == (kind == "all data")
        assert float(saved) == pytest.approx(100 * (1 - trained / (4 * count)), abs=0.05)
    with Image.open(tmp_path / "infobatch-demo.png") as plot:
        assert min(plot.size) > 400


def test_demo_tells_of_each_run_as_it_ends(tmp_path):
    command = [COMMAND, "demo", "--epochs", "2", "--seeds", "1"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        told, going = [], []
        for line in process.stdout:
            if re.search(r"seed 0: .* right, 2,876 samples", line):
                told.append(line)
                going.append(process.poll() is None and not (tmp_path / "infobatch-demo.png").exists())
    assert all(going)
    assert [line.partition(", seed")[0] for line in told] == [
        "all data, MDS", "InfoBatch, MDS", "all data, WebDataset", "InfoBatch, WebDataset",
    ]  # fmt: skip


def test_demo_refuses_what_it_cannot_use_and_says_what_it_needs(tmp_path):
    write_idx(tmp_path, "train", 10)
    done = subprocess.run(
        [COMMAND, "demo", "--data", tmp_path], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "t10k" in done.stderr
    assert "Traceback" not in done.stderr
    done = subprocess.run(
        [COMMAND, "demo", "--out", "plot.txt"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert ".png" in done.stderr


@pytest.mark.ddp
def test_example_script_goes_on_from_its_checkpoint_on_another_number_of_processes(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(64):
        folder = tmp_path / "images" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    run(COMMAND, "convert", "images", "shards", "--format", "wds", cwd=tmp_path)
    script = ROOT / "examples" / "train.py"
    options = ["shards", "--classes", 2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    first = run(*torchrun, script, *options, "--epochs", 2, "--batch-size", 8, cwd=tmp_path)
    assert re.findall(r"epoch (\d+)", first) == ["0", "1"]
    rest = run(sys.executable, script, *options, "--epochs", 4, "--batch-size", 16, cwd=tmp_path)
    assert re.findall(r"epoch (\d+)", rest) == ["2", "3"]
