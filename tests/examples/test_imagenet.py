"""The ImageNet example on a few generated pictures: both kinds of shards, one process and two, elastic resume."""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from support.example_runs import EXAMPLES, checkpoint, run
from support.servers import s3_server, use_s3

from infobatch_stream.convert import convert

SCRIPT = EXAMPLES / "imagenet.py"
OPTIONS = ["--classes", 3, "--global-batch", 16, "--workers", 0, "--delta", 1.0, "--lr", 0.05]
RESNET = ["--model", "test_resnet", "--size", 64]
TRAIN, VAL = 104, 41


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Folders mds and wds, each with train and val: JPEGs in three classes, of one colour each."""
    root, rng = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for number in range(count):
            folder = root / "images" / split / f"class{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 100, (40, 48, 3))
            pixels[:, :, number % 3] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.jpg")
        for format in ("mds", "wds"):
            convert(root / "images" / split, root / format / split, format, shard_samples=20)
    return root


def train(shards, folder, *options, format="mds", processes=1):
    where = ["--train", f"{shards}/{format}/train", "--val", f"{shards}/{format}/val", "--out", folder]
    return run([*where, *OPTIONS, *options], folder.parent, processes=processes, script=SCRIPT)


def epochs(out):
    """[(epoch, steps, kept, right answers)]"""
    found = re.findall(rf"^epoch (\d+): (\d+) steps .* kept (\d+), .* val (\d+)/{VAL} = ", out, re.M)
    return [tuple(map(int, numbers)) for numbers in found]


@pytest.fixture(scope="module")
def two_ranks(shards, tmp_path_factory):
    """A run of two epochs on MDS by two ranks: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("two") / "run"
    return folder, train(shards, folder, *RESNET, "--epochs", 2, "--accumulate", 2, processes=2)


@pytest.mark.ddp
@pytest.mark.slow(short="test_ranks_train_from_a_bucket_as_from_a_folder")
def test_ranks_train_on_tars_as_on_mds(shards, two_ranks, tmp_path):
    out = train(shards, tmp_path / "run", *RESNET, "--epochs", 2, "--accumulate", 2, format="wds", processes=2)
    assert epochs(out) == epochs(two_ranks[1])


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("format", "processes"),
    [("wds", 1), *(pytest.param(format, 2, marks=pytest.mark.slow) for format in ("mds", "wds"))],
)
def test_ranks_train_from_a_bucket_as_from_a_folder(shards, two_ranks, tmp_path, monkeypatch, format, processes):
    tars = "/*.tar" if format == "wds" else ""
    with s3_server("my-bucket") as s3:
        use_s3(monkeypatch, s3.url)
        for split in ("train", "val"):
            convert(shards / "images" / split, f"s3://my-bucket/{format}/{split}", format, shard_samples=20)
        where = [
            "--train",
            f"s3://my-bucket/{format}/train{tars}",
            "--val",
            f"s3://my-bucket/{format}/val{tars}",
            "--cache-limit",
            "400kb",
        ]
        options = [*OPTIONS, *RESNET, "--epochs", processes, "--accumulate", 2]
        out = run([*where, *options], tmp_path, processes=processes, script=SCRIPT)
    if processes == 2:
        assert epochs(out) == epochs(two_ranks[1])
    else:  # whose numbers are rounded otherwise
        assert epochs(out)[0][:3] == epochs(two_ranks[1])[0][:3]


@pytest.mark.ddp
def test_a_run_goes_on_with_the_same_picks_on_another_number_of_processes(shards, two_ranks, tmp_path):
    folder, out = two_ranks
    (first, steps, kept, _), (second, fewer, pruned, _) = epochs(out)
    assert (first, second) == (0, 1)
    assert (steps, kept) == (-(-TRAIN // 8), TRAIN)  # each step is half of what the optimizer steps on
    assert pruned < 0.8 * TRAIN
    assert fewer == -(-pruned // 8)
    picks, found = [], []
    more = [*RESNET, "--epochs", 3, "--accumulate", 2]
    for processes in (1, 2):
        shutil.copytree(folder, tmp_path / str(processes))
    with ThreadPoolExecutor(2) as pool:
        outs = list(pool.map(lambda n: train(shards, tmp_path / str(n), *more, processes=n), (1, 2)))
    for processes, out in zip((1, 2), outs, strict=True):
        ((epoch, *numbers),) = epochs(out)
        assert epoch == 2
        found.append(numbers[:2])
        picks.append(~checkpoint(tmp_path / str(processes))["loader"]["pending"].isnan())
    assert found[0] == found[1]
    assert torch.equal(*picks)
    assert picks[0].sum() == found[0][1] < TRAIN


@pytest.mark.ddp
def test_one_process_measures_what_two_did(shards, two_ranks):
    folder, out = two_ranks
    measured = train(shards, folder, *RESNET, "--evaluate")
    assert measured.startswith(f"val {epochs(out)[-1][-1]}/{VAL} = ")


def test_a_vit_trains_on_tars_in_bfloat16(shards, tmp_path):
    options = ["--model", "test_vit", "--size", 160, "--optimizer", "adamw", "--bf16", "--epochs", 1, "--workers", 1]
    out = train(shards, tmp_path / "run", *options, "--policy", "full", format="wds")
    ((_, steps, kept, _),) = epochs(out)
    assert (steps, kept) == (-(-TRAIN // 16), TRAIN)
    saved = checkpoint(tmp_path / "run")
    assert saved["steps"] == steps
    assert any(not torch.equal(saved["ema"][name], value) for name, value in saved["model"].items())


def test_a_global_batch_that_cannot_be_divided_is_refused(shards, tmp_path):
    with pytest.raises(AssertionError, match="--global-batch 16 cannot be divided among 1 processes, 3 forward passes"):
        train(shards, tmp_path / "run", "--accumulate", 3)
