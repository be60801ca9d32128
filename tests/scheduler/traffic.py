"""Requests for the scheduler's tests, what each must give, and a runner that checks every plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from glmjax.config import SchedulerConfig
from glmjax.engine import Engine
from glmjax.errors import InvalidRequestError
from glmjax.plans import ChunkRow, DecodeRow, Limits, StepPlan
from glmjax.runner.fake import DRAFT_ERRORS, FakeHandle, FakeRunner, next_token, token_logprob
from glmjax.scheduler.buckets import make_buckets
from glmjax.scheduler.scheduler import Scheduler
from glmjax.scheduler.sequence import State
from glmjax.types import (
    MAX_LOGPROBS,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)

VOCAB = 23
EOS = (0,)
DEAD_END = "no token may come next"
STATES = 7


def make_limits(
    groups=1, slots=4, pages=12, page_size=4, max_seq_len=40, chunk=8, drafts=0
) -> Limits:
    buckets = make_buckets(slots, chunk, drafts)
    return Limits(groups, slots, pages, page_size, max_seq_len, drafts, VOCAB, buckets)


def make_engine(
    limits: Limits, runner: FakeRunner | None = None, eos: Iterable[int] = EOS, **config
) -> Engine:
    return Engine(runner or CheckedRunner(limits), SchedulerConfig(**config), tuple(eos))


def script_drafting(engine: Engine, choose: Callable[[], bool]) -> None:
    """Let `choose` decide whether a step drafts, not what the clock said of others."""
    engine._scheduler._drafting.pays = lambda gain, drafting, plain: choose()


def request(id: str, prompt: int | Sequence[int], new: int | None, **fields) -> Request:
    """A request that ends by its length. `fields` are of Request or of SamplingParams."""
    ids = range(1, prompt + 1) if isinstance(prompt, int) else prompt
    own = {n: fields.pop(n) for n in ("constraint", "priority", "deadline_s") if n in fields}
    sampling = SamplingParams(max_new_tokens=new, **{"ignore_eos": True, **fields})
    return Request(id, tuple(ids), sampling, **own)


def _allowed(state: int) -> np.ndarray:
    return (np.arange(VOCAB) * 5 + state) % STATES < 4


ALLOWED = [_allowed(state) for state in range(STATES)]
MASKS = [
    np.frombuffer(np.packbits(np.pad(a, (0, -VOCAB % 32)), bitorder="little").tobytes(), np.uint32)
    for a in ALLOWED
]


@dataclass
class Automaton:
    """A constraint: about half of the tokens are allowed, by a state that all before them make.

    Attributes:
        state: from 0 to STATES - 1.
        left: tokens until none is allowed any more; None: never.
    """

    ends, over = True, False

    state: int = 0
    left: int | None = None

    def masks(self, drafts: Sequence[int]) -> np.ndarray:
        ahead, rows = replace(self), []
        for draft in (*drafts, -1):
            if ahead.left == 0:
                break
            rows.append(MASKS[ahead.state])
            if draft < 0 or not ALLOWED[ahead.state][draft]:
                break
            ahead.advance([draft])
        if not rows:
            raise InvalidRequestError(DEAD_END)
        return np.stack(rows)

    def advance(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            if self.left == 0 or not ALLOWED[self.state][token]:
                raise InvalidRequestError(f"token {token} is not allowed")
            self.state = (3 * self.state + token + 1) % STATES
            self.left = None if self.left is None else self.left - 1


class Expected:
    """What a request gives when nothing else runs. It never looks at a scheduler.

    Args:
        request: not started yet.
        capacity: longest sequence.
        eos: the model's own end tokens; they end a constrained request whatever it asks.

    Attributes:
        tokens: the prompt and the output so far.
        reason, error: of its last output.
    """

    def __init__(self, request: Request, capacity: int = 40, eos: Iterable[int] = EOS):
        self.request, self.sampling = request, request.sampling
        self.tokens = list(request.prompt_ids)
        self.bound = request.sampling.max_new_tokens or capacity - len(self.tokens)
        constraint = request.constraint
        endless = self.sampling.ignore_eos and constraint is None
        self.stops = self.sampling.stop_token_ids | set(() if endless else eos)
        self.constraint = replace(constraint) if isinstance(constraint, Automaton) else None
        self.reason: FinishReason | None = None
        self.error: str | None = None

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.request.prompt_ids) :]

    def follow(self, params: int = 0) -> int:
        """Sample and append the next token. Raises InvalidRequestError at a dead end."""
        mask = None
        if self.constraint is not None:
            mask = self.constraint.masks(())[0]
        token = next_token(np.array(self.tokens), self.sampling.seed ^ params, VOCAB, mask)
        if self.constraint is not None:
            self.constraint.advance([token])
        self.tokens.append(token)
        return token

    def end(self) -> tuple[FinishReason | None, int | None]:
        """Why it ends here, if it does, and the stop token."""
        output = self.output
        if output and output[-1] in self.stops:
            return FinishReason.STOP, output[-1]
        return (FinishReason.LENGTH if len(output) == self.bound else None), None

    def run(self) -> Expected:
        """Go on to the end."""
        try:
            while self.reason is None:
                self.follow()
                self.reason, _ = self.end()
        except InvalidRequestError as dead_end:
            self.reason, self.error = FinishReason.ABORT, str(dead_end)
        return self

    def take(self, output: RequestOutput, params: int = 0) -> None:
        """Compare with the next output of an engine, computed with these weights."""
        assert self.reason is None, "an output after the last one"
        assert "AssertionError" not in (output.error or ""), output.error  # the runner's checks
        if output.token_ids:
            assert output.prompt_logprobs == self._prompt_logprobs()
        else:
            assert output.prompt_logprobs == ()
        wanted = self.sampling.logprobs is not None
        assert len(output.logprobs) == (len(output.token_ids) if wanted else 0)
        for i, token in enumerate(output.token_ids):
            assert self.end()[0] is None, "a token after the end"
            assert token == self.follow(params)
            if wanted:
                assert output.logprobs[i] == self._logprobs(len(self.tokens) - 1)
        assert output.prompt_tokens == len(self.request.prompt_ids)
        assert output.completion_tokens == len(self.output)
        self.reason, self.error = output.finish_reason, output.error
        if self.reason is not FinishReason.ABORT:
            assert (self.reason, output.matched_stop) == self.end()
            assert self.error is None

    def _prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...]:
        start = self.sampling.prompt_logprobs_start
        if start is None or self.output:
            return ()
        places = range(start, len(self.request.prompt_ids))
        return tuple(self._logprobs(p) if p else None for p in places)

    def _logprobs(self, position: int) -> TokenLogprobs:
        before, token = np.array(self.tokens[:position]), self.tokens[position]
        most = min(self.sampling.logprobs or 0, 5, MAX_LOGPROBS)
        top = tuple((i, _float32(token_logprob(before, i))) for i in range(most))
        return TokenLogprobs(_float32(token_logprob(before, token)), top)


def _float32(value: float) -> float:
    return float(np.float32(value))


@dataclass
class Collected:
    """Outputs of an engine by request, compared with what is expected where that is known."""

    expected: dict[str, Expected] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    last: dict[str, RequestOutput] = field(default_factory=dict)

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self.tokens[output.request_id] += output.token_ids
            if output.finish_reason:
                self.last[output.request_id] = output
            if output.request_id in self.expected:
                self.expected[output.request_id].take(output)

    @property
    def reasons(self) -> dict[str, FinishReason | None]:
        return {id: output.finish_reason for id, output in self.last.items()}


def run(engine: Engine, *requests: Request, steps: int = 5000) -> Collected:
    """Add requests, and step until the engine has no work; every step is checked."""
    capacity, eos = engine.limits.max_seq_len, engine._scheduler._eos
    collected = Collected({r.id: Expected(r, capacity, eos) for r in requests})
    for r in requests:
        engine.add(r)
    for _ in range(steps):
        if not engine.has_work():
            break
        collected.take(engine.step())
        check_accounting(engine._scheduler)
    check_idle(engine)
    return collected


def check_idle(engine: Engine) -> None:
    """Nothing is left of any request, and every page is free or cached."""
    load = engine.load()
    assert not engine.has_work()
    assert (load.running, load.waiting, load.used_tokens) == (0, 0, 0)
    for group in engine._scheduler._groups:
        assert group.pool.free + group.cache.cached == group.pool.capacity
        assert not group.running


def check_accounting(scheduler: Scheduler) -> None:
    """Every page and slot is in exactly one place, and no launched step writes to a free one."""
    limits = scheduler.limits
    for group in scheduler._groups:
        running = [(s, s.node) for s in group.running if s.node]
        assert len(running) == len(group.running)
        own = [p for s, node in running for p in (*s.pages[node.length :], *s.duplicates)]
        nodes = chain(group.cache.root.subtree(), *(node.path() for _, node in running))
        cached = chain(*(node.pages for node in {id(n): n for n in nodes}.values()))
        assert sorted([*own, *cached, *group.pool._free]) == list(range(1, limits.pages))
        slots = [s.slot for s in group.running]
        assert sorted(slots + group.free_slots) == list(range(limits.slots))
        assert group.running == sorted(group.running, key=lambda s: s.place)
        for s in group.running:
            assert s.state is State.FINISHED or s.new_len <= s.least_new <= s.max_new_tokens
            assert min(s.in_flight, s.pending_samples, s.pending_drafts) >= 0
            assert s.sent_pages <= len(s.pages) <= limits.pages_per_seq
            assert min(s.planned_len, s.total_len) <= len(s.pages) * limits.page_size
    running = [s for group in scheduler._groups for s in group.running]
    launched = [
        s
        for step in scheduler._in_flight
        for planned in (*step.decode, *step.chunks)
        for s in planned.sequences
    ]
    assert set(map(id, launched)) <= set(map(id, running)), "a launched step writes to free pages"
    assert all(s.in_flight == launched.count(s) for s in running)
    alive = [s for s in running if s.state is not State.FINISHED] + list(scheduler._waiting)
    assert sorted(map(id, alive)) == sorted(map(id, scheduler._alive.values()))


class CheckedRunner(FakeRunner):
    """Holds every row of every plan to the words of glmjax.plans.

    Attributes:
        plans: of all steps, oldest first, where `record` is set.
    """

    def __init__(self, limits: Limits, draft_errors: int = DRAFT_ERRORS, record: bool = True):
        super().__init__(limits, draft_errors)
        self.record = record
        self.plans: list[StepPlan] = []

    def reset(self) -> None:
        super().reset()
        self._drafted: set[tuple[int, int]] = set()  # group and slot of whom drafts are held

    def launch(self, plan: StepPlan) -> FakeHandle:
        for g, group in enumerate(plan.groups):
            slots = [row.slot for row in (*group.decode, *group.chunks)]
            assert len(slots) == len(set(slots)), "two rows of one sequence"
            for row in group.decode:
                self._check_decode(g, row)
            for row in group.chunks:
                self._check_chunk(g, row)
            for row in (*group.decode, *(c for c in group.chunks if c.sample)):
                held = self._drafted.add if plan.bucket.drafts else self._drafted.discard
                held((g, row.slot))
        if self.record:
            self.plans.append(plan)
        return super().launch(plan)

    def _draft(self, g: int, slot: int, end: int, last: int) -> list[int]:
        stale = self.stale_drafts
        drafts = super()._draft(g, slot, end, last)
        if end > self._pages[g, slot] * self.limits.page_size:
            self.stale_drafts = stale  # it ended in a step not read yet, and wrote to scratch
        return drafts

    def _check_pages(self, g: int, row: DecodeRow | ChunkRow) -> None:
        assert all(0 < page < self.limits.pages for page in row.new_pages)
        assert row.page_index + len(row.new_pages) <= self.limits.pages_per_seq
        assert row.page_index in (0, self._pages[g, row.slot])

    def _check_decode(self, g: int, row: DecodeRow) -> None:
        self._check_pages(g, row)
        assert row.page_index > 0
        assert not row.drafts or (g, row.slot) in self._drafted, "the drafts are of another token"
        assert row.masks is None or row.masks.shape == (row.drafts + 1, 1)

    def _check_chunk(self, g: int, row: ChunkRow) -> None:
        self._check_pages(g, row)
        first, sampling = row.page_index == 0, row.sampling
        assert len(row.token_ids)
        assert row.token_ids.dtype == np.int32
        assert first or row.start == self._lens[g, row.slot]
        assert (row.next_token < 0) == row.sample
        changed = sampling.penalised or sampling.logit_bias or sampling.min_new_tokens
        assert (row.history is not None) == bool(first and changed)
        if row.history is not None:
            known = (*row.history.prompt_ids, *row.history.output_ids)
            n = len(row.token_ids)
            assert known[row.start : row.start + n] == tuple(row.token_ids.tolist())
            assert sampling.stop_token_ids <= set(row.history.end_ids)
            least = sampling.min_new_tokens
            assert row.min_len == (len(row.history.prompt_ids) + least if least else 0)
