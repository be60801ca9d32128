"""Random traffic of all kinds equals one request at a time, on a runner that sees wrong pages."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler.random_traffic import RandomTraffic
from scheduler.traffic import make_limits


def shape(groups: int, slots: int, page_size: int, spare: int, chunk: int, drafts: int):
    """Pages for one of the longest sequences, and not many more."""
    pages = 40 // page_size + 1 + spare * slots // page_size
    return make_limits(groups, slots, pages, page_size, chunk=chunk, drafts=drafts)


shapes = st.builds(
    shape,
    groups=st.integers(1, 3),
    slots=st.integers(1, 5),
    page_size=st.sampled_from([4, 1]),
    spare=st.integers(0, 12),
    chunk=st.sampled_from([16, 8, 3]),
    drafts=st.sampled_from([0, 1, 3]),
)
QUIET = {"add": 30, "step": 60, "abort": 4}
MIXES = {
    "requests": QUIET,
    "switches": {**QUIET, "flush": 3, "pause": 3, "weights": 3},
    "failures": {**QUIET, "flush": 1, "failure": 3},
}


@pytest.mark.parametrize("mix", MIXES)
@settings(max_examples=130)
@given(limits=shapes, seed=st.integers(0, 2**32 - 1), actions=st.integers(1, 120))
def test_random_traffic_equals_one_request_at_a_time(mix, limits, seed, actions):
    traffic = RandomTraffic(random.Random(seed), limits, MIXES[mix])
    for _ in range(actions):
        traffic.act()
    traffic.finish()
