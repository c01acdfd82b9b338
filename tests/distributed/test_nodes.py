"""Several nodes, each with a score store of its own: two networks on this machine, or two folders.

Both are started by torchrun, with two ranks each. On the networks the nodes give their stores the same path, which
leads to another file on each, as on real machines. Where these can be made, the folders are tried by ``-m slow`` only.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from support.ddp.cases import train
from support.ddp.checks import check_run
from support.ddp.data import loss_of, wds, write_wds
from support.ddp.launch import Torchrun
from support.ddp.network import network_is_possible, nodes_of
from support.ddp.nodes import BEGINS, CASES, EPOCHS, SCORES, SEEDS, STARTS, N, go_on, make

from infobatch_stream.store.history import epochs, training

pytestmark = pytest.mark.ddp


KINDS = [
    "namespaces",
    pytest.param("loopback", marks=[pytest.mark.slow] if network_is_possible() else []),  # less real, so instead
]


@pytest.fixture(scope="module", params=KINDS)
def launched(request, tmp_path_factory):
    """(by case what each of the four ranks found, the folder that they shared)."""
    out = tmp_path_factory.mktemp("nodes")
    write_wds(out / "wds")
    with nodes_of(request.param, out) as (nodes, _):
        for code, output in Torchrun(nodes, "nodes.py", out, *CASES).ended(seconds=180):
            assert code == 0, output
    found = [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(4)]
    return {case: [rank[case] for rank in found] for case in CASES}, out


@pytest.fixture
def ranks(launched):
    return launched[0]


def equal(found):
    """The one value that all of them are."""
    assert all(str(one) == str(found[0]) for one in found)
    return found[0]


# ---- whole runs


@pytest.mark.parametrize("case", ["map", "wds", "wds workers"])
def test_after_every_commit_all_stores_are_those_of_one_process(ranks, launched, tmp_path, case):
    found = ranks[case]
    data = wds(launched[1] / "wds") if "wds" in case else None
    check_run(found, train(make(tmp_path, "alone", data=data)), 48 if data else N)
    for ends in zip(*found, strict=True):
        files, stale = equal([epoch["note"] for epoch in ends])
        assert {"zarr.json", "scores/c/0", "pending/c/0"} <= files.keys()
        assert not stale


def test_all_nodes_have_the_history_of_the_run(launched):
    stores = sorted(launched[1].rglob("map.zarr"))
    assert len(stores) == 2
    assert len(epochs(stores[0])) == EPOCHS
    for one, other in zip(*map(epochs, stores), strict=True):
        assert repr(replace(one, seconds=0.0)) == repr(replace(other, seconds=0.0))
    assert len({training(store, EPOCHS).times.tobytes() for store in stores}) == 1


@pytest.mark.parametrize("size", [1, 3, 45])
def test_any_number_of_samples_is_split_among_the_ranks_of_a_node(ranks, tmp_path, size):
    found = [rank[size] for rank in ranks["sizes"]]
    alone = [epoch["scores"] for epoch in train(make(tmp_path, "alone", size))]
    for scores, _, _ in found:
        assert all(torch.equal(one, other) for one, other in zip(scores, alone, strict=True))
    for epoch in zip(*(notes for _, notes, _ in found), strict=True):
        equal(epoch)
    for here in (0, 2):  # the first rank of each node: one exchange an epoch, in pieces of 5
        sent = found[here][2], found[here + 1][2]
        assert sum(map(sum, sent)) == EPOCHS * size
        assert abs(sum(sent[0]) - sum(sent[1])) <= EPOCHS
        assert max(*sent[0], *sent[1]) <= 5
    assert max(Counter(found[0][2]).values(), default=0) >= (EPOCHS * 4 if size == 45 else 0)


# ---- states


def test_a_state_in_mid_epoch_has_the_losses_of_all_nodes(ranks):
    pending = ranks["state"][0]["pending"]
    seen = {
        i
        for rank in ranks["state"]
        for epoch, step, index, _ in rank["steps"]
        for i in index
        if epoch == 1 and step <= 2
    }
    assert set(torch.isfinite(pending).nonzero()[:, 0].tolist()) == seen
    assert len(seen) == 16
    assert [rank["pending"] for rank in ranks["state"][1:]] == [None] * 3


def test_a_state_resumes_exactly_on_all_nodes(ranks):
    for rank in ranks["state"]:
        rest = rank["steps"][-len(rank["again"][0]) :]
        assert rest[0][:2] == (1, 3)
        for again in (rank["again"], rank["elsewhere"]):
            assert again[0] == rest
            assert again[2] == rank["digests"][-1]
    loaded = equal([rank["again"][1] for rank in ranks["state"]])
    assert loaded == equal([rank["elsewhere"][1] for rank in ranks["state"]])
    assert loaded == equal([rank["digests"][0] for rank in ranks["state"]])  # as it was when it was saved
    equal([rank["digests"][-1] for rank in ranks["state"]])


def test_a_state_of_several_nodes_resumes_exactly_on_one_process(launched, tmp_path):
    by_case, out = launched
    state = torch.load(out / "state.pt", weights_only=True)
    steps, _, files = go_on(make(tmp_path, "alone"), state)
    parts = zip(*(rank["again"][0] for rank in by_case["state"]), strict=True)
    joined = [(*part[0][:2], *([x for one in part for x in one[k]] for k in (2, 3))) for part in parts]
    assert steps == joined
    assert files == by_case["state"][0]["digests"][-1]


# ---- stores that are not equally far


@pytest.mark.parametrize("start", STARTS)
def test_a_store_that_is_missing_or_behind_is_brought_up(ranks, start):
    epochs = [int(str(there).split()[0]) + ("apply" in str(there)) for there in STARTS[start] if there is not None]
    epoch, opened, rest = equal([rank[start] for rank in ranks["starts"]])
    assert epoch == max(epochs)  # on all ranks, as soon as the loader was made
    assert not opened[1]
    assert len(rest) == EPOCHS - epoch
    assert rest[-1] == equal([rank["whole"][-1] for rank in ranks["starts"]])


def test_stores_that_cannot_be_used_stop_all_ranks_and_stay(ranks):
    for case, kind, words in (
        ("epochs", "StoreError", ("already holds 2 epoch(s)", "existing='continue'")),
        ("no store", "StoreError", ("is not a score store",)),
    ):
        for rank, found in enumerate(ranks["refused"]):
            (error, text, seconds), untouched = found[case]
            assert error == (kind if rank == 2 else "OutOfStepError")
            assert all(word in text for word in words)
            assert seconds < 10
            assert untouched


# ---- stores that begin with scores


def test_scores_that_one_node_begins_with_are_brought_to_all_and_a_state_of_its_first_epoch_resumes_exactly(
    ranks, launched, tmp_path
):
    """On other stores, also on one process."""
    alone = make(tmp_path, "alone", initial_scores=SCORES, **BEGINS)
    for _, picks in alone:
        alone.update(loss_of(picks.index, 0), picks)
        if alone.step == 1:
            break
    whole = go_on(make(tmp_path, "rest", **BEGINS), alone.state_dict())
    assert 0 < alone.stats["pruned"] < N
    saved = torch.load(launched[1] / "seeded.pt", weights_only=True)
    assert go_on(make(tmp_path, "one process", **BEGINS), saved)[0] == whole[0]
    for name in SEEDS.keys() - {"different"}:
        assert {rank[name][1].source for rank in ranks["seeded"]} == {"a model"}
        found = [rank[name][0] for rank in ranks["seeded"]]
        parts = zip(*(steps for steps, *_ in found), strict=True)
        joined = [(*part[0][:2], *([x for one in part for x in one[k]] for k in (2, 3))) for part in parts]
        assert joined == whole[0]
        assert equal([files for *_, files in found])[0]["scores/c/0"] == whole[2][0]["scores/c/0"]


def test_nodes_that_would_begin_with_different_scores_stop_all_and_their_stores_stay(ranks):
    for (error, text, seconds), untouched in (rank["different"] for rank in ranks["seeded"]):
        assert error == "StoreError"
        assert "the ranks [0, 2] are on nodes whose stores" in text
        assert seconds < 10
        assert untouched
