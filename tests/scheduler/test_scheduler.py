"""The scheduler under random traffic, on a runner that would notice a wrong page."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmjax.config import SchedulerConfig
from glmjax.engine import Engine
from glmjax.errors import ConfigError, EngineStoppedError, InvalidRequestError, QueueFullError
from glmjax.runner.fake import FakeRunner, next_token
from glmjax.scheduler.buckets import decode_buckets, prefill_buckets
from glmjax.scheduler.scheduler import Scheduler
from glmjax.types import FinishReason, Limits, Request, RequestOutput, SamplingParams

VOCAB = 23
EOS = (0,)


def make_limits(groups=1, slots=4, pages=12, page_size=4, max_seq_len=40, chunk=8) -> Limits:
    return Limits(
        groups,
        slots,
        pages,
        page_size,
        max_seq_len,
        decode_buckets(slots),
        prefill_buckets(slots, chunk),
    )


def alone(request: Request, limit: int) -> tuple[list[int], FinishReason]:
    """What a request gives when nothing else runs: the oracle."""
    tokens, bound = list(request.prompt_ids), request.sampling.max_new_tokens or limit
    stops = set(request.sampling.stop_token_ids) | (
        set() if request.sampling.ignore_eos else set(EOS)
    )
    output: list[int] = []
    while len(output) < bound and len(tokens) < limit:
        output.append(next_token(np.array(tokens), request.sampling.seed, VOCAB))
        tokens.append(output[-1])
        if output[-1] in stops:
            return output, FinishReason.STOP
    return output, FinishReason.LENGTH


@dataclass
class Collected:
    """Outputs of all requests, joined, with what must hold of each checked as it comes."""

    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    reasons: dict[str, FinishReason] = field(default_factory=dict)

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            assert output.request_id not in self.reasons, "an output after the last one"
            self.tokens[output.request_id] += output.token_ids
            assert output.completion_tokens == len(self.tokens[output.request_id])
            if output.finish_reason:
                self.reasons[output.request_id] = output.finish_reason


def check_accounting(scheduler: Scheduler) -> None:
    """Every page and slot is either free or held by exactly one sequence."""
    for group, pool in enumerate(scheduler._pools):
        held = [p for s in scheduler._running if s.group == group for p in s.pages]
        assert sorted(held + pool._free) == list(range(1, scheduler.limits.pages))
        slots = [s.slot for s in scheduler._running if s.group == group]
        assert sorted(slots + scheduler._free_slots[group]) == list(range(scheduler.limits.slots))
    for s in scheduler._running:
        assert s.new_len <= s.planned_new <= s.max_new_tokens
        assert s.planned_len <= len(s.pages) * scheduler.limits.page_size
    launched = {id(s) for step in scheduler._in_flight for group in step for s in group}
    running = {id(s) for s in scheduler._running}
    assert launched <= running, "a launched step writes to pages that were freed"


requests = st.builds(
    lambda prompt, bound, seed, stop, ignore: (
        tuple(prompt),
        SamplingParams(
            max_new_tokens=bound, seed=seed, stop_token_ids=frozenset(stop), ignore_eos=ignore
        ),
    ),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=24),
    bound=st.integers(1, 16),
    seed=st.integers(0, 5),
    stop=st.lists(st.integers(0, VOCAB - 1), max_size=1),
    ignore=st.booleans(),
)
actions = st.lists(
    st.one_of(requests, st.integers(0, 7), st.sampled_from(["step"] * 3)), min_size=1, max_size=60
)
shapes = st.builds(
    make_limits,
    groups=st.integers(1, 3),
    slots=st.integers(1, 5),
    pages=st.integers(11, 16),
    page_size=st.just(4),
    chunk=st.sampled_from([3, 8, 16]),
)


@settings(max_examples=150, deadline=None)
@given(limits=shapes, script=actions)
def test_random_traffic_equals_one_request_at_a_time(limits, script):
    engine = Engine(FakeRunner(limits, VOCAB), SchedulerConfig(), EOS)
    sent: list[Request] = []
    aborted: set[str] = set()
    collected = Collected()

    def step() -> None:
        collected.take(engine.step())
        check_accounting(engine._scheduler)

    for action in script:
        if isinstance(action, tuple):
            sent.append(Request(str(len(sent)), *action))
            engine.add(sent[-1])
        elif action == "step":
            step()
        elif sent:
            aborted.add(sent[action % len(sent)].id)
            engine.abort(sent[action % len(sent)].id)
            check_accounting(engine._scheduler)
    for _ in range(5000):
        if not engine.has_work():
            break
        step()

    assert not engine.has_work()
    assert engine.load().running == engine.load().waiting == engine.load().used_tokens == 0
    for request in sent:
        expected, reason = alone(request, 40)
        got = collected.tokens[request.id]
        if collected.reasons[request.id] is FinishReason.ABORT:
            assert request.id in aborted
            assert got == expected[: len(got)]
        else:
            assert (got, collected.reasons[request.id]) == (expected, reason)


def run(engine: Engine) -> Collected:
    collected = Collected()
    while engine.has_work():
        collected.take(engine.step())
    return collected


def request(id: str, prompt: int, new: int, **sampling) -> Request:
    params = SamplingParams(max_new_tokens=new, ignore_eos=True, **sampling)
    return Request(id, tuple(range(1, prompt + 1)), params)


def test_preemption_recomputes_and_changes_nothing():
    limits = make_limits(slots=4, pages=11, max_seq_len=40)
    engine = Engine(FakeRunner(limits, VOCAB))
    sent = [request(str(i), 4 + i, 25) for i in range(4)]
    for r in sent:
        engine.add(r)
    preempted = 0
    collected = Collected()
    while engine.has_work():
        before = {id(s): s.slot for s in engine._scheduler._running}
        collected.take(engine.step())
        check_accounting(engine._scheduler)
        preempted += sum(1 for _, s in engine._scheduler._waiting._heap if id(s) in before)
    assert preempted > 0
    assert collected.tokens == {r.id: alone(r, 40)[0] for r in sent}


@given(steps=st.integers(0, 20), gone=st.sets(st.integers(0, 14)))
def test_who_came_first_is_served_first_whoever_gives_up(steps, gone):
    engine = Engine(FakeRunner(make_limits(slots=1), VOCAB))
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


def test_decode_goes_on_while_a_long_prompt_is_computed():
    limits = make_limits(slots=2, pages=40, max_seq_len=100, chunk=8)
    engine = Engine(FakeRunner(limits, VOCAB))
    engine.add(request("short", 1, 60))
    for _ in range(4):
        engine.step()
    engine.add(request("long", 64, 1))
    tokens_meanwhile, done = 0, False
    while not done:
        outputs = engine.step()
        tokens_meanwhile += sum(o.request_id == "short" for o in outputs)
        done = any(o.request_id == "long" for o in outputs)
    assert tokens_meanwhile >= 64 // 8


def test_no_step_waits_for_the_one_before():
    launched_unread = []

    class Watched(FakeRunner):
        def launch(self, plan):
            handle, runner = super().launch(plan), self
            runner.unread = getattr(runner, "unread", 0) + 1

            class Handle:
                def result(self):
                    launched_unread.append(runner.unread)
                    runner.unread -= 1
                    return handle.result()

            return Handle()

    engine = Engine(Watched(make_limits(), VOCAB))
    engine.add(request("a", 3, 12))
    run(engine)
    assert launched_unread == [2] * 11 + [1]


def test_a_stop_token_drops_the_token_sampled_after_it():
    stop = next_token(np.array([5]), 0, VOCAB)
    runner = FakeRunner(make_limits(), VOCAB)
    engine = Engine(runner, eos_token_ids=(stop,))
    engine.add(Request("a", (5,), SamplingParams(max_new_tokens=9)))
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert [(o.token_ids, o.finish_reason, o.matched_stop) for o in outputs] == [
        ((stop,), FinishReason.STOP, stop)
    ]
    assert runner.launched == 2, "the overlapped step ran, and its token was dropped"


@pytest.mark.parametrize(
    ("prompt", "new", "param"), [(0, 1, "prompt"), (40, None, "prompt"), (30, 11, "max_tokens")]
)
def test_what_can_never_run_is_refused(prompt, new, param):
    engine = Engine(FakeRunner(make_limits(), VOCAB))
    with pytest.raises(InvalidRequestError) as error:
        engine.add(Request("a", tuple(range(prompt)), SamplingParams(max_new_tokens=new)))
    assert error.value.param == param
    assert not engine.has_work()


def test_a_full_queue_and_a_used_id_are_refused():
    engine = Engine(FakeRunner(make_limits(), VOCAB), SchedulerConfig(max_queued_requests=2))
    engine.add(request("a", 1, 1))
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        engine.add(request("a", 1, 1))
    engine.add(request("b", 1, 1))
    with pytest.raises(QueueFullError, match="max_queued_requests"):
        engine.add(request("c", 1, 1))
    assert set(run(engine).reasons) == {"a", "b"}


def test_without_a_bound_a_request_runs_to_the_end_of_the_context():
    engine = Engine(FakeRunner(make_limits(pages=20), VOCAB))
    engine.add(Request("a", (1, 2, 3), SamplingParams(ignore_eos=True)))
    collected = run(engine)
    assert len(collected.tokens["a"]) == 37
    assert collected.reasons["a"] is FinishReason.LENGTH


def test_an_aborted_prompt_is_computed_no_further():
    runner = FakeRunner(make_limits(pages=200, max_seq_len=600), VOCAB)
    engine = Engine(runner)
    engine.add(request("long", 512, 1))
    for _ in range(2):
        engine.step()
    engine.abort("long")
    before = runner.launched
    assert run(engine).reasons == {"long": FinishReason.ABORT}
    assert runner.launched == before


def test_a_preempted_prompt_gives_its_pages_at_once():
    limits = make_limits(slots=2, pages=52, max_seq_len=204, chunk=4)
    engine = Engine(FakeRunner(limits, VOCAB))
    engine.add(request("old", 40, 100))
    while not any(o.token_ids for o in engine.step()):
        pass
    engine.add(request("new", 155, 4))
    gap, longest = 0, 0
    while engine.has_work():
        outputs = {o.request_id for o in engine.step()}
        gap = 0 if "old" in outputs else gap + 1
        if "old" in engine._scheduler._alive:
            longest = max(longest, gap)
    assert longest <= 4


@pytest.mark.parametrize("method", ["launch", "result"])
def test_a_failed_step_is_told_once_and_ends_the_engine(method):
    class Broken(FakeRunner):
        def launch(self, plan):
            handle = super().launch(plan)
            if self.launched == 3 and method == "launch":
                raise RuntimeError("out of memory")
            if self.launched == 3:
                handle = SimpleNamespace(result=lambda: 1 / 0)
            return handle

    engine = Engine(Broken(make_limits(), VOCAB))
    engine.add(request("a", 3, 12))
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        run(engine)
    assert not engine.has_work()
    for call in (engine.step, lambda: engine.add(request("b", 1, 1))):
        with pytest.raises(EngineStoppedError, match=r"out of memory|ZeroDivisionError"):
            call()


def test_other_weights_from_the_next_launch_on():
    engine, asked = Engine(FakeRunner(make_limits(), VOCAB)), request("a", 3, 5)
    engine.add(asked)
    assert engine.step() == []  # in flight: it samples the first token
    engine.update_params(7)
    tokens, seen = run(engine).tokens["a"], list(asked.prompt_ids)
    for params, token in zip([0, 7, 7, 7, 7], tokens, strict=True):
        assert token == next_token(np.array(seen), asked.sampling.seed ^ params, VOCAB)
        seen.append(token)
    with pytest.raises(ConfigError, match="params are str"):
        engine.update_params("b")


def test_groups_share_the_load():
    limits = make_limits(groups=2, slots=2)
    engine = Engine(FakeRunner(limits, VOCAB))
    for i in range(4):
        engine.add(request(str(i), 4, 3))
    engine.step()
    assert sorted(s.group for s in engine._scheduler._running) == [0, 0, 1, 1]
    assert len(run(engine).tokens) == 4
