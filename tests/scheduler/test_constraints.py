"""Constrained requests: every token is allowed, and they go in the same steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler.traffic import (
    ALLOWED,
    DEAD_END,
    MASKS,
    STATES,
    VOCAB,
    Automaton,
    CheckedRunner,
    make_engine,
    make_limits,
    request,
    run,
    script_drafting,
)

from glmjax.errors import InvalidRequestError
from glmjax.types import FinishReason


@dataclass
class Anything(Automaton):
    """Allows all, so that the runner's drafts are right as often as without a constraint."""

    ends, over = True, False

    def masks(self, drafts: Sequence[int]) -> np.ndarray:
        return np.full((len(drafts) + 1, 1), (1 << VOCAB) - 1, np.uint32)

    def advance(self, tokens) -> None:
        pass


def test_the_tests_automaton_keeps_its_own_rules():
    for state in range(STATES):
        bits = [t for t in range(VOCAB) if MASKS[state][0] >> t & 1]
        assert bits == np.flatnonzero(ALLOWED[state]).tolist()
    automaton = Automaton(2, left=3)
    good = int(np.flatnonzero(ALLOWED[2])[0])
    bad = int(np.flatnonzero(~ALLOWED[2])[0])
    assert len(automaton.masks([good])) == 2
    assert len(automaton.masks([bad, good])) == 1
    assert automaton == Automaton(2, left=3)
    with pytest.raises(InvalidRequestError, match="not allowed"):
        automaton.advance([bad])


@settings(max_examples=80)
@given(
    states=st.lists(st.none() | st.integers(0, STATES - 1), min_size=1, max_size=8),
    slots=st.integers(1, 4),
    pages=st.integers(11, 20),
    drafts=st.sampled_from([0, 1, 3]),
    chunk=st.sampled_from([3, 8]),
)
def test_every_token_is_allowed(states, slots, pages, drafts, chunk):
    limits = make_limits(slots=slots, pages=pages, drafts=drafts, chunk=chunk)
    sent = [
        request(
            str(i),
            [i] * (1 + 2 * i),
            12,
            constraint=None if state is None else Automaton(state),
            seed=i,
        )
        for i, state in enumerate(states)
    ]
    collected = run(make_engine(limits, eos=()), *sent)
    for i, state in enumerate(states):
        if state is not None:
            Automaton(state).advance(collected.tokens[str(i)])  # raises where one is not
        assert collected.reasons[str(i)] is FinishReason.LENGTH


def decode_rows(runner: CheckedRunner) -> list[tuple[int, int]]:
    """Constrained and other decode rows of each step."""
    masked = [[row.masks is not None for row in plan.groups[0].decode] for plan in runner.plans]
    return [(sum(rows), len(rows) - sum(rows)) for rows in masked]


@pytest.mark.parametrize("apart", range(1, 8))
@pytest.mark.parametrize("drafts", [0, 3])
def test_they_go_in_the_same_steps_and_others_in_every_step(apart, drafts):
    limits = make_limits(slots=3, pages=60, max_seq_len=80, drafts=drafts)
    runner = CheckedRunner(limits)
    engine = make_engine(limits, runner, eos=())
    script_drafting(engine, lambda: False)
    engine.add(request("free", 3, 60))
    engine.add(request("one", (5, 5), 20, constraint=Automaton(1)))
    for _ in range(apart):
        engine.step()
    engine.add(request("other", (6, 6), 20, constraint=Automaton(2)))
    run(engine)
    steps = decode_rows(runner)
    both = [i for i, (constrained, _) in enumerate(steps) if constrained == 2]
    together = steps[both[0] : both[-1] + 1]
    assert len(both) >= 12
    assert {constrained for constrained, _ in together} == {0, 2}, "never one of them"
    assert all(free == 1 for _, free in together)
    assert len(together) <= 2 * len(both), "every other step"


@pytest.mark.parametrize("n", [1, 3])
def test_alone_they_are_not_slowed_down(n):
    """No step is empty, and none is waited for twice."""
    limits = make_limits(slots=3, pages=60, max_seq_len=80, chunk=128)
    runner = CheckedRunner(limits)
    engine = make_engine(limits, runner, eos=())
    sent = [request(str(i), (i,), 20, constraint=Automaton(i)) for i in range(n)]
    run(engine, *sent)
    assert [constrained for constrained, _ in decode_rows(runner)] == [0] + [n] * 19


def test_right_drafts_are_accepted_under_a_constraint():
    limits = make_limits(slots=2, pages=60, max_seq_len=100, drafts=3)
    runner = CheckedRunner(limits, draft_errors=0)
    engine = make_engine(limits, runner, eos=())
    script_drafting(engine, lambda: True)
    sent = [request("a", 3, 80, constraint=Anything()), request("b", 4, 80, constraint=Anything())]
    collected = run(engine, *sent)
    assert runner.launched <= 80 // 4 + 4
    assert collected.last["a"].accepted_tokens >= 55


@pytest.mark.parametrize("left", range(6))
@pytest.mark.parametrize("drafts", [0, 3])
def test_a_dead_end_fails_its_request_alone(left, drafts):
    limits = make_limits(slots=3, pages=30, drafts=drafts)
    engine = make_engine(limits, eos=())
    sent = [
        request("dead", (4, 4, 4), 12, constraint=Automaton(1, left)),
        request("constrained", (5, 5, 5), 12, constraint=Automaton(1)),
        request("free", 3, 12),
    ]
    collected = run(engine, *sent)
    assert collected.last["dead"].error == DEAD_END
    assert len(collected.tokens["dead"]) == left
    assert collected.reasons["free"] is collected.reasons["constrained"] is FinishReason.LENGTH
    assert engine.counters().failed_requests == 1


@dataclass
class Stubborn(Anything):
    """Allows a token, and then will not have it; or breaks as it is asked."""

    ends, over = True, False

    breaks: str = ""

    def masks(self, drafts: Sequence[int]) -> np.ndarray:
        if self.breaks:
            raise ZeroDivisionError(self.breaks)
        return super().masks(drafts)

    def advance(self, tokens) -> None:
        raise InvalidRequestError("changed its mind")


@pytest.mark.parametrize(
    ("breaks", "error"),
    [("", "changed its mind"), ("oh", "its constraint failed: ZeroDivisionError: oh")],
)
def test_a_constraint_that_fails_fails_its_request_alone(breaks, error):
    engine = make_engine(make_limits(slots=2, pages=30), eos=())
    engine.add(request("odd", 2, 9, constraint=Stubborn(breaks=breaks)))
    collected = run(engine, request("free", 3, 9))
    assert collected.reasons["free"] is FinishReason.LENGTH
    last = collected.last["odd"]
    assert last.error == error
    assert last.completion_tokens == len(collected.tokens["odd"]) == 0


def test_an_end_token_ends_a_constrained_request_even_where_ends_are_ignored():
    """When a constraint is complete it allows nothing else."""
    engine = make_engine(make_limits(slots=2, pages=30), eos=range(VOCAB))
    collected = run(engine, request("a", 2, 9, constraint=Automaton()), request("b", 2, 9))
    assert collected.reasons == {"a": FinishReason.STOP, "b": FinishReason.LENGTH}
    assert len(collected.tokens["a"]) == 1
