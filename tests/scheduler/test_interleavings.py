"""The scheduler's invariants in every small case: which drafts are right, who ends or goes when."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, product

import numpy as np
import pytest
from scheduler.traffic import (
    CheckedRunner,
    Collected,
    Expected,
    check_accounting,
    check_idle,
    make_engine,
    make_limits,
    request,
    script_drafting,
)

from glmjax.engine import Engine
from glmjax.scheduler.sequence import State
from glmjax.types import FinishReason, Request

PROMPT, NEW = 2, 6


class ScriptedDrafts(CheckedRunner):
    """The draft of output token i is right where bit i of `right` is set; slots shift the bits."""

    right = 0

    def _draft(self, g: int, slot: int, end: int, last: int) -> list[int]:
        super()._draft(g, slot, end, last)  # counts stale ones
        needed = min(end + self.limits.num_drafts, PROMPT + NEW)
        assert needed <= self._pages[g, slot] * self.limits.page_size, "no pages for the drafts"
        context = np.append(self._seen(self._pool, g, slot, end), last).astype(np.int32)
        for i in range(self.limits.num_drafts):
            place = (end + 1 + i - PROMPT + slot) % NEW
            wrong = not self.right >> place & 1
            token = (self._sample(g, slot, context, None) + wrong) % self.limits.vocab_size
            context = np.append(context, token).astype(np.int32)
        return context[-self.limits.num_drafts :].tolist()


def start(right: int, drafting: tuple[bool, ...], **shape) -> Engine:
    limits = make_limits(max_seq_len=PROMPT + NEW, chunk=4, **shape)
    runner = ScriptedDrafts(limits, record=False)
    runner.right = right
    engine = make_engine(limits, runner)
    choices = cycle(drafting)
    script_drafting(engine, lambda: next(choices))
    return engine


def play(engine: Engine, requests: list[Request], event: str | None, moment: int) -> Collected:
    """Run to the end; `event` happens after `moment` steps, with one of them in flight."""
    collected = Collected({r.id: Expected(r) for r in requests})
    for r in requests:
        engine.add(r)
    for step in range(200):
        if step == moment and event:
            EVENTS[event](engine)
            check_accounting(engine._scheduler)
        if not engine.has_work():
            break
        collected.take(engine.step())
        check_accounting(engine._scheduler)
    check_idle(engine)
    assert engine._runner.stale_drafts == 0
    assert len(collected.last) == len(requests)
    for id, output in collected.last.items():
        assert output.error is None
        assert output.finish_reason is not FinishReason.ABORT or event in ("abort", "abort last")
        assert output.finish_reason is not FinishReason.ABORT or id in ("0", requests[-1].id)
    return collected


def preempt(engine: Engine, which: int) -> None:
    [group] = engine._scheduler._groups
    running = [s for s in group.running if s.state is State.RUNNING]
    if running:
        group.preempt(running[which])


def retract(engine: Engine) -> None:
    engine.retract()
    engine.resume()


def abort_last(engine: Engine) -> None:
    alive = list(engine._scheduler._alive)
    if alive:
        engine.abort(alive[-1])


EVENTS = {
    "abort": lambda engine: engine.abort("0"),
    "abort last": abort_last,
    "preempt": lambda engine: preempt(engine, 0),
    "preempt last": lambda engine: preempt(engine, -1),
    "retract": retract,
    "flush": lambda engine: engine.flush_cache(),
}
PATTERNS = range(2**NEW)
DRAFTING = [(True,), (True, False), (False, True, True)]


@pytest.mark.parametrize("drafting", DRAFTING)
@pytest.mark.parametrize(("page_size", "drafts"), [(1, 3), (2, 3), (4, 1)])
def test_a_stop_at_every_place_of_every_chain(page_size, drafts, drafting):
    """One sequence on its least pages: every pattern of right drafts, every stop."""
    pages = -(-(PROMPT + NEW) // page_size) + 1
    output = Expected(request("0", PROMPT, NEW)).run().output
    for right, stop in product(PATTERNS, [None, *range(NEW)]):
        engine = start(right, drafting, slots=1, pages=pages, page_size=page_size, drafts=drafts)
        stops = [] if stop is None else [output[stop]]
        collected = play(engine, [request("0", PROMPT, NEW, stop_token_ids=stops)], None, 0)
        assert collected.last["0"].finish_reason is not FinishReason.ABORT


@pytest.mark.parametrize("event", ["abort", "preempt", "retract", "flush"])
def test_every_event_at_every_moment_of_every_chain(event):
    for right, moment, page_size in product(PATTERNS, range(8), [1, 2]):
        pages = -(-(PROMPT + NEW) // page_size) + 1
        engine = start(right, (True,), slots=1, pages=pages, page_size=page_size, drafts=3)
        play(engine, [request("0", PROMPT, NEW)], event, moment)


def crowds() -> Iterator[tuple[int, int, int, int]]:
    """Sequences, pages (page size 2), drafts, pattern."""
    return product([2, 3], [5, 6, 8], [1, 3], range(0, 2**NEW, 5))


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_at_every_moment_of_a_crowd_with_few_pages(event):
    """Two or three sequences that begin alike: pages run out, and the later ones give theirs."""
    preemptions = 0
    for (n, pages, drafts, right), moment in product(crowds(), range(1, 11, 2)):
        engine = start(right, (True,), slots=n, pages=pages, page_size=2, drafts=drafts)
        requests = [request(str(i), (1, *[2 + i] * (i + 1)), 6 - i) for i in range(n)]
        play(engine, requests, event, moment)
        preemptions += engine.counters().preemptions
    assert preemptions > 300


def test_all_accept_lengths_occur():
    """Otherwise the patterns above would prove little."""
    seen: set[tuple[int, int]] = set()
    for right in PATTERNS:
        engine = start(right, (True,), slots=1, pages=9, page_size=1, drafts=3)
        engine.add(request("0", PROMPT, NEW))
        before = (0, 0)
        while engine.has_work():
            for output in engine.step():
                after = output.drafted_tokens, output.accepted_tokens
                seen.add((after[0] - before[0], after[1] - before[1]))
                before = after
    assert seen >= {(drafted, n) for drafted in range(1, 4) for n in range(drafted + 1)}
