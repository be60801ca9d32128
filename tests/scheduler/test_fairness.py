"""Nobody waits for ever: bounds on being overtaken, on first tokens, and on pauses in between."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler.traffic import (
    CheckedRunner,
    Collected,
    Expected,
    check_accounting,
    make_engine,
    make_limits,
    request,
    run,
)

from glmjax.engine import Engine
from glmjax.scheduler.admission import PRIORITY_PLACES
from glmjax.types import FinishReason

CHUNK = 8


class Arrival(NamedTuple):
    """A request that comes `gap` steps after the one before it."""

    priority: int
    prompt: int
    new: int
    gap: int

    def cost(self) -> int:
        """Steps it takes at most while it is first: every other one is its own, its prompt moves
        on by half a chunk, and may be computed twice; pages are waited for now and then."""
        return 2 * (2 * -(-(self.prompt + self.new) // (CHUNK // 2)) + self.new) + 6


class Seen(NamedTuple):
    """Steps at which each request arrived, started and gave its first token; who ran on arrival."""

    arrived: list[int]
    started: dict[int, int]
    first_token: dict[int, int]
    running: list[set[int]]


def running(engine: Engine) -> set[int]:
    return {int(s.request.id) for g in engine._scheduler._groups for s in g.running}


def started(engine: Engine) -> set[int]:
    """Who has started, also if preempted since."""
    return {int(i) for i, s in engine._scheduler._alive.items() if s.counted}


def observe(engine: Engine, arrivals: list[Arrival]) -> Seen:
    seen = Seen([], {}, {}, [])
    now = 0

    def step() -> None:
        nonlocal now
        outputs = engine.step()
        check_accounting(engine._scheduler)
        now += 1
        ended = {int(o.request_id) for o in outputs}
        for i in started(engine) | ended:
            seen.started.setdefault(i, now)
        for output in outputs:
            seen.first_token.setdefault(int(output.request_id), now)

    for i, a in enumerate(arrivals):
        for _ in range(a.gap):
            step()
        prompt = [1 + i % 20, *range(a.prompt - 1)]
        engine.add(request(str(i), prompt, a.new, priority=a.priority))
        seen.arrived.append(now)
        seen.running.append(running(engine))
    while engine.has_work():
        assert now < 20_000
        step()
    return seen


def place(index: int, arrival: Arrival) -> int:
    return index - PRIORITY_PLACES * arrival.priority


arrivals = st.builds(
    Arrival,
    priority=st.sampled_from([0, 1, -1, 2, -2, 3, -3]),
    prompt=st.integers(1, 16),
    new=st.integers(1, 6),
    gap=st.sampled_from([0, 0, 1, 3]),
)


@settings(max_examples=80)
@given(
    start=st.lists(arrivals, min_size=1, max_size=40),
    crowd=st.lists(arrivals, max_size=5),
    copies=st.integers(0, 30),
    slots=st.integers(1, 4),
    groups=st.integers(1, 2),
)
def test_who_overtakes_whom_is_bounded_by_priority(start, crowd, copies, slots, groups):
    """A later request starts before an earlier one only for its priority, 64 places a level."""
    everyone = start + crowd * copies
    limits = make_limits(groups, slots, pages=12, page_size=4, chunk=CHUNK)
    seen = observe(make_engine(limits, prefix_cache=False), everyone)
    assert len(seen.started) == len(everyone)
    for i, early in enumerate(everyone):
        overtaking = [j for j in range(i + 1, len(everyone)) if seen.started[j] < seen.started[i]]
        assert all(place(j, everyone[j]) < place(i, early) for j in overtaking)
        assert len(overtaking) <= PRIORITY_PLACES * (3 - early.priority)


def test_a_level_of_priority_is_worth_64_places_and_no_more():
    engine = make_engine(make_limits(slots=1), max_queued_requests=200)
    sent = [request(str(i), 2, 1, priority=int(i > 0)) for i in range(100)]
    assert list(run(engine, *sent).last).index("0") == PRIORITY_PLACES - 1 == 63


@settings(max_examples=150)
@given(
    everyone=st.lists(arrivals, min_size=1, max_size=25),
    slots=st.integers(1, 4),
    drafts=st.sampled_from([0, 3]),
    prefix_cache=st.booleans(),
)
def test_every_first_token_comes_after_no_more_than_the_work_before_it(
    everyone, slots, drafts, prefix_cache
):
    limits = make_limits(1, slots, pages=12, page_size=4, chunk=CHUNK, drafts=drafts)
    seen = observe(make_engine(limits, prefix_cache=prefix_cache), everyone)
    for i, mine in enumerate(everyone):
        before = [
            other.cost()
            for j, other in enumerate(everyone)
            if j != i and (place(j, other) < place(i, mine) or j in seen.running[i])
        ]
        assert seen.first_token[i] - seen.arrived[i] <= sum(before) + mine.cost()


@pytest.mark.parametrize(("slots", "mixed"), [(2, True), (200, False)])
@pytest.mark.parametrize("drafts", [0, 3])
def test_decode_goes_on_while_a_long_prompt_is_computed(slots, mixed, drafts):
    """In one step with the prompt's chunks, or taking turns with them where that costs less."""
    limits = make_limits(slots=slots, pages=400, max_seq_len=600, chunk=CHUNK, drafts=drafts)
    runner = CheckedRunner(limits)
    engine = make_engine(limits, runner)
    engine.add(request("short", 1, 400))
    for _ in range(4):
        engine.step()
    engine.add(request("long", [7] * 160, 1))
    steps, since, gap = 0, 0, 0
    while "long" in engine._scheduler._alive:
        outputs = {o.request_id for o in engine.step()}
        steps += 1
        since = 0 if "short" in outputs else since + 1
        gap = max(gap, since)
    shared = [p for p in runner.plans if p.groups[0].decode and p.groups[0].chunks]
    assert bool(shared) == mixed
    assert gap <= 1
    assert steps <= (1 if mixed else 2) * 160 // CHUNK + 3


