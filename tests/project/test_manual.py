"""Every example of the README and of the manual runs, as it stands there; and their links lead somewhere."""

import os
import re
import shutil
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
from torch.utils.data import TensorDataset

from infobatch_stream import InfoBatchLoader
from infobatch_stream.convert import convert, write_shards

pytestmark = pytest.mark.usefixtures("few_open_files")  # of StreamingDatasets

# What lies in the folder in which the reader of a page stands.
HERE = {
    "README.md": ["my-shards"],
    "docs/index.md": ["my-shards"],
    "docs/cookbook.md": ["images"],
    "docs/mds.md": ["images"],
    "docs/webdataset.md": ["images", "images-tgz"],
    "docs/map-style.md": [],
    "docs/converting.md": ["images", "images-mds"],
    "docs/buckets.md": ["images", "examples"],
    "docs/ddp.md": ["images-mds", "examples"],
    "docs/checkpoints.md": [],
    "docs/schedules.md": [],
    "docs/constant-steps.md": [],
    "docs/choosing-samples.md": [],
    "docs/reliability.md": [],
    "docs/threads.md": [],
}
# Pages whose blocks need more than that have tests of their own.
ELSEWHERE = {
    "docs/frameworks.md": "tests/project/test_pages.py",
    "docs/questions.md": "tests/project/test_questions.py",
    "docs/policies.md": "tests/policies/test_policies.py",
    "docs/losses.md": "tests/examples/test_other_losses.py",
    "docs/seeing.md": "tests/loader/test_seeing.py",
    "docs/format.md": "tests/store/test_format.py",
    "docs/trainers/fsdp.md": "tests/frameworks/test_fsdp.py",
    "docs/trainers/trl.md": "tests/frameworks/test_trl.py",
    "docs/trainers/contrastive.md": "tests/frameworks/test_contrastive.py",
    "docs/trainers/timm.md": "tests/frameworks/test_timm.py",
    "docs/trainers/ray.md": "tests/frameworks/test_ray_train.py",
    "docs/trainers/composer.md": "tests/frameworks/test_composer.py",  # in an environment of its own
}
# What takes an afternoon is cut to what takes a moment.
SHORTER = {"epochs=90": "epochs=2", "num_workers=8": "num_workers=1", "--epochs 3": "--epochs 2"}
BLOCK = re.compile(r"^(?:<!-- (ci|file): ([\w.-]+) -->\n)?```(sh|python)\n(.*?)^```", re.M | re.S)


def text_of(page):
    return (ROOT / page).read_text()


def pages():
    return ["README.md", *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("**/*.md")))]


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A folder with all that pages begin with: images in classes, as MDS, as a tgz; digits as MDS; the examples."""
    folder = tmp_path_factory.mktemp("things")
    rng = np.random.default_rng(0)
    for number in range(96):
        images = folder / "images" / f"class{number % 3}"
        images.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(images / f"{number}.jpg")
    digits = ({"image": rng.integers(0, 256, (8, 8), dtype=np.uint8), "label": n % 10} for n in range(200))
    write_shards(digits, folder / "my-shards", "mds")
    convert(folder / "images", folder / "images-mds", "mds")
    convert(folder / "images", folder / "images-tgz", "wds")
    command = "cd images-tgz && gzip -S .tgz *.tar && mv *.tar.tgz shard-000000.tgz"
    subprocess.run(command, cwd=folder, shell=True, check=True)
    shutil.copytree(ROOT / "examples", folder / "examples")
    return folder


@pytest.fixture(scope="module")
def server():
    with s3_server("my-bucket") as s3:
        yield s3


@pytest.fixture
def one_thread():
    """Small models are slow on several threads where other tests run beside them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_shell(code):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-euc", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def run_python(code, page, names):
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    try:
        exec(compile(code, page, "exec"), names)
    except Exception as error:
        raise AssertionError(f"this example of {page} fails with {error!r}:\n{code}") from error


def names_of_a_reader():
    """What a reader has of her own: a model, and a loader in the midst of a run."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = InfoBatchLoader(TensorDataset(torch.rand(100, 8)), "scores-yours.zarr", batch_size=10, epochs=3)
    return {"model": model, "optimizer": optimizer, "rank": 0, "loader": loader, "torch": torch, "os": os, "state": {}}


@pytest.mark.ddp
@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:[\\s\\S]*NumPy array is not writable:UserWarning")  # MDS gives such arrays
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork of a process with threads, Python 3.12+
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("page", HERE)
def test_every_example_of_a_page_runs_in_the_order_of_the_page(page, things, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use_s3(monkeypatch, server.url)
    for thing in HERE[page]:
        shutil.copytree(things / thing, tmp_path / thing)
    names = names_of_a_reader()
    ran = 0
    for marker, name, kind, code in BLOCK.findall(text_of(page)):
        for long, short in SHORTER.items():
            code = code.replace(long, short)
        if marker == "file":
            Path(name).write_text(code)
        elif marker != "ci":  # the README's commands that install are for .ci/run
            run_shell(code) if kind == "sh" else run_python(code, page, names)
            ran += 1
    assert ran
    if page == "docs/schedules.md":
        assert names["learning_rate"](0.0) == 0
        assert names["learning_rate"](1.0) == pytest.approx(0)


def test_every_example_is_run_by_a_test():
    with_examples = {page for page in pages() if BLOCK.search(text_of(page))}
    assert with_examples == HERE.keys() | ELSEWHERE.keys()
    for page, test in ELSEWHERE.items():
        assert Path(page).name in text_of(test)


def anchors(page):
    """Those of the headings of a page, as they are made there and on the site."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages())
def test_links_lead_to_files_and_headings_that_are_there(page):
    text = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("https://"):
            place, _, anchor = link.partition("#")
            target = (ROOT / page).parent / place if place else ROOT / page
            assert target.exists(), link
            # The site is made of docs/ alone.
            assert page == "README.md" or target.resolve().is_relative_to(ROOT / "docs"), link
            assert not anchor or anchor in anchors(target.resolve().relative_to(ROOT)), link


def test_the_site_has_every_page():
    listed = re.findall(r": ([\w/-]+\.md)$", text_of("mkdocs.yml"), re.M)
    assert sorted(listed) == [page.removeprefix("docs/") for page in pages()[1:]]


COMMANDS = re.findall(
    r"^\| [^|]+ \| `((?:python|torchrun)[^`]*examples/[^`]*)` \|$", text_of("docs/experiments.md"), re.M
)


def test_there_is_a_command_for_each_experiment_of_the_original():
    scripts = {re.search(r"examples/(\w+)\.py", command).group(1) for command in COMMANDS}
    assert scripts >= {"cifar", "imagenet", "segmentation", "diffusion", "finetune", "detection"}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_of_a_command_is_one_of_its_script(command):
    """That the scripts run is for the tests of each."""
    script, rest = re.search(r"examples/(\w+\.py)(.*)", command).groups()
    source = "".join((ROOT / "examples" / name).read_text() for name in (script, "recipe.py"))
    assert [option for option in re.findall(r"--[\w-]+", rest) if f'"{option}"' not in source] == []
