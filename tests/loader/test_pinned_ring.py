"""Copies through pinned memory: all arrive whole and in order, however late, and few need anything anew."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.late_device import LateDevice

from infobatch_stream.pinned_ring import PinnedRing

SIZES = st.integers(1, 9)
ACTS = st.one_of(
    st.tuples(st.sampled_from(["to_device", "to_host"]), SIZES),
    st.tuples(st.just("work"), st.tuples(st.integers(0, 1), st.integers(1, 99))),
    st.tuples(st.just("stream"), st.integers(0, 1)),
    st.tuples(st.just("flush"), st.none()),
)


@given(st.lists(ACTS, max_size=400))
def test_what_is_copied_arrives_whole_and_in_order_however_late_the_device_is(acts):
    device = LateDevice()
    ring, sent, came, there = PinnedRing(device), [], [], []
    for number, (act, what) in enumerate(acts):
        if act == "to_host":
            sent.append([float(number)] * what)
            ring.to_host(torch.full((what,), float(number)), lambda copy: came.append(copy.tolist()))
        elif act == "to_device":
            values = torch.full((what,), float(number))
            there.append((number, ring.to_device(values, values)))
            values.fill_(-1)  # it is the caller's again
        elif act == "work":
            device.work(*what)
        elif act == "stream":
            device.now = what
        else:
            ring.flush()
            assert came == sent
        assert came == sent[: len(came)]
    ring.flush()
    assert came == sent
    for stream in (0, 1):
        device.work(stream, 10**6)
    for number, values in there:
        assert torch.all(values == number)


def steps(ring, device, count, pace):
    """Steps of 256 samples, before each of which the device does ``pace`` copies; -> how many steps' losses came."""
    came, found = [], []
    for step in range(count):
        device.work(0, pace if step > 1 else 0)  # it is a step behind at least
        ring.to_device(torch.ones(256), torch.ones(256))
        ring.to_host(torch.full((256,), float(step)), came.append)
        found.append(len(came))
    return found


def test_a_device_that_is_a_step_behind_costs_no_wait_two_allocations_and_an_event_for_16_steps():
    device = LateDevice()
    steps(PinnedRing(device), device, 1601, pace=2)
    assert device.calls == {"to_device": 1601, "to_host": 1601, "pinned": 2, "events": 100, "queries": 199}


def test_the_host_waits_for_a_device_that_lags_and_holds_at_most_four_blocks():
    device = LateDevice()
    found = steps(PinnedRing(device), device, 1600, pace=0)
    behind = np.arange(1, 1601) - found
    assert behind.max() == 64
    assert device.calls["pinned"] == 4
    assert device.calls["waits"] == 1600 // 16 - 4


def test_a_larger_batch_gets_larger_blocks_and_the_small_ones_go():
    device = LateDevice()
    ring = PinnedRing(device)
    for size in (4, 4, 400, 4, 400):
        ring.to_host(torch.ones(size), lambda copy: None)
        ring.flush()
    assert device.calls["pinned"] == 2


def test_an_error_of_who_uses_a_copy_leaves_the_others_to_the_next_call():
    ring, came = PinnedRing(LateDevice()), []

    def fail(copy):
        raise OSError("disk full")

    for use in (came.append, fail, came.append):
        ring.to_host(torch.ones(3), use)
    with pytest.raises(OSError, match="disk full"):
        ring.flush()
    ring.flush()
    assert len(came) == 2
