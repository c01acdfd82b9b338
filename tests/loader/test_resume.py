"""A run that was stopped before any of its steps goes on with the picks of the run that was not."""

import pytest
import torch
from support.ddp.data import loss_of, write_wds
from support.ddp.launch import start
from support.ddp.resume import EPOCHS, make, train

from infobatch_stream import StoreError

# Python's own warning that forking a process with threads is risky; workers are forked here as users fork them.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def data_of(kind, tmp_path):
    return "44" if kind == "map" else write_wds(tmp_path / "shards")


def picks(steps):
    return [step[:3] for step in steps]


@forks
@pytest.mark.parametrize("kind", ["map", "wds"])
def test_from_before_every_step_a_new_process_goes_on_exactly(tmp_path, kind):
    data, states = data_of(kind, tmp_path), []
    steps = train(make(kind, data, tmp_path / "scores.zarr", num_workers=1), states)
    assert len(states) == len(steps) + 1 > 20
    assert {step[0] for step in steps} == set(range(EPOCHS))
    assert any(weight > 1 for step in steps for weight in step[2])  # something was pruned
    torch.save(states, tmp_path / "states.pt")
    (tmp_path / "out").mkdir()
    start("resume.py", kind, data, tmp_path / "states.pt", tmp_path / "out")
    found = torch.load(tmp_path / "out" / "0.pt", weights_only=True)
    for first, rest in enumerate(found):
        assert rest == steps[first:], f"from step {first}"


def test_a_state_after_the_last_step_of_an_epoch_resumes_at_the_next(tmp_path):
    loader = make("map", 44, tmp_path / "scores.zarr")
    for _, batch in loader:
        loader.update(loss_of(batch.index), batch)
        state = loader.state_dict()  # before the loop knows that this was the last
    resumed = make("map", 44, tmp_path / "resumed.zarr")
    resumed.load_state_dict(state)
    assert (resumed.epoch, resumed.step, resumed.progress) == (1, 0, 1 / EPOCHS)
    assert resumed.stats["pruned"] > 0
    loader.commit()
    assert resumed.stats == loader.stats


def test_a_checkpoint_goes_on_with_a_store_whose_header_was_damaged_as_the_error_says(tmp_path):
    path = tmp_path / "scores.zarr"
    loader = make("map", 44, path)
    for _, batch in loader:
        loader.update(loss_of(batch.index), batch)
    state = loader.state_dict()
    del loader
    header = path / "zarr.json"
    header.write_text(header.read_text().replace('"epoch": 0', '"epoch": 1'))
    for existing in ("error", "continue"):
        with pytest.raises(StoreError, match="existing='overwrite'; with a checkpoint, load_state_dict then"):
            make("map", 44, path, existing=existing)
    resumed = make("map", 44, path, existing="overwrite")
    resumed.load_state_dict(state)
    assert resumed.epoch == 1
    assert resumed.stats["pruned"] > 0


def test_what_can_be_told_of_the_run_is_as_before(tmp_path):
    loader = make("wds", write_wds(tmp_path / "shards"), tmp_path / "scores.zarr")
    for _ in range(2):
        for _, batch in loader:
            loader.update(loss_of(batch.index), batch)
            if loader.step == 3:
                break
    resumed = make("wds", tmp_path / "shards", tmp_path / "resumed.zarr")
    resumed.load_state_dict(loader.state_dict())
    assert resumed.stats == pytest.approx(loader.stats, nan_ok=True)
    assert (resumed.progress, len(resumed)) == (loader.progress, len(loader))
    assert torch.equal(resumed.peek()[0][1], loader.peek()[0][1])


def test_loading_replaces_what_the_store_had_and_the_lanes(tmp_path):
    loader = make("map", 44, tmp_path / "scores.zarr", canonical_nodes=4)
    iter(loader)
    state = loader.state_dict()
    for _, batch in loader:
        loader.update(loss_of(batch.index) * 9, batch)
    loader.load_state_dict(state)  # into the loader that went on
    fresh = make("map", 44, tmp_path / "fresh.zarr", canonical_nodes=4)
    other = make("map", 44, tmp_path / "other.zarr", canonical_nodes=1)
    other.load_state_dict(state)
    assert picks(train(loader)) == picks(train(fresh)) == picks(train(other))


def test_a_state_holds_plain_values_and_eight_bytes_a_sample(tmp_path):
    state = make("map", 5000, tmp_path / "scores.zarr").state_dict()
    torch.save(state, tmp_path / "state.pt")
    assert 40_000 <= (tmp_path / "state.pt").stat().st_size < 50_000
    loader = make("map", 5000, tmp_path / "again.zarr")
    loader.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert loader.epoch == 0
