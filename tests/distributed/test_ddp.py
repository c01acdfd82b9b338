"""Several real processes, with gloo."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.ddp.alone import CALLS, call_alone
from support.ddp.cases import MDS_MODES, RULES, RUN, WDS_MODES, N, mds, plain, train, train_model
from support.ddp.checks import check_run
from support.ddp.children import Child
from support.ddp.data import loss_of, wds, write_mds, write_wds
from support.ddp.launch import environment, torchrun

from infobatch_stream import InfoBatchLoader
from infobatch_stream.store.history import epochs, training

pytestmark = pytest.mark.ddp


def ranks_of(out, *cases, **options):
    """By case, what each rank found."""
    torchrun("cases.py", out, *cases, **options)
    files = sorted(out.glob("[0-9].pt"))
    found = [torch.load(file, weights_only=False) for file in files]
    return {case: [rank[case] for rank in found] for case in cases}


# ---- whole runs


@pytest.fixture(scope="module")
def by_wds(tmp_path_factory):
    out = tmp_path_factory.mktemp("wds")
    write_wds(out / "wds")
    found = ranks_of(out, "wds")["wds"]
    alone = InfoBatchLoader(wds(out / "wds"), out / "alone.zarr", **{**RUN, "batch_size": 8})
    return found, train(alone), out


@pytest.fixture(scope="module")
def by_mds(tmp_path_factory):
    from streaming.base.util import clean_stale_shared_memory

    out = tmp_path_factory.mktemp("mds")
    write_mds(out / "mds")
    write_mds(out / "lost")
    (out / "lost" / "shard.00001.mds").unlink()
    clean_stale_shared_memory()
    found = ranks_of(out, "mds", "failed_download", seconds=120)
    alone = train(InfoBatchLoader(mds(out, "alone"), out / "alone.zarr", **{**RUN, "batch_size": 8}))
    clean_stale_shared_memory()
    return found["mds"], alone, found["failed_download"]


@pytest.mark.parametrize("mode", WDS_MODES)
def test_wds_ranks_share_one_plan_and_record_all_of_it(by_wds, mode):
    ranks, alone, _ = by_wds
    check_run([rank[mode] for rank in ranks], alone)


@pytest.mark.parametrize("mode", MDS_MODES)
def test_mds_ranks_share_one_plan_and_record_all_of_it(by_mds, mode):
    ranks, alone, _ = by_mds
    check_run([rank[mode] for rank in ranks], alone)


def test_two_ranks_keep_the_history_of_one_process(by_wds):
    stores = [by_wds[2] / name for name in ("wds.zarr", "alone.zarr")]
    for ours, alone in zip(*map(epochs, stores), strict=True):
        assert repr(replace(ours, seconds=0.0)) == repr(replace(alone, seconds=0.0))
    ours, alone = (training(store, 3) for store in stores)
    assert ours.times.tolist() == alone.times.tolist()
    assert ours.last.tolist() == alone.last.tolist()


@pytest.mark.parametrize("kind", ["wds", "mds"])
def test_workers_do_not_change_what_is_augmented(request, kind):
    ranks = request.getfixturevalue(f"by_{kind}")[0]
    for rank in ranks:
        noises = {
            mode: [step[3].tolist() for epoch in epochs for step in epoch["steps"]] for mode, epochs in rank.items()
        }
        assert all(noise == noises[kind] for noise in noises.values())


def test_a_failed_download_raises_soon_on_every_rank(by_mds):
    for kind, text, seconds in by_mds[2]:
        assert kind == "DataError"
        assert "shard.00001.mds" in text
        assert seconds < 15


# ---- the rules of epochs


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    return ranks_of(tmp_path_factory.mktemp("rules"), *RULES)


def check_errors(found, kind, *words):
    """On every rank the error ``kind``, with all of ``words``, within seconds."""
    for error, text, seconds in found:
        assert (error, text) == (kind, text)
        assert seconds < 10
        for word in words:
            assert word in text


def test_one_rank_may_peek(rules):
    for peeking, untouched in rules["peek_on_one"]:
        assert peeking == untouched


def test_after_a_break_on_all_ranks_iter_commits(rules):
    assert rules["break_on_both"] == [(1, 0, 16)] * 2


@pytest.mark.parametrize("case", ["break_earlier", "forgotten_update"])
def test_ranks_that_are_not_equally_far_all_raise_and_commit_nothing(rules, case):
    errors, *where = zip(*rules[case], strict=True)
    check_errors(errors, "OutOfStepError", "out of step", "rank 0 has", "rank 1 has", "step=")
    assert where == [(0, 0), (0, 0)]


def test_ranks_that_call_different_things_all_raise_and_may_go_on(rules):
    errors, steps = zip(*rules["another_call"], strict=True)
    check_errors(errors, "OutOfStepError", "state_dict()", "commit()")
    assert steps == (-(-N // 8),) * 2


@pytest.mark.parametrize("case", ["state_on_one", "state_on_the_other"])
def test_a_state_that_one_rank_alone_loads_raises_on_all(rules, case):
    check_errors(rules[case], "OutOfStepError", "load_state_dict()")


def test_different_states_raise_on_all(rules):
    check_errors(rules["different_states"], "OutOfStepError", "rank 0 has epoch=1", "rank 1 has epoch=0")


def test_a_state_that_lacks_the_scores_on_rank_0_raises_on_all_and_changes_nothing(rules):
    has, errors, exists = zip(*rules["state_without_scores"], strict=True)
    assert has == (True, False)
    assert exists == (False, False)
    assert [error for error, *_ in errors] == ["ConfigError", "OutOfStepError"]
    assert all("state_dict() of rank 0" in text for _, text, _ in errors)


@pytest.mark.parametrize(
    ("case", "found"),
    [
        ("batch_size", "global_batch=8"),
        ("seed", "seed=1"),
        ("include", "include="),
        ("epochs", "epochs=4"),
        ("delta", "delta=0.5"),
        ("different_datasets", "num_samples=44"),
    ],
)
def test_ranks_with_different_loaders_all_raise_and_make_no_store(rules, case, found):
    errors, exists = zip(*rules[case], strict=True)
    check_errors(errors, "OutOfStepError", found, "rank 1 has", "the same loader")
    assert exists == (False, False)


def test_ranks_that_change_to_different_samples_all_raise_and_may_go_on(rules):
    errors, epochs = zip(*rules["next_include"], strict=True)
    check_errors(errors, "OutOfStepError", "next include=", "rank 1 has")
    assert epochs == (2, 2)


def test_ranks_that_do_not_share_a_store_have_equal_ones(rules, tmp_path):
    check_run(rules["different_stores"], train(plain(tmp_path, "alone", batch_size=8)), N)


def test_a_store_with_epochs_raises_on_all(rules):
    (first, text, _), (second, other, _) = rules["existing_store"]
    assert (first, second) == ("StoreError", "OutOfStepError")
    assert "existing='continue'" in text
    assert "existing='continue'" in other


def test_a_commit_that_fails_on_one_rank_raises_on_all(rules):
    (first, epoch), (second, other) = rules["failing_commit"]
    assert (first[0], second[0]) == ("StoreError", "StoreError")
    assert "failing.zarr" in first[1]
    assert "failing.zarr" in second[1]
    assert (epoch, other) == (0, 0)


def test_an_error_leaves_the_with_block_on_one_rank_without_the_others(rules):
    for (error, text, seconds), pending in rules["error_in_the_block"]:
        assert (error, text) == ("KeyError", "'mine'")
        assert seconds < 5
        assert pending == N


def test_epochs_raised_on_one_rank_raise_on_all(rules):
    check_errors(rules["epochs_on_one"], "OutOfStepError", "rank 0 has epochs=100", "rank 1 has epochs=4")


# ---- a model


def test_a_model_under_ddp_is_that_of_one_process_with_the_same_global_batch(rules, tmp_path):
    (here, pruned), (there, _) = rules["trained_model"]
    alone, wanted = train_model(plain(tmp_path, "alone", batch_size=8))
    assert pruned == wanted > 0
    for one, other, whole in zip(here, there, alone, strict=True):
        assert torch.equal(one, other)
        assert torch.allclose(one, whole, rtol=1e-5)


def test_with_constant_steps_it_is_too_although_ranks_hold_other_numbers_of_samples(rules, tmp_path):
    (here, pruned), (there, _) = rules["trained_with_constant_steps"]
    alone, wanted = train_model(plain(tmp_path, "alone", batch_size=8, constant_steps=True))
    assert pruned == wanted > 0
    for one, other, whole in zip(here, there, alone, strict=True):
        assert torch.equal(one, other)
        assert torch.allclose(one, whole, rtol=1e-12)  # in double precision: nothing but the order of sums differs


# ---- processes and groups


def test_a_process_outside_its_group_is_told_so(rules):
    (inside, *_), (outside, text, _) = rules["outside_its_group"]
    assert (inside, outside) == ("nothing", "ConfigError")
    assert "process 1 is not in the process_group that was given to it" in text


def test_processes_without_a_process_group_are_refused(tmp_path):
    code = (
        "from infobatch_stream import InfoBatchLoader, ConfigError\n"
        "loader = InfoBatchLoader([1, 2, 3, 4], 'scores.zarr', batch_size=2, epochs=1)\n"
        "for use in (iter, len, InfoBatchLoader.peek, InfoBatchLoader.state_dict):\n"
        "    try:\n        use(loader)\n    except ConfigError as error:\n        print(error)\n"
    )
    env = {**environment(), "WORLD_SIZE": "2", "RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, capture_output=True, text=True
    )
    assert done.stdout.count("WORLD_SIZE is 2, but torch.distributed is not initialised") == 4
    assert "init_process_group" in done.stdout
    assert not list(tmp_path.iterdir())


def test_peers_get_equal_picks_and_one_of_them_records(tmp_path):
    found = ranks_of(tmp_path, "peers", processes=4)["peers"]
    epochs, recorded = zip(*found, strict=True)
    for one, peer in ((0, 1), (2, 3)):
        for here, there in zip(epochs[one], epochs[peer], strict=True):
            assert torch.equal(here["scores"], there["scores"])
            assert str(here["stats"]) == str(there["stats"])
            for k in range(4):
                assert all(torch.equal(a[k], b[k]) for a, b in zip(here["steps"], there["steps"], strict=True))
    assert [len(calls) > 0 for calls in recorded] == [True, False, True, False]
    last = torch.full((N,), torch.nan)
    for epoch in range(3):
        steps = [step for rank in (0, 2) for step in epochs[rank][epoch]["steps"]]
        index = torch.cat([index[recorded] for index, _, recorded, _ in steps])
        assert index.unique().numel() == index.numel() == epochs[0][epoch]["stats"]["kept"]
        last[index] = loss_of(index, epoch)
        assert torch.equal(epochs[0][epoch]["scores"], last)
    assert epochs[0][1]["stats"]["pruned"] > 0


# ---- calls that one rank makes alone


@pytest.fixture(scope="module")
def called_alone(tmp_path_factory):
    """By call: what each rank found."""
    pairs = {}
    try:
        for number, call in enumerate(CALLS):
            path = tmp_path_factory.mktemp(f"alone-{number}") / "scores.zarr"
            pairs[call] = [Child(call_alone, path, rank, call, 8) for rank in (0, 1)]
            pairs[call][1].tell(pairs[call][0].hears())
        return {call: [child.result() for child in pair] for call, pair in pairs.items()}
    finally:
        for pair in pairs.values():
            for child in pair:
                child.__exit__()


@pytest.mark.parametrize("call", CALLS)
def test_a_collective_call_that_one_rank_makes_alone_is_named_and_meets_no_collective_of_the_users(called_alone, call):
    ((kind, text, *_), gradient), (_, others) = called_alone[call]
    assert kind == "LostRanksError"
    assert text.startswith(f"{call} is collective: every rank must call it")
    assert gradient == others == [3.0] * 5
