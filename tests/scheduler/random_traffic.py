"""Random requests, aborts, flushes, other weights, pauses and failures, checked at every step."""

from __future__ import annotations

import random
from weakref import WeakKeyDictionary

import pytest
from scheduler.traffic import (
    DEAD_END,
    EOS,
    STATES,
    VOCAB,
    Automaton,
    CheckedRunner,
    Expected,
    check_accounting,
    check_idle,
    script_drafting,
)

from glmjax.config import SchedulerConfig
from glmjax.engine import Engine
from glmjax.errors import InvalidRequestError, QueueFullError
from glmjax.plans import Limits, StepPlan
from glmjax.runner.fake import FakeHandle
from glmjax.scheduler.scheduler import Scheduler
from glmjax.scheduler.sequence import Sequence
from glmjax.types import FinishReason, Request, RequestOutput, SamplingParams

IDS = 40
QUEUE = 24


class RandomRunner(CheckedRunner):
    """Fails once when `failing` is set, in its launch or its result."""

    failing: str | None = None
    resets = 0  # the first as it is made

    def launch(self, plan: StepPlan) -> FakeHandle:
        failing, self.failing = self.failing, None
        if failing == "launch":
            raise RuntimeError("cannot launch")
        handle = super().launch(plan)
        return FailedHandle(handle.done) if failing else handle

    def reset(self) -> None:
        super().reset()
        self.resets += 1


class FailedHandle(FakeHandle):
    def result(self):
        raise RuntimeError("no result")


class Lineage:
    """Which sequences computed which pages: none of before a flush may be found after it."""

    def __init__(self):
        self.era = 0
        self.pages: dict[tuple[int, int], int] = {}  # group and page: when its sequence started
        self.born = WeakKeyDictionary[Sequence, int]()

    def flushed(self, scheduler: Scheduler) -> None:
        for group in scheduler._groups:
            for s in group.running:
                if not s.sent_pages:  # it has its pages, and may use them
                    self.born.setdefault(s, self.era)
        self.era += 1

    def launched(self, scheduler: Scheduler) -> None:
        """Take in the step that was launched last."""
        step = scheduler._in_flight[-1]
        for planned, group in zip((*step.decode, *step.chunks), scheduler._groups * 2, strict=True):
            for s, row in zip(*planned, strict=True):
                new, g = row.new_pages, group.index
                if row.page_index == 0:
                    self.born.setdefault(s, self.era)
                    cached = row.start // scheduler.limits.page_size
                    assert all(self.pages[g, page] == self.born[s] for page in new[:cached])
                    new = new[cached:]
                self.pages |= dict.fromkeys(((g, page) for page in new), self.born[s])

    def stepped(self) -> None:
        for s in [s for s in self.born if s.slot < 0]:
            del self.born[s]


