"""Every example in the README runs, as it stands there, on real shards."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.paths import ROOT
from support.servers import s3_server, use_s3
from torch import nn

from infobatch_stream.convert import convert, write_shards

pytestmark = pytest.mark.usefixtures("few_open_files")  # of StreamingDatasets

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(
    r"^```(sh|python)\n(.*?)^```", re.sub(r"<!-- ci: [\w-]+ -->\n```sh.*?```", "", README, flags=re.S), re.M | re.S
)
# What takes an afternoon is cut to what takes a moment.
SHORTER = {"epochs=90": "epochs=2", "num_workers=8": "num_workers=1", "--epochs 3": "--epochs 2"}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The folder in which a reader of the README stands: images in classes, digits as MDS, a tgz; and a bucket."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(96):
        folder = tmp_path / "images" / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
    digits = ({"image": rng.integers(0, 256, (8, 8), dtype=np.uint8), "label": n % 10} for n in range(200))
    write_shards(digits, tmp_path / "my-shards", "mds")
    convert(tmp_path / "images", tmp_path / "images-tgz", "wds")
    subprocess.run("cd images-tgz && gzip -S .tgz *.tar && mv *.tar.tgz shard-000000.tgz", shell=True, check=True)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with s3_server("my-bucket") as s3:
        use_s3(monkeypatch, s3.url)
        yield tmp_path


def test_the_readme_has_examples_of_both_kinds():
    assert {kind for kind, _ in BLOCKS} == {"sh", "python"}
    assert len(BLOCKS) >= 8


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:[\\s\\S]*NumPy array is not writable:UserWarning")  # MDS gives such arrays
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork of a process with threads, Python 3.12+
def test_every_example_of_the_readme_runs(workplace):
    from streaming.base.util import clean_stale_shared_memory

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    names = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "rank": 0}
    # Shards come first: their commands stand below the code that reads them.
    shell = [code for kind, code in BLOCKS if kind == "sh"]
    for code in sorted(shell, key=lambda code: "convert" not in code):
        for long, short in SHORTER.items():
            code = code.replace(long, short)
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-euc", code], env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    for code in (code for kind, code in BLOCKS if kind == "python"):
        clean_stale_shared_memory()
        for long, short in SHORTER.items():
            code = code.replace(long, short)
        try:
            exec(compile(code, "README.md", "exec"), names)
        except Exception as error:
            raise AssertionError(f"this example of the README fails with {error!r}:\n{code}") from error
    dataset = names["dataset"]
    assert len(dataset) == 1000
    assert names["learning_rate"](0.0) == 0
    assert names["learning_rate"](1.0) == pytest.approx(0)
    # The loaders of the MDS and WebDataset sections, which the README does not iterate, give batches.
    assert Path("scores.zarr").is_dir()


COMMANDS = re.findall(r"^\| [^|]+ \| `((?:python|torchrun)[^`]*examples/[^`]*)` \|$", README, re.M)


def test_there_is_a_command_for_each_experiment_of_the_original():
    scripts = {re.search(r"examples/(\w+)\.py", command).group(1) for command in COMMANDS}
    assert scripts >= {"cifar", "imagenet", "segmentation", "diffusion", "finetune", "detection"}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_of_a_command_is_one_of_its_script(command):
    """That the scripts run is for the tests of each."""
    script, rest = re.search(r"examples/(\w+\.py)(.*)", command).groups()
    source = "".join((ROOT / "examples" / name).read_text() for name in (script, "recipe.py"))
    assert [option for option in re.findall(r"--[\w-]+", rest) if f'"{option}"' not in source] == []
