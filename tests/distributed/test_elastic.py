"""A run that was saved on four ranks of two nodes goes on exactly on other numbers of them; or is refused, with why."""

import json

import pytest
from support.ddp import elastic
from support.ddp.launch import start

pytestmark = pytest.mark.ddp
OTHERS = 8  # step of which the state is tried in the default suite, except on two ranks of one node: it takes time
# What the error says, where that is more than that the state is incomplete or damaged.
REASONS = {
    "global batch": "global_batch=24, this loader has global_batch=8",
    "seed": "seed=3, this loader has seed=4",
    "policy": "policy='SoftPruning(ratio=0.5)', this loader has policy='FullData()'",
    "delta": "delta=0.75, this loader has delta=0.5",
    "shuffle": "shuffle=True, this loader has shuffle=False",
    "shuffle_window": "shuffle_window=16, this loader has shuffle_window=17",
    "drop_last": "drop_last=False, this loader has drop_last=True",
    "constant_steps": "constant_steps=False, this loader has constant_steps=True",
    "another size": f"num_samples={elastic.N}, this loader has num_samples={elastic.N + 4}",
    "another dataset": "this loader has fingerprint='wds:",
    "newer format": "the state has format 5; this version of infobatch-stream reads formats 2 to 4",
    "older format": "the state has format 1; this version of infobatch-stream reads formats 2 to 4",
    "no format": "not a loader state",
    "step beyond the epoch": "step 99 of epoch 1",
    "lanes that do not divide": "5 lanes do not divide the global batch of 24",
    "no scores": "state_dict() of rank 0",
    "too few scores": f"{elastic.N - 1} scores, {elastic.N} are needed",
}


def check_goes_on(tmp_path, case, every, seconds):
    start("elastic.py", case, tmp_path, every, seconds=seconds)
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["wrong"] == []
    states = facts["states"]
    assert states > 4 * elastic.EPOCHS
    assert facts["tried"] == {"1x2": states, **dict.fromkeys(["2x1", "1x1", "1x3", "2x4"], -(-states // every))}
    first, second, *_, last = facts["pruned"]
    assert first == last < second  # the last epoch anneals


@pytest.mark.parametrize("case", ["map", "wds", "wds, constant steps"])
def test_the_picks_and_scores_are_the_same_on_other_ranks(tmp_path, case):
    check_goes_on(tmp_path, case, OTHERS, seconds=180)


@pytest.mark.slow(short="test_the_picks_and_scores_are_the_same_on_other_ranks")
@pytest.mark.parametrize("case", elastic.CASES)
def test_from_before_every_step_they_are_the_same_on_all_world_sizes(tmp_path, case):
    check_goes_on(tmp_path, case, 1, seconds=900)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What each of the four ranks found."""
    out = tmp_path_factory.mktemp("refusals")
    start("elastic.py", "refusals", out, seconds=120)
    return [json.loads((out / f"refusals-{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("case", [*elastic.OPTIONS, *elastic.STATES])
def test_a_state_that_does_not_belong_to_the_run_is_refused_on_every_rank_and_changes_nothing(loaded, case):
    found = [rank[case] for rank in loaded]
    assert found[0][0] == "ConfigError"
    for kind, text, epoch, unchanged in found:
        assert kind in ("ConfigError", "OutOfStepError")  # of what only rank 0 can see, the others hear
        assert REASONS.get(case, "damaged") in text
        assert (epoch, unchanged) == (0, True)


def test_a_checkpoint_older_than_the_stores_puts_back_its_scores_on_every_node(loaded):
    for rank in loaded:
        assert rank["before"] == elastic.EPOCHS
        epoch, step, stored = rank["older"]
        assert epoch == stored == 1
        assert step > 0
        assert rank["loaded"] == loaded[0]["saved"]
