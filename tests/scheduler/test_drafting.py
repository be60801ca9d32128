"""How many drafts are verified: measured acceptance against measured time."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler.traffic import CheckedRunner, make_engine, make_limits, request, run, script_drafting

from glmjax.plans import Bucket
from glmjax.scheduler.drafting import (
    EXPLORE_STEPS,
    LEAST_CHANCE,
    RETRY_STEPS,
    TRIAL_STEPS,
    Acceptance,
    Drafting,
)

RATES = st.lists(st.floats(0, 1), max_size=5)
DRAFTS, PLAIN = Bucket(8, 3, 0, 0), Bucket(8, 0, 0, 0)


@given(rates=RATES, updates=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=60))
def test_depth_and_gain_follow_from_the_rates(rates, updates):
    acceptance = Acceptance(rates)
    for drafted, accepted in updates:
        drafted = min(drafted, len(rates))
        before, accepted = list(acceptance.rates), min(accepted, drafted)
        acceptance.update(drafted, accepted)
        for place, (old, new) in enumerate(zip(before, acceptance.rates, strict=True)):
            assert 0.0 <= new <= 1.0
            if place < accepted:
                assert new >= old
            elif place == accepted < drafted:
                assert new <= old
            else:
                assert new == old, "nothing was learnt of this place"
    chances = [math.prod(acceptance.rates[: n + 1]) for n in range(len(rates))]
    worth = [c for c in chances if c >= LEAST_CHANCE]
    assert acceptance.depth == len(worth)
    assert acceptance.gain == pytest.approx(sum(worth))


def test_new_rates_are_its_own():
    overall = Acceptance([0.7, 0.7])
    Acceptance(overall.rates).update(2, 0)
    assert overall.rates == [0.7, 0.7]


def launch(acceptance: Acceptance) -> int:
    """Drafts that a step verifies, which is launched."""
    depth = acceptance.next_depth()
    assert acceptance.next_depth() == depth, "planning again is free"
    acceptance.launched(depth)
    return depth


def test_hopeless_drafts_are_given_up_and_tried_again():
    acceptance = Acceptance([0.7] * 3)
    while acceptance.depth:
        acceptance.update(acceptance.depth, 0)
    assert [launch(acceptance) for _ in range(2 * RETRY_STEPS)] == [
        3 * (step % RETRY_STEPS == RETRY_STEPS - 1) for step in range(2 * RETRY_STEPS)
    ]
    while not acceptance.depth:
        acceptance.update(1, 1)
    assert acceptance.next_depth() == acceptance.depth > 0


def test_a_place_that_was_given_up_is_found_again():
    """Only what is verified teaches: a bad stretch may not shorten the chain for good."""
    acceptance = Acceptance([0.9, 0.9, 0.9])
    for _ in range(60):
        acceptance.update(3, 2)
    assert acceptance.depth == 2
    for _ in range(30 * RETRY_STEPS):
        depth = launch(acceptance)
        acceptance.update(depth, depth)
    assert acceptance.depth == 3


def test_good_drafts_are_verified_to_the_last():
    acceptance = Acceptance([0.3] * 3)
    for _ in range(100):
        acceptance.update(3, 3)
    assert acceptance.depth == acceptance.next_depth() == 3
    assert acceptance.gain == pytest.approx(3.0, abs=0.01)


def test_without_drafting_there_is_nothing_to_verify():
    assert [Acceptance([]).next_depth() for _ in range(200)] == [0] * 200


def test_unmeasured_shapes_are_tried_first():
    drafting = Drafting(3)
    assert drafting.pays(0.0, DRAFTS, PLAIN)
    drafting.measured(DRAFTS, 1.0)
    for _ in range(TRIAL_STEPS - 1):
        assert drafting.pays(0.0, DRAFTS, PLAIN)
        assert drafting.trying
    assert not drafting.pays(9.0, DRAFTS, PLAIN)
    drafting.measured(PLAIN, 1.0)
    assert drafting.pays(0.1, DRAFTS, PLAIN)
    assert not drafting.trying


@given(st.floats(0, 5), st.floats(0.001, 10), st.floats(0.001, 10), st.lists(st.floats(0, 99)))
def test_the_faster_pays_whatever_single_steps_took(gain, drafts_s, plain_s, outliers):
    drafting = Drafting(3)
    for bucket, seconds in ((DRAFTS, drafts_s), (PLAIN, plain_s)):
        for outlier in outliers[:3]:
            drafting.measured(bucket, outlier)
        for _ in range(4):
            drafting.measured(bucket, seconds)
    assert drafting.pays(gain, DRAFTS, PLAIN) == ((1 + gain) / drafts_s > 1 / plain_s)


def test_the_slower_is_measured_again_after_a_while():
    drafting = Drafting(3)
    drafting.measured(DRAFTS, 5.0)
    tried = []
    for step in range(3 * EXPLORE_STEPS):
        answer = drafting.pays(1.0, DRAFTS, PLAIN)
        if answer:
            tried.append(step)
        drafting.measured(DRAFTS if answer else PLAIN, 5.0 if answer else 1.0)
    first, later = EXPLORE_STEPS - 1, 2 * EXPLORE_STEPS - 2 + TRIAL_STEPS
    trials = [*range(first, first + TRIAL_STEPS), *range(later, later + TRIAL_STEPS)]
    assert tried == trials, "now and then, and no more"
    for _ in range(8):
        drafting.measured(DRAFTS, 1.0)
    assert drafting.pays(1.0, DRAFTS, PLAIN), "the answer can change"


def test_counts_by_place():
    drafting = Drafting(3)
    drafting.record([3, 3], [4, 2])
    drafting.record([2, 0], [1, 1, 0, 0])
    assert (drafting.drafted, drafting.accepted) == ([3, 3, 2], [2, 1, 1])
    assert drafting.verifications == 3


def long_run(draft_errors: int, pays: bool = True):
    limits = make_limits(slots=1, pages=120, max_seq_len=440, drafts=3)
    runner = CheckedRunner(limits, draft_errors)
    engine = make_engine(limits, runner)
    script_drafting(engine, lambda: pays)
    collected = run(engine, request("a", 3, 400))
    return runner, engine.counters(), collected.last["a"]


def test_perfect_drafts_make_four_tokens_a_step():
    runner, counters, last = long_run(draft_errors=0)
    assert runner.launched <= 400 // 4 + 4
    assert last.accepted_tokens >= last.drafted_tokens - 3, "only those behind the end are lost"
    assert counters.drafted == pytest.approx([100] * 3, abs=4)


def test_hopeless_drafts_cost_next_to_nothing():
    runner, counters, last = long_run(draft_errors=8)
    assert last.accepted_tokens == sum(counters.accepted) == 0
    assert sum(counters.drafted) < 90
    assert runner.launched <= 400 + 4


def test_where_drafting_does_not_pay_no_step_drafts():
    runner, counters, _ = long_run(draft_errors=0, pays=False)
    assert all(plan.bucket.drafts == 0 for plan in runner.plans if not plan.bucket.chunk_tokens)
    # The first decode step behind a chunk could verify what that drafted; no later one can.
    assert sum(counters.drafted) == 0


def test_a_request_takes_over_what_those_before_it_learnt():
    limits = make_limits(slots=1, pages=120, max_seq_len=440, drafts=3)
    engine = make_engine(limits, CheckedRunner(limits, draft_errors=8))
    script_drafting(engine, lambda: True)
    run(engine, request("first", 3, 100))
    before = sum(engine.counters().drafted)
    run(engine, request("second", 4, 60))
    assert sum(engine.counters().drafted) - before <= 3  # tried once


def test_drafts_that_become_good_are_found_out():
    """What is not verified teaches nothing, so now and then all are."""
    limits = make_limits(slots=2, pages=2000, max_seq_len=4000, drafts=3)
    runner = CheckedRunner(limits, draft_errors=8)
    engine = make_engine(limits, runner, eos=())
    drafting = engine._scheduler._drafting
    measured = drafting.measured
    drafting.measured = lambda bucket, _: measured(bucket, 1.3 if bucket.drafts else 1.0)
    run(engine, *(request(f"bad {i}", 3, 300) for i in range(10)))
    before = engine.counters()
    runner._draft_errors = 0
    run(engine, request("good", 3, 3900))
    after = engine.counters()
    right = sum(after.accepted) - sum(before.accepted)
    assert right > 1000, "drafting is on again well before the end"
