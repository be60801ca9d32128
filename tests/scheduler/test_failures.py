"""A step that fails ends the requests that had a part in it; all others give what they would."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import NamedTuple

import pytest
from scheduler.traffic import (
    Automaton,
    CheckedRunner,
    Collected,
    Expected,
    check_accounting,
    check_idle,
    make_engine,
    make_limits,
    request,
    run,
    script_drafting,
)

from glmjax.engine import Engine
from glmjax.errors import EngineStoppedError
from glmjax.plans import Limits, StepPlan, StepResult
from glmjax.runner.fake import FakeHandle
from glmjax.types import FinishReason, Request

CAUSE = "HBM is on fire"
BAD_SEED = 666


class FailedHandle(NamedTuple):
    """A step that was launched, and whose result never comes.

    Attributes:
        ids: of its requests.
        victims: where to note them once it is known.
    """

    ids: set[str]
    victims: set[str]

    def result(self) -> StepResult:
        self.victims.update(self.ids)
        raise RuntimeError(CAUSE)


class BrokenRunner(CheckedRunner):
    """Fails at some of its launches, counted from 0, and is of no use until it was reset.

    Attributes:
        failing: by launch, "launch" or "result".
        victims: ids of requests with a row in a step that failed.
    """

    calls = 0

    def __init__(self, limits: Limits, failing: Mapping[int, str]):
        super().__init__(limits)
        self.failing = failing
        self.victims: set[str] = set()
        self.engine: Engine | None = None

    def reset(self) -> None:
        super().reset()
        self.down = False

    def launch(self, plan: StepPlan) -> FakeHandle | FailedHandle:
        assert not self.down
        how = self.failing.get(self.calls)
        self.calls += 1
        if how is None:
            return super().launch(plan)
        step = self.engine._scheduler._in_flight[-1]
        ids = {s.request.id for p in (*step.decode, *step.chunks) for s in p.sequences}
        if how == "result":
            super().launch(plan)
            return FailedHandle(ids, self.victims)
        self.victims |= ids
        self.down = True
        raise RuntimeError(CAUSE)


def crowd() -> list[Request]:
    """More than there is room for, beginning alike, of every kind."""
    shared = list(range(1, 10))
    return [
        request("plain", shared, 6),
        request("constrained", [*shared, 11], 5, constraint=Automaton(3), seed=1),
        request("logprobs", [*shared, 12, 13], 5, logprobs=2, prompt_logprobs_start=3),
        request("long", [*shared, *range(14, 22)], 4, seed=2, ignore_eos=False),
        request("other", (5, 5), 7, frequency_penalty=0.5),
    ]


def play(failing: Mapping[int, str], drafts: int) -> BrokenRunner:
    limits = make_limits(slots=3, pages=13, page_size=3, max_seq_len=30, drafts=drafts)
    runner = BrokenRunner(limits, failing)
    engine = make_engine(limits, runner)
    runner.engine = engine
    script_drafting(engine, lambda: True)
    collected = Collected({r.id: Expected(r) for r in crowd()})
    for r in crowd():
        engine.add(r)
    for _ in range(300):
        if not engine.has_work():
            break
        known = set(runner.victims)
        collected.take(engine.step())
        check_accounting(engine._scheduler)
        # A request that had ended by then does not fail with a row that was launched meanwhile.
        ended = {id for id, last in collected.last.items() if last.error is None}
        runner.victims -= ended - known
    check_idle(engine)
    check_reports(collected, runner.victims)
    check_serves_on(engine)
    return runner


def check_reports(collected: Collected, victims: set[str]) -> None:
    assert len(collected.last) == len(crowd())
    for id, output in collected.last.items():
        failed = output.finish_reason is FinishReason.ABORT
        assert failed == (id in victims)
        if failed:
            assert output.error == f"a step of the engine failed: RuntimeError: {CAUSE}"


def check_serves_on(engine: Engine) -> None:
    again = request("again", list(range(1, 10)), 6)
    engine._runner.failing = {}
    engine.add(again)
    collected = Collected({"again": Expected(again)})
    while engine.has_work():
        collected.take(engine.step())
    assert collected.last["again"].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("how", ["launch", "result"])
def test_one_step_fails_at_every_place(how, drafts):
    steps = play({}, drafts).launched
    assert steps > 12
    for at in range(steps):
        runner = play({at: how}, drafts)
        assert runner.calls > at


@pytest.mark.parametrize("drafts", [0, 3])
def test_two_steps_fail_at_all_places(drafts):
    """One apart, the second is on its way, or about to be, when the first is found out."""
    kinds = ["launch", "result"]
    for first, gap, one, other in product(range(14), [1, 2, 5], kinds, kinds):
        play({first: one, first + gap: other}, drafts)


@pytest.mark.parametrize("how", ["launch", "result"])
def test_a_device_that_always_fails_ends_every_request(how):
    runner = play(dict.fromkeys(range(1000), how), 3)
    assert {r.id for r in crowd()} == runner.victims


class Unresettable(BrokenRunner):
    def reset(self) -> None:
        super().reset()
        if self.calls:
            raise OSError("the device fell off the bus")


@pytest.mark.parametrize("how", ["launch", "result"])
def test_a_device_that_cannot_be_reset_stops_the_engine(how):
    runner = Unresettable(make_limits(), {2: how})
    engine = make_engine(runner.limits, runner)
    runner.engine = engine
    with pytest.raises(EngineStoppedError, match=rf"{CAUSE}; and the device cannot be reset: the"):
        run(engine, request("a", 3, 12))
    assert not engine.has_work()
    calls = engine.step, lambda: engine.add(request("b", 1, 1)), lambda: engine.update_params(1)
    for call in calls:
        with pytest.raises(EngineStoppedError, match="the device fell off the bus"):
            call()
    engine.abort("a")
    assert not engine.has_work()


def test_an_unknown_bucket_is_an_error_of_its_requests():
    limits = make_limits(drafts=3)
    runner = CheckedRunner(limits)
    engine = make_engine(limits, runner)
    engine.add(request("a", 3, 4))
    runner.limits = make_limits()  # other shapes than the scheduler was told
    [output] = engine.step()
    assert "was not compiled" in str(output.error)


class FaultyRunner(CheckedRunner):
    """Rows of requests with BAD_SEED have faulty logits after `good` good tokens."""

    def __init__(self, limits, good: int):
        super().__init__(limits)
        self.good = good
        self.sampled = 0

    def _settle(self, g, r, slot, end, tokens, result, width) -> None:
        super()._settle(g, r, slot, end, tokens, result, width)
        if self._sampling[g, slot].seed == BAD_SEED:
            result.faults[g, r] = self.sampled >= self.good
            self.sampled += len(tokens)


@pytest.mark.parametrize(("good", "drafts", "groups"), list(product([0, 1, 3], [0, 3], [1, 2])))
def test_faulty_logits_fail_their_request_alone_and_are_found_by_nobody(good, drafts, groups):
    limits = make_limits(groups, slots=4, pages=40, page_size=2, drafts=drafts)
    engine = make_engine(limits, FaultyRunner(limits, good))
    shared = tuple(range(1, 13))
    requests = [request(str(i), (*shared, i), 6, seed=i) for i in range(3)]
    collected = Collected({r.id: Expected(r) for r in requests})
    bad = request("bad", (*shared, 3), 12, seed=BAD_SEED)
    for r in (bad, *requests):
        engine.add(r)
    while engine.has_work():
        collected.take(engine.step())
        check_accounting(engine._scheduler)
    check_idle(engine)
    assert collected.last["bad"].error == "the model's logits were not finite (NaN or infinite)"
    assert collected.tokens["bad"] == Expected(bad).run().output[: len(collected.tokens["bad"])]
    assert all(collected.reasons[r.id] is FinishReason.LENGTH for r in requests)
    assert engine.counters().failed_requests == 1


@pytest.mark.parametrize("drafts", [0, 3])
def test_the_cache_is_flushed_after_faulty_logits(drafts):
    limits = make_limits(slots=1, pages=40, page_size=2, drafts=drafts)
    engine = make_engine(limits, FaultyRunner(limits, 2))
    prompt = tuple(range(1, 13))
    for id, seed, cached in [("good", 1, 0), ("bad", BAD_SEED, 10), ("again", 1, 0)]:
        engine.add(request(id, prompt, 8, seed=seed))
        outputs = []
        while engine.has_work():
            outputs += engine.step()
        assert outputs[-1].cached_tokens == cached
        assert (outputs[-1].error is not None) == (seed == BAD_SEED)


@pytest.mark.parametrize("at", range(6))
def test_ctrl_c_in_a_launch_gives_up_the_step_and_not_the_engine(at):
    class Interrupted(CheckedRunner):
        calls = 0

        def launch(self, plan):
            self.calls += 1
            if self.calls == at + 1:
                raise KeyboardInterrupt
            return super().launch(plan)

    limits = make_limits(drafts=1)
    engine = make_engine(limits, Interrupted(limits), eos=())
    sent = [request("a", 3, 9), request("b", 5, 9)]
    with pytest.raises(KeyboardInterrupt):
        run(engine, *sent)
    collected = run(engine)
    assert {why.finish_reason for why in collected.last.values()} <= set(FinishReason)
    check_idle(engine)
    assert run(engine, request("c", 3, 9)).tokens["c"] == Expected(request("c", 3, 9)).run().output
