"""Continuous batching: which rows run next, and what their results mean. Knows nothing of jax.

Steps may be launched before the one before them is read. So the scheduler plans from what launched
steps will have done, and keeps three invariants:

1. Pages and slots of a sequence that ends are free once no launched step has a row for it.
2. An end is seen one step late: tokens that were sampled after it are dropped.
3. With drafts a sequence's length is known between bounds until its steps are read: pages are
   reserved for the upper, tokens counted by the lower; the truth is on the device.

Steps run on the device in the order of their launch. So pages of a chunk may be shared as soon as
it is launched: whoever reads them does so in a later step.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

from glmjax.config import SchedulerConfig
from glmjax.errors import InvalidRequestError
from glmjax.plans import Limits, StepPlan, StepResult
from glmjax.scheduler.admission import PRIORITY_PLACES, WaitingQueue, new_token_bound
from glmjax.scheduler.batch import (
    Planned,
    chunk_row,
    decode_row,
    fit,
    make_plan,
    padded_tokens,
    record_chunk,
    record_decode,
)
from glmjax.scheduler.buckets import smallest
from glmjax.scheduler.chunks import share_budget
from glmjax.scheduler.drafting import Acceptance, Drafting
from glmjax.scheduler.group import Group
from glmjax.scheduler.results import StepReader, output_of, take_tokens
from glmjax.scheduler.sequence import Sequence, State
from glmjax.types import EngineCounters, EngineLoad, FinishReason, Request, RequestOutput

log = logging.getLogger(__name__)

GROUP_TOKENS = 64  # of a cached prefix, worth a running sequence less in a group


class Launched(NamedTuple):
    """A plan on its way, with whose its rows are."""

    plan: StepPlan
    decode: list[Planned]
    chunks: list[Planned]
    version: str


class Scheduler:
    """Host state of all requests.

    Args:
        limits: what the runner offers.
        config: queue and batch bounds.
        eos_token_ids: the model's own end tokens.
        clock: seconds, for deadlines.

    Attributes:
        version: of the weights that plans are launched with, from now on.
    """

    def __init__(
        self,
        limits: Limits,
        config: SchedulerConfig | None = None,
        eos_token_ids: tuple[int, ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ):
        config = config or SchedulerConfig()
        self.limits = limits
        self.version = "default"
        self._eos = frozenset(eos_token_ids)
        self._clock = clock
        self._waiting = WaitingQueue(config.max_queued_requests)
        self._alive: dict[str, Sequence] = {}
        self._groups = [
            Group(g, limits, config.prefix_cache, self._waiting.push) for g in range(limits.groups)
        ]
        self._drafting = Drafting(limits.num_drafts)
        self._in_flight: deque[Launched] = deque()
        self._outputs: list[RequestOutput] = []
        self._deadlines: list[tuple[float, str]] = []
        self._arrivals = 0
        self._decode_next = False
        self._counts = Counter[str]()

    # requests in and out

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: it can never be served, or its id is in use.
            QueueFullError: too many are waiting.
        """
        if request.id in self._alive:
            raise InvalidRequestError(f"request id {request.id!r} is in use", "request_id")
        bound = new_token_bound(request, self.limits)
        self._waiting.check_room()
        sampling = request.sampling
        endless = sampling.ignore_eos and not (request.constraint and request.constraint.ends)
        sequence = Sequence(
            request,
            place=self._arrivals - PRIORITY_PLACES * request.priority,
            max_new_tokens=bound,
            tokens=list(request.prompt_ids),
            acceptance=Acceptance(self._drafting.overall.rates),
            accept_lengths=[0] * (self.limits.num_drafts + 1 if self.limits.num_drafts else 0),
            constraint=request.constraint,
            stops=sampling.stop_token_ids | (frozenset() if endless else self._eos),
            prompt_logprobs=None if sampling.prompt_logprobs_start is None else {},
            version=self.version,
        )
        self._arrivals += 1
        self._alive[request.id] = sequence
        self._waiting.push(sequence)
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (request.deadline_s, request.id))
            self._forget_deadlines()

    def _forget_deadlines(self) -> None:
        """Drop those of requests that are over, once they are many."""
        if len(self._deadlines) > 2 * len(self._alive) + 64:
            alive = (s.request for s in self._alive.values())
            self._deadlines = [(r.deadline_s, r.id) for r in alive if r.deadline_s is not None]
            heapq.heapify(self._deadlines)

    def abort(self, request_id: str, error: str | None = None) -> None:
        """End a request; the next step returns its last output. Unknown ids are ignored.

        Args:
            error: why, where it is not the client's wish.
        """
        sequence = self._alive.get(request_id)
        if sequence is not None:
            self._finish(sequence)
            self._outputs.append(output_of(sequence, [], FinishReason.ABORT, error=error))

    def take_outputs(self) -> list[RequestOutput]:
        """What became known of requests since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def has_work(self) -> bool:
        """Whether a request is alive, a launched step not committed, or an output not taken."""
        return bool(self._alive or self._in_flight or self._outputs)

    def load(self) -> EngineLoad:
        """How busy it is."""
        page_size = self.limits.page_size
        return EngineLoad(
            running=sum(len(g.running) for g in self._groups),
            waiting=len(self._waiting),
            used_tokens=sum(g.used_pages for g in self._groups) * page_size,
            max_total_tokens=sum(g.pool.capacity for g in self._groups) * page_size,
            max_running_requests=self.limits.slots * len(self._groups),
            cached_tokens=sum(g.cache.cached for g in self._groups) * page_size,
        )

    def counters(self) -> EngineCounters:
        """What was done so far."""
        drafting = self._drafting
        return EngineCounters(
            **self._counts,
            preemptions=sum(g.preemptions for g in self._groups),
            verifications=drafting.verifications,
            drafted=tuple(drafting.drafted),
            accepted=tuple(drafting.accepted),
        )

    def flush_cache(self) -> None:
        """Forget what was computed for requests that are over; running ones keep theirs."""
        for group in self._groups:
            group.cache.flush()

    def retract(self) -> None:
        """Take all sequences off the device, to be computed again from their tokens."""
        for group in self._groups:
            for sequence in list(group.running):
                if sequence.state is State.RUNNING:
                    group.retract(sequence)

    # planning

    def schedule(self) -> StepPlan | None:
        """Plan the next step, or None when nothing can run before a launched step commits."""
        self.expire()
        self._admit()
        decode, drafts = self._plan_decode()
        chunks = self._plan_chunks()
        if any(d.rows for d in decode) and any(c.rows for c in chunks):
            decode, chunks = self._together_or_in_turn(decode, chunks, drafts)
        if not any(planned.rows for planned in (*decode, *chunks)):
            return None
        return self._launch(decode, chunks, drafts)

    def expire(self) -> None:
        """End requests whose deadline has passed."""
        while self._deadlines and self._deadlines[0][0] <= self._clock():
            deadline_s, request_id = heapq.heappop(self._deadlines)
            sequence = self._alive.get(request_id)
            # The id may have been used again since.
            if sequence is not None and sequence.request.deadline_s == deadline_s:
                done = f"{sequence.new_len} of at most {sequence.max_new_tokens} tokens"
                self.abort(request_id, f"deadline passed; the request had {done}")

    def _admit(self) -> None:
        if not self._waiting:
            return
        self._make_slot()
        for sequence in list(islice(self._waiting, 4 * self.limits.slots)):
            groups = self._groups_for(sequence)
            if not groups:
                return
            if groups[0].computes_prefix_of(sequence):
                continue
            if not any(group.try_start(sequence) for group in groups):
                return
            self._waiting.remove(sequence)
            self._count_start(sequence)

    def _make_slot(self) -> None:
        """Preempt for a waiting request of higher priority, where no slot is free or to come."""
        first = next(iter(self._waiting))
        ended = (State.PREEMPTED, State.FINISHED)
        if any(g.free_slots or any(s.state in ended for s in g.running) for g in self._groups):
            return
        group = max(self._groups, key=lambda g: g.last().place)
        last = group.last()
        if first.request.priority <= last.request.priority or first.place >= last.place:
            return
        if not group.computes_prefix_of(first):  # it would wait, and the other take the slot again
            group.preempt(last)

    def _groups_for(self, sequence: Sequence) -> list[Group]:
        """Those with a free slot; first where the least is left to compute, and few run."""
        groups = [g for g in self._groups if g.free_slots]
        if len(groups) > 1:
            groups.sort(key=lambda g: GROUP_TOKENS * len(g.running) - g.cached_len(sequence))
        return groups

    def _count_start(self, sequence: Sequence) -> None:
        if not sequence.counted:
            sequence.counted = True
            self._counts["prompt_tokens"] += sequence.prompt_len
            self._counts["cached_tokens"] += sequence.cached_tokens or 0

    def _plan_decode(self) -> tuple[list[Planned], int]:
        """A row for each sequence that decodes, and how many drafts the step makes."""
        ready = [self._ready(group) for group in self._groups]
        drafts = self._choose_drafts(ready)
        planned = [Planned([], []) for _ in self._groups]
        for group, sequences in zip(self._groups, ready, strict=True):
            for sequence in sequences:
                # Who is preempted for pages is later in order, so has no row yet.
                self._plan_row(group, sequence, drafts, planned[group.index])
        return planned, drafts

    def _ready(self, group: Group) -> list[Sequence]:
        """Sequences that may decode now. Constrained ones wait until what they have is known.

        They go in the same steps, every other one where there is other work: so their masks are
        computed while the device works, and one alone or all together are not slowed down.
        """
        ready = [s for s in group.running if s.decoding]
        if any(s.constraint for s in ready):
            going = [s for step in self._in_flight for s in step.decode[group.index].sequences]
            wait = any(s.constraint for s in going)
            ready = [s for s in ready if not s.constraint or not (wait or s.in_flight)]
        return ready

    def _choose_drafts(self, ready: list[list[Sequence]]) -> int:
        most = max(map(len, ready))
        if not self.limits.num_drafts or not most:
            return self.limits.num_drafts
        gains = [s.acceptance.gain for group in ready for s in group]
        drafting = smallest(self.limits.buckets, most, self.limits.num_drafts, 0, 0)
        plain = smallest(self.limits.buckets, most, 0, 0, 0)
        pays = self._drafting.pays(sum(gains) / len(gains), drafting, plain)
        return self.limits.num_drafts if pays else 0

    def _plan_row(self, group: Group, sequence: Sequence, drafts: int, planned: Planned) -> None:
        if sequence.state is not State.RUNNING:
            return
        has = len(sequence.drafts) if sequence.constraint else drafts
        depth = 0
        if drafts and sequence.has_drafts:
            left = sequence.max_new_tokens - sequence.least_new - 1
            worth = drafts if self._drafting.trying else sequence.acceptance.next_depth()
            depth = min(has, left, worth)
        if not group.reserve(sequence, sequence.most_len + 1 + depth):
            return
        if sequence.constraint is None:
            planned.add(sequence, decode_row(sequence, depth))
        else:
            self._append(planned, sequence, decode_row, depth)

    def _plan_chunks(self) -> list[Planned]:
        planned = [Planned([], []) for _ in self._groups]
        for group, chunks in zip(self._groups, planned, strict=True):
            prefilling = [s for s in group.running if s.prefilling]
            left = [len(s.known) - s.planned_len for s in prefilling]
            takes = share_budget(left, self.limits.chunk_tokens, self.limits.chunk_rows)
            for sequence, tokens in zip(prefilling, takes, strict=True):
                if tokens:
                    self._append(chunks, sequence, chunk_row, tokens)
        return planned

    def _append(
        self, planned: Planned, sequence: Sequence, make_row: Callable[..., Any], tokens: int
    ) -> None:
        """Add a sequence's row; where its constraint cannot go on, it fails and has none."""
        with self._failing(sequence):
            planned.add(sequence, make_row(sequence, tokens))

    @contextmanager
    def _failing(self, sequence: Sequence) -> Iterator[None]:
        """What goes wrong inside ends this request, and no other."""
        try:
            yield
        except InvalidRequestError as error:
            self._fail(sequence, str(error))
        except Exception as error:
            log.exception("request %s: its constraint failed", sequence.request.id)
            self._fail(sequence, f"its constraint failed: {type(error).__name__}: {error}")

    def _together_or_in_turn(
        self, decode: list[Planned], chunks: list[Planned], drafts: int
    ) -> tuple[list[Planned], list[Planned]]:
        """Both in one step, or one of both where two smaller shapes cost less than a large one."""
        nothing = [Planned([], []) for _ in self._groups]
        buckets, most = self.limits.buckets, self.limits.num_drafts
        together = fit(buckets, decode, chunks, most)
        apart = fit(buckets, decode, nothing, drafts), fit(buckets, nothing, chunks, most)
        if padded_tokens(together) <= sum(map(padded_tokens, apart)):
            return decode, chunks
        return (decode, nothing) if self._decode_next else (nothing, chunks)

    def _launch(self, decode: list[Planned], chunks: list[Planned], drafts: int) -> StepPlan:
        with_chunks = any(c.rows for c in chunks)
        drafts = self.limits.num_drafts if with_chunks else drafts
        bucket = fit(self.limits.buckets, decode, chunks, drafts)
        plan = make_plan(bucket, decode, chunks)
        for group, rows, pieces in zip(self._groups, decode, chunks, strict=True):
            for sequence, row in zip(*rows, strict=True):
                record_decode(sequence, row, bucket)
            for sequence, row in zip(*pieces, strict=True):
                record_chunk(sequence, row, bucket)
                self._counts["computed_tokens"] += len(row.token_ids)
                group.keep(sequence, sequence.planned_len)
            group.stepped()
        self._in_flight.append(Launched(plan, decode, chunks, self.version))
        self._decode_next = with_chunks
        return plan

    # results

    def commit(self, result: StepResult, seconds: float | None = None) -> None:
        """Take in the result of the oldest launched step.

        Args:
            seconds: how long the step took, where that is known.
        """
        step = self._in_flight.popleft()
        bucket = step.plan.bucket
        self._counts["steps"] += 1
        if seconds is not None and not bucket.chunk_rows:
            self._drafting.measured(bucket, seconds)
        read, known = StepReader(result, bucket), len(self._outputs)
        for group in self._groups:
            decode, chunks = step.decode[group.index], step.chunks[group.index]
            self._count_drafts(decode, read.counts[group.index])
            for r, sequence in enumerate(decode.sequences):
                self._read(group, r, sequence, read, step.version)
            read.keep_prompt_logprobs(group.index, chunks)
            for r, sequence in enumerate(chunks.sequences, bucket.rows):
                self._read(group, r, sequence, read, step.version)
        self._counts["generated_tokens"] += sum(len(o.token_ids) for o in self._outputs[known:])

    def fail(self, error: str, launched: int) -> None:
        """The device lost its state: end the requests of failed steps, compute the others again.

        Args:
            error: what happened.
            launched: how many of the steps that are not read yet failed for their own sake, the
                oldest first. Those behind them are only lost.
        """
        failed = [p for step in islice(self._in_flight, launched) for p in (*step[1], *step[2])]
        self._in_flight.clear()
        for sequence in [s for group in self._groups for s in group.running]:
            sequence.in_flight = sequence.pending_samples = sequence.pending_drafts = 0
            sequence.spoiled = True
        for sequence in dict.fromkeys(s for planned in failed for s in planned.sequences):
            self._fail(sequence, error)
        for group in self._groups:
            for sequence in list(group.running):
                if sequence.state is State.RUNNING:
                    group.preempt(sequence)
                group.release_if_idle(sequence)
            group.cache.flush()

    def _count_drafts(self, decode: Planned, counts: list[int]) -> None:
        """Learn what became of the drafts of a group's rows, whose new tokens are `counts`."""
        drafted = [row.drafts for row in decode.rows]
        for sequence, drafts, count in zip(decode.sequences, drafted, counts, strict=False):
            if drafts:
                sequence.pending_drafts -= drafts
                sequence.drafted += drafts
                sequence.accepted += count - 1
                sequence.accept_lengths[count - 1] += 1
                sequence.acceptance.update(drafts, count - 1)
        self._drafting.record(drafted, counts)

    def _read(
        self, group: Group, r: int, sequence: Sequence, read: StepReader, version: str
    ) -> None:
        """Take in one row of a step."""
        count = read.counts[group.index][r]
        sequence.in_flight -= 1
        sequence.pending_samples -= count > 0
        if count and sequence.state is not State.FINISHED:
            sequence.version = version
            if read.any_fault and read.fault(group.index, r):
                self._fail(sequence, "the model's logits were not finite (NaN or infinite)")
                group.cache.flush()  # what led there must not be found again
            else:
                self._extend(group, r, sequence, read)
        if sequence.state is not State.RUNNING:
            group.release_if_idle(sequence)

    def _extend(self, group: Group, r: int, sequence: Sequence, read: StepReader) -> None:
        taken, reason, matched = take_tokens(sequence, read.tokens(group.index, r))
        if sequence.constraint is not None:
            sequence.drafts = read.drafts(group.index, r)
            with self._failing(sequence):
                sequence.constraint.advance(taken)
                sequence.constraint = None if sequence.constraint.over else sequence.constraint
            if sequence.state is State.FINISHED:
                return
        sequence.append(taken)
        probs = read.logprobs(group.index, r, len(taken), sequence) if read.has_logprobs else ()
        if reason is not None:
            self._finish(sequence)
        self._outputs.append(output_of(sequence, taken, reason, matched, probs))

    def _fail(self, sequence: Sequence, error: str) -> None:
        """End a request that cannot go on; unless it has ended already."""
        if sequence.state is State.FINISHED:
            return
        sequence.spoiled = True
        self._counts["failed_requests"] += 1
        self.abort(sequence.request.id, error)

    def _finish(self, sequence: Sequence) -> None:
        if sequence.state is State.WAITING:
            self._waiting.remove(sequence)
        sequence.state = State.FINISHED
        del self._alive[sequence.request.id]
        if sequence.slot >= 0:
            self._groups[sequence.group].release_if_idle(sequence)
