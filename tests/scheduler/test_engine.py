"""The engine's loop: what overlaps, what switches do in the middle of traffic, what is told."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scheduler.traffic import (
    VOCAB,
    CheckedRunner,
    Collected,
    Expected,
    make_engine,
    make_limits,
    request,
    run,
)

from glmjax.errors import ConfigError, InvalidRequestError
from glmjax.runner.fake import FakeHandle, next_token
from glmjax.types import EngineLoad, FinishReason


class Watched(CheckedRunner):
    """Notes how many launched steps are unread whenever one is read.

    Attributes:
        interrupts: results that are interrupted before they come.
    """

    def __init__(self, limits, interrupts: int = 0):
        super().__init__(limits)
        self.unread, self.seen = 0, []
        self.interrupts = interrupts

    def launch(self, plan):
        self.unread += 1
        return Handle(super().launch(plan), self)


class Handle:
    def __init__(self, handle: FakeHandle, runner: Watched):
        self.handle, self.runner = handle, runner

    def result(self):
        runner = self.runner
        if runner.interrupts:
            runner.interrupts -= 1
            raise KeyboardInterrupt
        runner.seen.append(runner.unread)
        runner.unread -= 1
        return self.handle.result()


def test_no_step_waits_for_the_one_before():
    runner = Watched(make_limits())
    run(make_engine(runner.limits, runner), request("a", 3, 12))
    assert runner.seen == [2] * 11 + [1]


def test_an_interrupt_while_the_device_works_loses_nothing():
    runner = Watched(make_limits(), interrupts=1)
    engine, sent = make_engine(runner.limits, runner), request("a", 3, 12)
    engine.add(sent)
    assert engine.step() == []
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    collected = Collected({"a": Expected(sent)})
    while engine.has_work():
        collected.take(engine.step())
    assert len(collected.tokens["a"]) == 12


def test_a_stop_token_drops_the_token_sampled_after_it():
    stop = next_token(np.array([5]), 0, VOCAB)
    runner = CheckedRunner(make_limits())
    engine = make_engine(runner.limits, runner, eos=(stop,))
    engine.add(request("a", (5,), 9, ignore_eos=False))
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert [(o.token_ids, o.finish_reason, o.matched_stop) for o in outputs] == [
        ((stop,), FinishReason.STOP, stop)
    ]
    assert runner.launched == 2, "the overlapped step ran, and its token was dropped"


def test_an_aborted_prompt_is_computed_no_further():
    runner = CheckedRunner(make_limits(pages=200, max_seq_len=600))
    engine = make_engine(runner.limits, runner)
    engine.add(request("long", 512, 1))
    for _ in range(2):
        engine.step()
    engine.abort("long")
    before = runner.launched
    assert run(engine).reasons == {"long": FinishReason.ABORT}
    assert runner.launched == before


def test_other_weights_from_the_next_launch_on():
    engine, sent = make_engine(make_limits(pages=40)), request("a", 3, 6)
    expected, versions = Expected(sent), []
    params = {"default": 0, "1": 7, "mine": 9}
    engine.add(sent)
    assert engine.step() == []  # in flight: it samples the first token
    engine.update_params(7)
    outputs = engine.step() + engine.step()
    engine.update_params(9, "mine")
    assert engine.weight_version == "mine"
    while engine.has_work():
        outputs += engine.step()
    for output in outputs:
        expected.take(output, params[output.weight_version])
        versions.append(output.weight_version)
    assert versions == ["default", "1", "1", "mine", "mine", "mine"]
    with pytest.raises(ConfigError, match="params are str"):
        engine.update_params("b", "bad")
    assert engine.weight_version == "mine"
    # nothing of the old weights is found, nor of the request that was there when they changed
    for cached in (0, 20):
        engine.add(request("again", (*sent.prompt_ids, *expected.output, *range(12)), 1))
        [last] = [o for _ in range(9) for o in engine.step()]
        assert (last.cached_tokens, last.weight_version) == (cached, "mine")


@pytest.mark.parametrize(("drafts", "moment"), list(product([0, 3], range(8))))
def test_a_paused_engine_reads_what_was_launched_and_launches_nothing(drafts, moment):
    runner = CheckedRunner(make_limits(drafts=drafts))
    engine, sent = make_engine(runner.limits, runner), [request("a", 3, 9), request("b", 11, 9)]
    collected = Collected({r.id: Expected(r) for r in sent})
    engine.add(sent[0])
    for _ in range(moment):
        collected.take(engine.step())
    engine.pause()
    assert engine.paused
    launched = runner.launched
    engine.add(sent[1])
    for _ in range(4):
        collected.take(engine.step())
    assert runner.launched == launched
    assert not engine._launched
    assert engine.has_work()
    engine.resume()
    while engine.has_work():
        collected.take(engine.step())
    assert list(map(len, collected.tokens.values())) == [9, 9]


def test_a_paused_engine_still_aborts_and_keeps_deadlines():
    engine = make_engine(make_limits())
    now = 0.0
    engine._scheduler._clock = lambda: now
    engine.add(request("late", 3, 9, deadline_s=5.0))
    engine.add(request("gone", 3, 9))
    engine.pause()
    assert engine.step() == []
    now = 5.0
    engine.abort("gone")
    outputs = {o.request_id: o for o in engine.step()}
    assert outputs["late"].error == "deadline passed; the request had 0 of at most 9 tokens"
    assert outputs["gone"].error is None
    assert not engine.has_work()


@pytest.mark.parametrize("deadline_s", range(1, 12))
def test_a_deadline_ends_a_request_with_what_it_has(deadline_s):
    engine = make_engine(make_limits())
    sent = request("a", 10, 20, deadline_s=float(deadline_s))
    now = 0
    engine._scheduler._clock = lambda: now
    collected = Collected({"a": Expected(sent)})
    engine.add(sent)
    while engine.has_work():
        collected.take(engine.step())
        now += 1
    had, error = len(collected.tokens["a"]), collected.last["a"].error
    assert had == max(0, deadline_s - 2), "two steps for the prompt, and one is not read yet"
    assert error == f"deadline passed; the request had {had} of at most 20 tokens"
    assert engine.counters().failed_requests == 0


def test_a_deadline_is_not_that_of_a_later_request_with_the_same_id():
    engine = make_engine(make_limits())
    now = 0.0
    engine._scheduler._clock = lambda: now
    run(engine, request("a", 3, 2, deadline_s=50.0))
    now = 49.0
    engine.add(request("a", 3, 9))
    engine.step()
    now = 51.0
    assert run(engine).reasons == {"a": FinishReason.LENGTH}


def test_load_and_counters():
    limits = make_limits(groups=2, slots=2, pages=12, page_size=4)
    engine = make_engine(limits)
    assert engine.load() == EngineLoad(0, 0, 0, 88, 4, 0)
    for i in range(6):
        engine.add(request(str(i), [i] * 9, 3, ignore_eos=True))
    engine.step()
    # three pages each, for the prompt and for what comes next
    assert engine.load() == EngineLoad(4, 2, 4 * 12, 88, 4, 0)
    run(engine)
    # the last token of 12 is not computed
    assert engine.load() == EngineLoad(0, 0, 0, 88, 4, 6 * 8)
    counters = engine.counters()
    assert (counters.prompt_tokens, counters.cached_tokens) == (54, 0)
    assert (counters.computed_tokens, counters.generated_tokens) == (54, 18)
    assert (counters.preemptions, counters.failed_requests) == (0, 0)


def test_an_aborted_id_may_be_used_again_at_once():
    engine = make_engine(make_limits())
    engine.add(request("a", 3, 9))
    engine.step()
    engine.abort("a")
    again = request("a", 5, 4)
    engine.add(again)
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.add(again)
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert outputs[0].finish_reason is FinishReason.ABORT
    tokens = [t for o in outputs[1:] for t in o.token_ids]
    assert tokens == Expected(again).run().output


def test_deadlines_of_requests_that_are_over_are_forgotten():
    engine = make_engine(make_limits())
    for i in range(400):
        run(engine, request(str(i), 2, 1, deadline_s=1e12))
    assert len(engine._scheduler._deadlines) < 100


def test_nobody_waits_for_a_prefix_that_was_flushed():
    limits = make_limits(slots=2, pages=200, max_seq_len=400, chunk=8)
    engine = make_engine(limits, eos=())
    engine.add(request("first", 300, 2))
    engine.step()
    engine.add(request("second", 300, 2))
    engine.step()
    assert engine.load().running == 1, "it waits for the prefix"
    engine.flush_cache()
    engine.step()
    assert engine.load().running == 2
    run(engine)