class RandomTraffic:
    """An engine under random traffic on a clock that counts steps.

    Args:
        rng: decides everything; the same seed gives the same traffic.
        limits: longest sequence 40.
        actions: weight of each.
    """

    def __init__(
        self, rng: random.Random, limits: Limits, actions: dict[str, int], record: bool = True
    ):
        self.rng = rng
        self.runner = RandomRunner(limits, rng.choice([0, 3, 8]), record)
        config = SchedulerConfig(max_queued_requests=QUEUE, prefix_cache=rng.random() < 0.8)
        self.engine = Engine(self.runner, config, EOS)
        self.scheduler = self.engine._scheduler
        self.scheduler._clock = lambda: self.now
        drafting = rng.choice([0.0, 0.7, 1.0])
        script_drafting(self.engine, lambda: rng.random() < drafting)
        self.actions = list(actions), list(actions.values())
        self.now = 0.0
        self.alive: dict[str, Expected] = {}
        self.aborted: set[str] = set()
        self.params = {"default": 0}
        self.lineage = Lineage()
        self.put_out = self.prompts = self.cached = self.ended = 0
        self.families = [[rng.randrange(VOCAB) for _ in range(24)] for _ in range(3)]

    def act(self) -> None:
        [action] = self.rng.choices(*self.actions)
        getattr(self, action)()

    def add(self) -> None:
        request = self._request()
        if request.id in self.aborted:
            return
        if request.id in self.alive:
            with pytest.raises(InvalidRequestError, match="in use"):
                self.engine.add(request)
        elif len(self.scheduler._waiting) >= QUEUE:  # preempted ones come on top
            with pytest.raises(QueueFullError, match=r"\d+ requests are waiting"):
                self.engine.add(request)
        else:
            self.alive[request.id] = Expected(request)
            self.engine.add(request)

    def step(self) -> None:
        launched, resets = self.runner.launched, self.runner.resets
        outputs = self.engine.step()
        if self.runner.resets > resets:
            self.lineage.flushed(self.scheduler)
        elif self.runner.launched > launched:
            self.lineage.launched(self.scheduler)
        self.lineage.stepped()
        for output in outputs:
            self._take(output)
        check_accounting(self.scheduler)
        self.now += 1

    def abort(self) -> None:
        if self.alive and self.rng.random() < 0.9:
            chosen = self.rng.choice(list(self.alive))
            self.aborted.add(chosen)
            self.engine.abort(chosen)
        self.engine.abort("unknown")
        check_accounting(self.scheduler)

    def flush(self) -> None:
        self.lineage.flushed(self.scheduler)
        self.engine.flush_cache()
        check_accounting(self.scheduler)

    def pause(self) -> None:
        if self.engine.paused:
            self.engine.resume()
        else:
            self.engine.pause()

    def weights(self) -> None:
        params = self.rng.randrange(1000)
        self.lineage.flushed(self.scheduler)
        self.engine.update_params(params)
        self.params[self.engine.weight_version] = params

    def failure(self) -> None:
        self.runner.failing = self.rng.choice(["launch", "result"])

    def finish(self) -> None:
        """Run until nothing is left, and look at the sums."""
        self.engine.resume()
        for _ in range(5000):
            if not self.engine.has_work():
                break
            self.step()
        assert not self.alive
        check_idle(self.engine)
        self.check_counters()

    def forget(self) -> None:
        """Drop versions of weights that no output can have any more."""
        version = self.engine.weight_version
        self.params = {version: self.params[version]}

    def check_counters(self) -> None:
        counters, runner = self.engine.counters(), self.runner
        assert self.runner.stale_drafts == 0
        assert counters.generated_tokens == self.put_out
        assert counters.cached_tokens == self.cached
        assert counters.prompt_tokens <= self.prompts
        assert list(counters.drafted) == sorted(counters.drafted, reverse=True)
        assert all(a <= d for a, d in zip(counters.accepted, counters.drafted, strict=True))
        assert counters.verifications == (counters.drafted or (0,))[0]
        if runner.resets == 1:
            assert counters.steps == runner.launched
            assert counters.computed_tokens == runner.computed

    def _request(self) -> Request:
        rng = self.rng
        prompt = rng.choice(self.families)[: rng.randrange(25)]
        prompt = prompt + [rng.randrange(VOCAB) for _ in range(rng.randrange(not prompt, 5))]
        prompt = prompt[:24]
        new = rng.choice([None, *range(1, 17)])
        logprobs = rng.choice([None, None, 0, 2, 20])
        sampling = SamplingParams(
            max_new_tokens=new,
            min_new_tokens=rng.choice([0, 0, 0, min(new or 2, 2)]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
            seed=rng.randrange(4),
            stop_token_ids=frozenset(rng.sample(range(VOCAB), rng.randrange(3))),
            ignore_eos=rng.random() < 0.5,
            logprobs=logprobs,
            prompt_logprobs_start=None
            if logprobs is None
            else rng.choice([None, rng.randrange(len(prompt))]),
        )
        left = rng.choice([None, None, rng.randrange(8)])
        return Request(
            str(rng.randrange(IDS)),
            tuple(prompt),
            sampling,
            constraint=Automaton(rng.randrange(STATES), left) if rng.random() < 0.3 else None,
            priority=rng.choice([0, 0, 0, -3, -1, 1, 3]),
            deadline_s=rng.choice([None, None, None, self.now + rng.randrange(60)]),
        )

    def _take(self, output: RequestOutput) -> None:
        expected = self.alive[output.request_id]
        expected.take(output, self.params[output.weight_version])
        self.put_out += len(output.token_ids)
        if output.finish_reason is None:
            return
        del self.alive[output.request_id]
        self.ended += 1
        self.prompts += output.prompt_tokens
        self.cached += output.cached_tokens
        if output.finish_reason is FinishReason.ABORT:
            self._check_abort(expected, output)
        self.aborted.discard(output.request_id)

    def _check_abort(self, expected: Expected, output: RequestOutput) -> None:
        """It was wished, or the deadline passed, or its constraint or a step of it failed."""
        deadline_s = expected.request.deadline_s
        if output.error is None:
            assert output.request_id in self.aborted
        elif output.error.startswith("deadline passed"):
            assert deadline_s is not None
            assert deadline_s <= self.now
        elif output.error.startswith("a step of the engine failed: RuntimeError"):
            assert self.runner.resets > 1
        else:
            assert output.error == DEAD_END
            assert expected.constraint is not None
            assert expected.constraint.left == 0
