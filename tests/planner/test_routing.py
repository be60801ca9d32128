"""How many experts are touched, against enumeration and simulation."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmjax.planner.routing import busiest_load, mean_load


def enumerated(tokens: int, experts: int, chosen: int, devices: int) -> tuple[float, ...]:
    """Exact means of distinct experts, of the busiest device's, and of the busiest one's rows."""
    local, totals, cases = experts // devices, [0, 0, 0], 0
    choices = list(itertools.combinations(range(experts), chosen))
    for case in itertools.product(choices, repeat=tokens):
        picked = [expert for token in case for expert in token]
        totals[0] += len(set(picked))
        totals[1] += max(len({e for e in picked if e // local == d}) for d in range(devices))
        totals[2] += max(sum(e // local == d for e in picked) for d in range(devices))
        cases += 1
    return tuple(total / cases for total in totals)


def simulated(
    tokens: int, experts: int, chosen: int, devices: int, trials: int
) -> tuple[float, ...]:
    """Means of the busiest device's distinct experts, and of its rows."""
    draw, local, touched, rows = random.Random(tokens), experts // devices, 0, 0
    for _ in range(trials):
        picked = [e for _ in range(tokens) for e in draw.sample(range(experts), chosen)]
        touched += max(_counts((e // local for e in set(picked)), devices))
        rows += max(_counts((e // local for e in picked), devices))
    return touched / trials, rows / trials


def _counts(places, devices: int) -> list[int]:
    counts = [0] * devices
    for place in places:
        counts[place] += 1
    return counts


@pytest.mark.parametrize("sizes", [(1, 6, 2, 2), (2, 6, 2, 3), (3, 4, 1, 2), (2, 8, 3, 4)])
def test_small_routings_agree_with_all_their_cases(sizes):
    tokens, experts, chosen, _ = sizes
    distinct, busiest, rows = enumerated(*sizes)
    assert mean_load(tokens, experts, chosen) == pytest.approx((distinct, tokens * chosen))
    assert busiest_load(*sizes) == pytest.approx((busiest, rows), rel=0.05)


@pytest.mark.parametrize("experts", [128, 160])
@pytest.mark.parametrize(("tokens", "trials"), [(4, 3000), (8, 2000), (32, 600), (128, 200)])
@pytest.mark.parametrize("devices", [2, 8, 16])
def test_the_busiest_device_is_as_busy_as_in_simulations(experts, tokens, trials, devices):
    sizes = tokens, experts, 8, devices
    assert busiest_load(*sizes) == pytest.approx(simulated(*sizes, trials), rel=0.02)


def test_a_single_token_is_the_hardest_to_tell():
    assert busiest_load(1, 160, 8, 16) == pytest.approx(simulated(1, 160, 8, 16, 5000), rel=0.05)


@given(
    tokens=st.integers(1, 3000),
    local=st.integers(1, 20),
    devices=st.integers(1, 16),
    data=st.data(),
)
def test_the_busiest_has_its_share_and_no_more_than_there_is(tokens, local, devices, data):
    experts = local * devices
    chosen = data.draw(st.integers(1, experts))
    mean, most = mean_load(tokens, experts, chosen), busiest_load(tokens, experts, chosen, devices)
    near = 1 - 1e-9
    assert near * mean.experts / devices <= most.experts <= min(local, mean.experts) / near
    assert near * mean.rows / devices <= most.rows <= tokens * min(local, chosen) / near


@given(tokens=st.integers(1, 300), devices=st.sampled_from([1, 2, 4, 8, 16]))
def test_more_tokens_are_never_less_work(tokens, devices):
    fewer, more = (busiest_load(n, 160, 8, devices) for n in (tokens, tokens + 1))
    assert fewer.experts <= more.experts * (1 + 1e-9)
    assert fewer.rows < more.rows
