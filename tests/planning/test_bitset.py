"""Bits with rank and select, against a list of booleans."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from infobatch_stream.planning.bitset import Bits, count_before, pack

quick = settings(deadline=None, max_examples=150, derandomize=True)
flags = st.integers(1, 2000).flatmap(lambda size: arrays(np.bool_, size, elements=st.booleans()))


def bits_of(flags, part=512):
    return Bits(flags.size, ((start, pack(flags[start : start + part])) for start in range(0, flags.size, part)))


@quick
@given(flags=flags)
def test_the_bits_before_each_place_are_counted(flags):
    places = np.arange(flags.size + 1)
    before, count = count_before(pack(flags), places)
    np.testing.assert_array_equal(before, np.concatenate([[0], np.cumsum(flags)]))
    assert count == np.count_nonzero(flags)


@quick
@given(flags=flags, part=st.sampled_from([512, 1024, 1 << 17]))
def test_every_set_bit_is_found_by_its_number_in_any_order(flags, part):
    bits = bits_of(flags, part)
    expected = np.flatnonzero(flags)
    assert bits.count == expected.size
    order = np.random.default_rng(0).permutation(expected.size)
    np.testing.assert_array_equal(bits.find(order), expected[order])


@pytest.mark.parametrize("share", [0.0005, 0.5, 1.0])
def test_sparse_and_full_bits_are_found(share):
    flags = np.random.default_rng(1).random(300_001) < share
    bits = bits_of(flags, 1 << 17)
    np.testing.assert_array_equal(bits.find(np.arange(bits.count)), np.flatnonzero(flags))
