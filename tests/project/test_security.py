"""Files of others: nothing in them is run, leads out of its folder, or is believed before it is compared."""

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from fuzz.run import memory_below, watched
from fuzz.seeds import END, header, padded
from streaming import StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from support.ddp.data import write_mds
from support.hostile import Bomb
from webdataset.autodecode import DecodingError

import infobatch_stream
from infobatch_stream import ConfigError, DataError, IndexedWebDataset
from infobatch_stream.convert import convert, readers, write_shards
from infobatch_stream.formats.schema import Column, EncodedImage
from infobatch_stream.sources.mds.source import MdsSource

pytestmark = pytest.mark.usefixtures("few_open_files")  # of StreamingDatasets

ROOT = Path(infobatch_stream.__file__).parent.parent
FILES = sorted(
    file for folder in ("infobatch_stream", "tools", "examples", "benchmarks") for file in (ROOT / folder).rglob("*.py")
)


# ---- nothing on disk is run

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "pandas"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {
    "extractall",
    "extract",
    "unpack_archive",
    "read_pickle",
    "unsafe_load",
    "full_load",
    "system",
    "popen",
}
REQUIRED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "yaml.load": ("never", None)}
REQUIRED["numpy.load"] = REQUIRED["np.load"]
# In format 2 objects are unpickled; and what is made would be of the format that a user has set as the default.
REQUIRED |= {
    f"zarr.{name}": ("zarr_format", 3) for name in ("open_group", "create_group", "open_array", "create_array")
}
REQUIRED |= {f"zarr.{name}": ("never", None) for name in ("open", "load", "save", "group", "array", "open_like")}


# The one file that reads pickles, CIFAR's: with an unpickler of its own, which knows arrays and nothing else.
CIFAR = "infobatch_stream/convert/readers/cifar_pickle.py"


def uses_of_pickle(code):
    """What ``code`` takes from the module pickle, and how often it names the module without taking anything from it."""
    tree = list(ast.walk(ast.parse(code)))
    taken = [
        ast.unparse(node) for node in tree if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"
    ]
    named = [node for node in tree if isinstance(node, ast.Name) and node.id == "pickle"]
    return set(taken), len(named) - len(taken)


def dangers(code):
    """What in ``code`` could run something that a file holds."""
    for node in ast.walk(ast.parse(code)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
        yield from (name for name in names if name.split(".")[0] in FORBIDDEN_MODULES or name in REQUIRED)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        if called in FORBIDDEN_CALLS or called.rpartition(".")[2] in FORBIDDEN_METHODS or options.get("shell"):
            yield called
        if called in REQUIRED and options.get(REQUIRED[called][0], ...) is not REQUIRED[called][1]:
            yield called
        if options.get("allow_pickle") or options.get("allow_unsafe_types") or options.get("weights_only") is False:
            yield called


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_unpickles_or_runs_what_a_file_holds(file):
    assert list(dangers(file.read_text())) == (["pickle"] if file == ROOT / CIFAR else [])


def test_the_unpickler_of_cifar_is_no_other_than_its_own():
    code = (ROOT / CIFAR).read_text()
    opcodes = {"pickle.BUILD", "pickle.SETITEM", "pickle.SETITEMS"}
    assert uses_of_pickle(code) == ({*opcodes, "pickle.UnpicklingError", "pickle._Unpickler"}, 0)
    (unpickler,) = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ClassDef) and node.bases]
    assert (unpickler.name, ast.unparse(unpickler.bases[0])) == ("_ArrayUnpickler", "pickle._Unpickler")
    assert "find_class" in {node.name for node in unpickler.body if isinstance(node, ast.FunctionDef)}
    assert "super" not in code


def test_every_file_was_looked_at():
    names = {str(file.relative_to(ROOT)) for file in FILES}
    assert {
        "infobatch_stream/store/score_store.py",
        "infobatch_stream/sources/webdataset/dataset.py",
        "infobatch_stream/demo/demo.py",
        "examples/train.py",
    } <= names


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import marshal as m", "import a, shelve", "from dill import load",
        "def f():\n    import cloudpickle", "torch.load(x)", "torch.load(x, weights_only=False)", "np.load(x)",
        "np.load(x, allow_pickle=True)", "numpy.load(x)", "yaml.load(x, Loader=y)", "eval(x)", "exec(x)",
        "tar.extractall()", "StreamingDataset(allow_unsafe_types=True)", "run(x, shell=True)", "os.system(x)",
        "from torch import load", "from numpy import load", "zarr.open(x)", "zarr.open_group(x)",
        "zarr.open_group(x, zarr_format=2)", "from zarr import open_group",
    ],
)  # fmt: skip
def test_what_would_is_found(code):
    assert list(dangers(code))


def test_what_is_safe_is_not_found():
    assert not list(
        dangers("np.load(x, allow_pickle=False); torch.load(x, weights_only=True); model.eval(); re.compile(x)")
    )
    assert not list(dangers("zarr.open_group(x, mode='r', zarr_format=3); zarr.create_group(x, zarr_format=3)"))


@pytest.mark.parametrize("extension", ["pkl", "pickle", "pyd", "pth", "npy", "npz"])
def test_a_pickle_in_a_tar_is_not_run_without_decode_nor_with_it_where_webdataset_is_told_so(
    tmp_path, monkeypatch, extension
):
    data = pickle.dumps(Bomb(tmp_path / "exploded"))
    (tmp_path / "s.tar").write_bytes(header(f"a.{extension}".encode(), len(data)) + padded(data) + END)
    dataset = IndexedWebDataset(tmp_path)
    assert dataset[0][extension] == data
    monkeypatch.setattr("webdataset.utils.enforce_security", True)  # as WDS_SECURE=1 does when it is imported
    with pytest.raises(DecodingError):
        dataset.decode()[0]
    assert not (tmp_path / "exploded").exists()


