"""A few thousand damaged inputs for each parser; ``python -m tests.fuzz`` runs millions."""

import pytest
from fuzz.run import fuzz, inputs, memory_below, watched
from fuzz.seeds import HOSTILE, SEEDS
from fuzz.targets import TARGETS, folder, good_store
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from infobatch_stream.formats.tar_grouping import split_name
from infobatch_stream.store.score_store import ScoreStore


@pytest.mark.parametrize(
    ("target", "runs"), [("headers", 6000), ("tar", 2500), ("npz", 2500), ("store", 1000), ("history", 250)]
)
def test_damaged_files_are_refused_as_documented_in_bounded_time_and_memory(target, runs):
    with watched():
        assert fuzz(target, runs, seed=0).runs == runs


@pytest.mark.parametrize("target", TARGETS)
def test_the_inputs_are_the_same_for_the_same_seed_and_most_are_new(target):
    assert list(inputs(target, 200, 1)) == (some := list(inputs(target, 200, 1)))
    assert some != list(inputs(target, 200, 2))
    assert len(set(some)) > 150


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("number", range(4))
def test_undamaged_files_reach_the_end_of_the_parser(target, number):
    """Or the fuzzer would only try what is refused at once."""
    TARGETS[target](SEEDS[target]()[number])
    if target == "store":
        path, _ = good_store()
        assert ScoreStore.open(path, mode="r").scores.tolist() == [0, 1, 2, 3, 4]
    assert folder().is_dir()


@pytest.mark.parametrize("target", ["headers", "tar"])
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tar_takes_no_more_memory_than_a_few_times_its_size(target, case):
    TARGETS[target](HOSTILE[case])  # what is imported or cached is no memory of the tar's
    with memory_below(2**20 + 8 * len(HOSTILE[case])):
        TARGETS[target](HOSTILE[case])


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.text(st.sampled_from("ab./\n_"), max_size=14))
def test_a_name_is_split_as_webdataset_splits_it(name):
    assert split_name(name) == base_plus_ext(name)
