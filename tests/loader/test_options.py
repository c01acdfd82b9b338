"""Every option of the libraries under the loader is in docs/options.md, and does what the page says."""

import re
import warnings
from contextlib import contextmanager, nullcontext
from inspect import signature
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from streaming import Stream, StreamingDataset
from support.ddp.data import Noisy, loss_of, write_mds, write_wds
from support.paths import ROOT
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from webdataset import WebDataset

from infobatch_stream import ConfigError, IndexedWebDataset, InfoBatchLoader

pytestmark = [
    pytest.mark.usefixtures("no_stale_shared_memory", "few_open_files"),
    # streaming leaves files open that it checks
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
PAGE = (ROOT / "docs" / "options.md").read_text()


def table(title):
    """What happens to each option, by name."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| ([\w' ]+) \|", section, re.M))


@pytest.mark.parametrize("kind", [StreamingDataset, Stream, DataLoader, WebDataset])
def test_each_option_is_on_the_page(kind):
    assert signature(kind).parameters.keys() <= table(kind.__name__).keys()  # other versions may have fewer


def test_what_a_stateful_data_loader_has_beside_is_on_the_page_and_refused(make):
    both = [signature(kind).parameters.keys() for kind in (StatefulDataLoader, DataLoader)]
    (option,) = both[0] - both[1]
    assert f"| `{option}` | refused: " in PAGE.split("\n### From torchdata's StatefulDataLoader\n")[1].split("\n## ")[0]
    with pytest.raises(ConfigError, match=rf"{option}=.*exact after any step"):
        make(Noisy(50), **{option: 1})


def test_each_argument_of_the_loader_is_on_the_page_with_its_default():
    section = PAGE.split("\n## InfoBatchLoader\n")[1].split("\n## ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| (?:`(.*?)`)? ?\|", section, re.M))
    found = [one for one in signature(InfoBatchLoader).parameters.values() if one.kind is not one.VAR_KEYWORD]
    assert told == {one.name: "" if one.default is one.empty else repr(one.default) for one in found}


@pytest.fixture
def make(tmp_path):
    def make(dataset, **options):
        return InfoBatchLoader(dataset, tmp_path / "scores.zarr", **{"batch_size": 8, "epochs": 4, **options})

    return make


@pytest.fixture
def first_batch(make):
    return lambda dataset, **options: next(iter(make(dataset, **options)))


# Of each option, what else it needs and a value that is not its default.
STREAMING = {
    "streams": lambda local, remote: {"streams": [Stream(local=local)]},
    "remote": lambda local, remote: {"remote": remote, "local": local},
    "local": lambda local, remote: {"local": local},
    "split": lambda local, remote: {"local": str(Path(local).parent), "split": Path(local).name},
    "validate_hash": lambda local, remote: {"remote": remote, "validate_hash": "sha1"},
    "keep_zip": lambda local, remote: {"remote": remote, "keep_zip": True},
    "cache_limit": lambda local, remote: {"remote": remote, "cache_limit": "1mb"},
    "stream_config": lambda local, remote: {"stream_config": {"repeat": 2}},
}
VALUES = {
    "download_retry": 3,
    "download_timeout": 30,
    "epoch_size": 40,
    "predownload": 100,
    "sampling_method": "fixed",
    "sampling_granularity": 2,
    "partition_algo": "orig",
    "num_canonical_nodes": 2,
    "batch_size": 16,
    "shuffle": True,
    "shuffle_algo": "py1s",
    "shuffle_seed": 5,
    "shuffle_block_size": 1000,
    "batching_method": "per_stream",
    "allow_unsafe_types": True,
    "replication": 2,
    "stream_name": "stream",
}


@contextmanager
def two_ranks():
    """This process is one of two, of which the other says yes to everything."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def hashed(tmp_path_factory):
    return write_mds(tmp_path_factory.mktemp("mds") / "hashed", hashes=["sha1"])


@pytest.mark.parametrize(("option", "said"), table("StreamingDataset").items())
def test_options_of_streaming_dataset_do_what_the_page_says(
    first_batch, own, hashed, tmp_path, monkeypatch, option, said
):
    given = STREAMING.get(option, lambda *_: {option: VALUES[option]})(str(own), hashed)
    if "remote" in given:
        given = {"local": str(tmp_path / "cache"), **given, "remote": hashed}
    elif not {"streams", "local"} & given.keys():
        given["local"] = str(own)
    options = {"shuffle": False} if option == "shuffle" else {}
    if said == "refused":
        assert option == "replication"
        monkeypatch.setenv("WORLD_SIZE", "2")
        with two_ranks(), pytest.raises(ConfigError, match=r"replication=2.*process_group="):
            first_batch(StreamingDataset(**given), **options)
        assert not (tmp_path / "scores.zarr").exists()
        return
    dataset = StreamingDataset(**given)
    told = pytest.warns(RuntimeWarning, match=rf"do not apply: {option}=") if said == "warned of" else nullcontext()
    with told:
        _, picks = first_batch(dataset, **options)
    assert len(picks) == 8


STREAM = {"proportion": 1.0, "repeat": 2.0, "choose": 24, "download_retry": 3, "download_timeout": 30}


@pytest.mark.parametrize("option", table("Stream"))
def test_options_of_stream_apply(make, own, hashed, tmp_path, option):
    given = STREAMING.get(option, lambda *_: {option: STREAM[option]})(str(own), hashed)
    if "remote" in given:
        given = {"local": str(tmp_path / "cache"), **given, "remote": hashed}
    elif "local" not in given:
        given["local"] = str(own)
    loader = make(StreamingDataset(streams=[Stream(**given)]), epochs=1)
    entries = sum(int((picks.weight > 0).sum()) for _, picks in loader)
    assert entries == {"repeat": 96, "choose": 24}.get(option, 48)


def test_all_that_does_not_apply_is_in_one_warning(make, shards):
    dataset = StreamingDataset(local=shards, shuffle_algo="py1s", shuffle_seed=5, batch_size=4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        make(dataset)
    assert len(said) == 1
    assert said[0].filename == __file__
    for word in ("shuffle_algo='py1s'", "shuffle_window=", "shuffle_seed=5", "batch_size=4", "is used: 8"):
        assert word in str(said[0].message)


def test_what_is_usual_is_not_warned_of(make, shards):
    make(StreamingDataset(local=shards, batch_size=8, shuffle=True, replication=1))
    dataset = StreamingDataset(local=shards, batch_size=8)
    assert len(list(dataset)) == 48  # which fills in what was not given
    make(dataset)


def test_a_limit_where_nothing_is_downloaded_is_warned_of(make, own):
    with pytest.warns(RuntimeWarning, match="cache_limit .nothing is downloaded"):
        loader = make(StreamingDataset(local=str(own), cache_limit="1mb"))
    assert len(list(loader)) == 6


@pytest.mark.parametrize("algorithm", ["md5", "my own"])
def test_a_checksum_that_the_index_does_not_have_is_refused_at_once(make, hashed, tmp_path, algorithm):
    dataset = StreamingDataset(remote=hashed, local=str(tmp_path / "cache"), validate_hash=algorithm)
    with pytest.raises(ConfigError, match=rf"validate_hash='{algorithm}': .*\(it has: sha1\)"):
        make(dataset)


HOOKS = {
    "__iter__": "__getitem__",
    "__len__": "num_samples",
    "state_dict": "loader's state_dict",
    "load_state_dict": "loader's load_state_dict",
    "resample_streams": "only where streams are mixed",
}


@pytest.mark.parametrize(("hook", "word"), HOOKS.items())
def test_a_method_that_is_overridden_in_vain_is_warned_of(make, shards, hook, word):
    def mine(self, *args):
        return getattr(StreamingDataset, hook)(self, *args)

    kind = type("Mine", (StreamingDataset,), {hook: mine})
    with pytest.warns(RuntimeWarning, match=rf"that Mine overrides are not called: {hook} \(.*{word}"):
        make(kind(local=shards))


def test_one_that_is_called_is_not(make, own):
    class Mine(StreamingDataset):
        def __getitem__(self, index):
            return super().__getitem__(index)

        def get_item(self, *args):
            return super().get_item(*args)

        def resample_streams(self, *args):
            return super().resample_streams(*args)

    make(Mine(streams=[Stream(local=str(own), repeat=2)]))


# ---- DataLoader and WebDataset

LOADER = {
    "num_workers": 1,
    "pin_memory": True,
    "timeout": 60,
    "worker_init_fn": print,
    "multiprocessing_context": "fork",
    "generator": torch.Generator(),
    "prefetch_factor": 3,
    "persistent_workers": True,
    "pin_memory_device": "cpu",
}


@pytest.mark.parametrize(("option", "said"), table("DataLoader").items())
def test_options_of_data_loader_do_what_the_page_says(make, option, said):
    if said == "loader's own":
        assert option in signature(InfoBatchLoader).parameters
    elif said == "refused":
        with pytest.raises(ConfigError, match=f"{option}="):
            make(Noisy(50), **{option: None})
    else:
        assert said == "passed on"
        loader = make(Noisy(50), **{"num_workers": 1, option: LOADER[option]})
        found = getattr(loader.dataloader, option)
        assert getattr(found, "_name", found) == LOADER[option]


@pytest.mark.parametrize(("option", "said"), table("WebDataset").items())
def test_options_of_web_dataset_do_what_the_page_says(tmp_path, option, said):
    given = {"urls": write_wds(tmp_path / "wds")}
    if said == "applies":
        assert len(IndexedWebDataset(**{"cache_dir": tmp_path / "cache", **given})) == 48
        assert option in signature(IndexedWebDataset).parameters
    else:
        with pytest.raises(TypeError, match=option):
            IndexedWebDataset(**given, **{option: None})


def test_streams_of_other_picture_sizes_with_a_batching_method_are_told_before_they_fail(make, tmp_path):
    streams = [Stream(local=write_mds(tmp_path / name, first=first)) for name, first in (("a", 0), ("b", 48))]

    class Pictures(StreamingDataset):
        def __getitem__(self, index):
            return torch.zeros(3, 4 if super().__getitem__(index)["i"] < 48 else 6)

    dataset = Pictures(streams=streams, batch_size=8, batching_method="per_stream")
    with pytest.warns(RuntimeWarning, match=r"batching_method='per_stream' \(a batch mixes the streams.*collate_fn"):
        loader = make(dataset, collate_fn=list)  # the remedy
    with loader:
        for data, picks in loader:
            loader.update(loss_of(picks.index), picks)
            assert len(data) == len(picks)