def test_short_prompts_do_not_wait_for_a_long_one():
    limits = make_limits(slots=8, pages=400, max_seq_len=800, chunk=128)
    engine = make_engine(limits)
    engine.add(request("long", [7] * 700, 1))
    engine.step()
    for i in range(4):
        engine.add(request(str(i), [i] * 4, 2))
    first_tokens = [o.request_id for _ in range(4) for o in engine.step()]
    assert set(first_tokens) == {"0", "1", "2", "3"}
    assert "long" in engine._scheduler._alive


def test_a_long_prompt_does_not_wait_for_a_stream_of_short_ones():
    limits = make_limits(slots=8, pages=400, max_seq_len=800, chunk=32)
    engine = make_engine(limits)
    engine.add(request("long", [7] * 600, 1))
    for i in range(600 // 16 + 4):
        engine.add(request(str(i), [i % 20] * 30, 1))
        engine.step()
    assert "long" not in engine._scheduler._alive


def test_a_higher_priority_takes_a_slot_at_once_and_its_owner_ends_right():
    engine = make_engine(make_limits(slots=1, pages=30))
    low, high = request("low", 3, 30), request("high", (9, 9), 5, priority=1)
    collected = Collected({r.id: Expected(r) for r in (low, high)})
    engine.add(low)
    for _ in range(6):
        collected.take(engine.step())
    engine.add(high)
    waited = 0
    while "high" not in collected.tokens:
        collected.take(engine.step())
        waited += 1
    assert waited <= 4
    while engine.has_work():
        collected.take(engine.step())
    assert list(collected.last) == ["high", "low"]
    assert set(collected.reasons.values()) == {FinishReason.LENGTH}
    assert engine.counters().preemptions == 1


def test_an_equal_priority_waits_for_a_slot():
    engine = make_engine(make_limits(slots=1, pages=30))
    collected = run(engine, *(request(str(i), 3, 9, priority=2) for i in range(3)))
    assert list(collected.last) == ["0", "1", "2"]
    assert engine.counters().preemptions == 0


@settings(max_examples=150)
@given(everyone=st.lists(arrivals, max_size=30), slots=st.integers(1, 3), cache=st.booleans())
def test_priorities_do_not_push_each_other_out_for_ever(everyone, slots, cache):
    """Where pages are plenty, a request takes one other's slot at most."""
    limits = make_limits(1, slots, pages=100, page_size=4, chunk=CHUNK)
    engine = make_engine(limits, prefix_cache=cache)
    observe(engine, everyone)
    raised = sum(a.priority > -3 for a in everyone)
    assert engine.counters().preemptions <= raised


def test_a_slot_is_not_taken_for_a_request_that_waits_for_a_prefix():
    """It would not start before the prefix is there; the one pushed out would, again and again."""
    limits = make_limits(slots=2, pages=300, max_seq_len=600, chunk=CHUNK)
    engine = make_engine(limits)
    shared = [7] * 400
    engine.add(request("prefix", shared, 4, priority=2))
    engine.add(request("low", 3, 100))
    for _ in range(6):
        engine.step()
    engine.add(request("high", [*shared, 1], 4, priority=1))
    while engine.has_work():
        engine.step()
    assert engine.counters().preemptions <= 1


@given(steps=st.integers(0, 20), gone=st.sets(st.integers(0, 14)))
def test_who_came_first_is_served_first_whoever_gives_up(steps, gone):
    engine = make_engine(make_limits(slots=1))
    collected = Collected()
    for i in range(15):
        engine.add(request(str(i), 3, 2))
    for _ in range(steps):
        collected.take(engine.step())
    for i in gone:
        engine.abort(str(i))
    while engine.has_work():
        collected.take(engine.step())
    ended = [int(r) for r, why in collected.reasons.items() if why is not FinishReason.ABORT]
    assert ended == sorted(ended)