# ---- MDS


@pytest.fixture(scope="module")
def mds(tmp_path_factory):
    clean_stale_shared_memory()
    yield Path(write_mds(tmp_path_factory.mktemp("mds") / "shards"))
    clean_stale_shared_memory()


def with_index(mds, folder, **changes):
    """A copy in which a shard's entry in index.json is changed; dots lead to what lies inside."""
    shutil.copytree(mds, folder)
    found = json.loads((folder / "index.json").read_text())
    for name, value in changes.items():
        inner = found["shards"][1]
        *way, last = name.split("__")
        for step in way:
            inner = inner[step]
        inner[last] = value
    (folder / "index.json").write_text(json.dumps(found))
    return StreamingDataset(local=str(folder), batch_size=1)


@pytest.mark.parametrize("name", ["../secret.mds", "a/../../secret.mds", "{}/secret.mds", "..", ".", "", "a\0b"])
def test_a_shard_outside_of_the_folder_is_refused_before_it_is_read(mds, tmp_path, name):
    secret = tmp_path / "secret.mds"
    shutil.copy(mds / "shard.00001.mds", secret)
    before = secret.stat()
    name = name.format(tmp_path)
    dataset = with_index(mds, tmp_path / "own", raw_data__basename=name)
    with pytest.raises(DataError, match=r"index\.json has a shard in the file .*not in its folder") as caught:
        MdsSource(dataset)
    assert repr(name) in str(caught.value)
    assert secret.stat().st_atime_ns == before.st_atime_ns


def test_a_compressed_shard_outside_of_the_folder_is_refused(mds, tmp_path):
    outside = {"basename": "../x.mds.zstd", "bytes": 9, "hashes": {}}
    with pytest.raises(DataError, match=r"'\.\./x\.mds\.zstd', which is not in its folder"):
        MdsSource(with_index(mds, tmp_path / "own", zip_data=outside, compression="zstd"))


def test_shards_in_subfolders_are_accepted(mds, tmp_path):
    dataset = with_index(mds, tmp_path / "own")
    (tmp_path / "own" / "sub").mkdir()
    (tmp_path / "own" / "shard.00001.mds").rename(tmp_path / "own" / "sub" / "s..1.mds")
    dataset.shards[1].raw_data.basename = "sub/s..1.mds"
    assert MdsSource(dataset).read(13)["i"] == 13


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 10**6}, r"holds 1000000 samples in [\d,]+ bytes, which cannot be"),
        ({"samples": True}, "holds True samples"),
        ({"raw_data__bytes": -1}, "-1 bytes"),
        ({"raw_data__bytes": 10**15}, r"has [\d,]+ bytes, its index.json says 1,000,000,000,000,000"),
        ({"raw_data__bytes": 4 * 10**6, "samples": 10**6}, "its index.json says 4,000,000"),
        ({"raw_data__hashes": None}, "fetch or write it again"),
    ],
    ids=str,
)
def test_counts_and_sizes_that_cannot_be_are_refused_before_a_store_is_made(mds, tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        MdsSource(with_index(mds, tmp_path / "own", **changes))


# ---- the converter


@pytest.mark.parametrize("extension", ["../../x", "a/b", "/etc/x", "", ".", "a\0", "a\nb", ".."])
def test_an_extension_that_would_lead_elsewhere_is_refused(tmp_path, extension):
    for sample, columns in [
        ({"image": EncodedImage(b"x", extension)}, None),
        ({"text": "x"}, {"text": Column("str", extension)}),
    ]:
        with pytest.raises(DataError, match="is no extension"):
            write_shards([sample], tmp_path / "out", "wds", columns=columns)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_never_ends_is_no_image(tmp_path, kind):
    (tmp_path / "src" / "a").mkdir(parents=True)
    odd = tmp_path / "src" / "a" / "x.jpg"
    os.mkfifo(odd) if kind == "pipe" else odd.symlink_to("/dev/zero")
    with watched(), pytest.raises(DataError, match=r"x\.jpg is no regular file"):
        convert(tmp_path / "src", tmp_path / "dst", "mds")
    assert not (tmp_path / "dst").exists()


def test_a_pipe_named_like_an_idx_file_is_passed_over(tmp_path):
    os.mkfifo(tmp_path / "train-images-idx3-ubyte")
    with watched(), pytest.raises(ConfigError, match="no images"):
        convert(tmp_path, tmp_path.with_name("dst"), "mds")


def test_an_image_larger_than_any_shard_is_not_read(tmp_path):
    (tmp_path / "src" / "a").mkdir(parents=True)
    with (tmp_path / "src" / "a" / "x.jpg").open("wb") as file:
        file.truncate(2**40)
    with memory_below(2**22), pytest.raises(DataError, match=r"x\.jpg has 1,099,511,627,776 bytes"):
        readers.read_images(tmp_path / "src")[0][0]


def test_class_and_file_names_never_lead_out_of_the_destination(tmp_path):
    """They become text in samples; shards have names of their own."""
    for name in ("..a", "a;b", "-rf", "a\nb", "{0..9}", "pipe:x", "é" * 60):
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / f"{name}.jpg").write_bytes(b"x")
    (tmp_path / "src" / "..a").rename(tmp_path / "src" / "a..")
    for format in ("mds", "wds"):
        done = convert(tmp_path / "src", tmp_path / format, format, allow_empty=True)  # the image in "a.." is hidden
        assert done.parts[0].samples == 6
        assert {file.name.split(".")[0] for file in (tmp_path / format).rglob("*")} <= {
            "classes", "columns", "index", "shard", "shard-000000", "shards",
        }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mds", "src", "wds"]
