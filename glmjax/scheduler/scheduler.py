"""Continuous batching: which rows run next, and what their results mean. Knows nothing of jax.

Steps may be launched before the one before them is read. So the scheduler plans from what launched
steps will have done, and keeps three invariants:

1. Pages and slots of a sequence that ends are free once no launched step has a row for it.
2. A stop token is seen one step late: a token that was sampled after it is dropped.
3. A plan carries no decoded token; the device goes on from its own last token and length.
"""

from __future__ import annotations

from collections import deque

from glmjax.config import SchedulerConfig
from glmjax.errors import InvalidRequestError
from glmjax.scheduler.admission import WaitingQueue, choose_group, new_token_bound
from glmjax.scheduler.batch import decode_row, make_plan, prefill_row, record
from glmjax.scheduler.pages import PagePool, pages_for
from glmjax.scheduler.sequence import Sequence, State
from glmjax.types import (
    EngineLoad,
    FinishReason,
    Limits,
    Request,
    RequestOutput,
    Row,
    StepPlan,
    StepResult,
)


class Scheduler:
    """Host state of all requests.

    Args:
        limits: what the runner offers.
        config: queue and batch bounds.
        eos_token_ids: the model's own end tokens.
    """

    def __init__(
        self,
        limits: Limits,
        config: SchedulerConfig | None = None,
        eos_token_ids: tuple[int, ...] = (),
    ):
        config = config or SchedulerConfig()
        self.limits = limits
        self._eos = frozenset(eos_token_ids)
        self._chunk = max(b.tokens for b in limits.prefill_buckets)
        self._prefill_rows = max(b.rows for b in limits.prefill_buckets)
        self._waiting = WaitingQueue(config.max_queued_requests)
        self._running: list[Sequence] = []
        self._alive: dict[str, Sequence] = {}
        self._pools = [PagePool(limits.pages) for _ in range(limits.groups)]
        self._free_slots = [list(range(limits.slots))[::-1] for _ in range(limits.groups)]
        self._in_flight: deque[list[list[Sequence]]] = deque()
        self._aborted: list[RequestOutput] = []
        self._arrivals = 0
        self._decode_next = False

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
        sequence = Sequence(request, self._arrivals, bound, list(request.prompt_ids))
        self._arrivals += 1
        self._alive[request.id] = sequence
        self._waiting.push(sequence)

    def abort(self, request_id: str) -> None:
        """End a request; the next step returns its last output. Unknown ids are ignored."""
        sequence = self._alive.get(request_id)
        if sequence is None:
            return
        if sequence.state is State.WAITING:
            self._waiting.remove(sequence)
        self._aborted.append(self._finish(sequence, (), FinishReason.ABORT, None))

    def take_aborted(self) -> list[RequestOutput]:
        """Last outputs of requests aborted since the last call."""
        outputs, self._aborted = self._aborted, []
        return outputs

    def has_work(self) -> bool:
        """Whether a request is alive, a launched step not committed, or an output not taken."""
        return bool(self._alive or self._in_flight or self._aborted)

    def load(self) -> EngineLoad:
        """How busy it is."""
        page_size, groups = self.limits.page_size, self.limits.groups
        return EngineLoad(
            running=len(self._running),
            waiting=len(self._waiting),
            used_tokens=sum(pool.used for pool in self._pools) * page_size,
            max_total_tokens=sum(pool.capacity for pool in self._pools) * page_size,
            max_running_requests=self.limits.slots * groups,
        )

    # planning

    def schedule(self) -> StepPlan | None:
        """Plan the next step, or None when nothing can run before a launched step commits.

        Prompts and decoding take turns while there is both, so neither waits for the other.
        """
        self._admit()
        if self._decode_next:
            return self._plan_decode() or self._plan_prefill()
        return self._plan_prefill() or self._plan_decode()

    def _admit(self) -> None:
        while self._waiting:
            sequence = self._waiting.first()
            group = choose_group(sequence, self._pools, self._free_slots, self.limits)
            if group is None:
                return
            self._waiting.pop()
            needed = pages_for(len(sequence.tokens), self.limits.page_size)
            pages = self._pools[group].take(needed)
            sequence.start(group, self._free_slots[group].pop(), pages)
            self._running.append(sequence)

    def _plan_prefill(self) -> StepPlan | None:
        groups: list[list[tuple[Sequence, Row]]] = [[] for _ in self._pools]
        budgets = [self._chunk] * len(groups)
        for sequence in self._running:
            rows, budget = groups[sequence.group], budgets[sequence.group]
            if sequence.prefilling and budget > 0 and len(rows) < self._prefill_rows:
                row = prefill_row(sequence, budget)
                rows.append((sequence, row))
                budgets[sequence.group] -= row.q_len
        return self._launch(groups, prefill=True)

    def _plan_decode(self) -> StepPlan | None:
        groups: list[list[tuple[Sequence, Row]]] = [[] for _ in self._pools]
        # In order of arrival: who is preempted below is the latest, so has no row yet.
        for sequence in sorted(self._running, key=lambda s: s.arrival):
            if sequence.decoding:
                pages = self._grow(sequence)
                if pages is not None:
                    groups[sequence.group].append((sequence, decode_row(sequence, pages)))
        return self._launch(groups, prefill=False)

    def _launch(self, groups: list[list[tuple[Sequence, Row]]], prefill: bool) -> StepPlan | None:
        if not any(groups):
            return None
        limits = self.limits
        buckets = limits.prefill_buckets if prefill else limits.decode_buckets
        plan = make_plan([[row for _, row in g] for g in groups], buckets)
        for group in groups:
            for sequence, row in group:
                record(sequence, row)
        self._in_flight.append([[sequence for sequence, _ in group] for group in groups])
        self._decode_next = prefill
        return plan

    def _grow(self, sequence: Sequence) -> tuple[int, ...] | None:
        """Pages that one more position needs; None when it must wait for pages, or gave up its own.

        The latest arrival of the group is preempted until there is room, so the oldest always runs.
        Pages that launched steps still hold back are waited for, not taken from others.
        """
        needed = pages_for(sequence.planned_len + 1, self.limits.page_size) - len(sequence.pages)
        pool = self._pools[sequence.group]
        while pool.free < needed:
            if self._pages_to_come(sequence.group):
                return None
            self._preempt(self._victim(sequence.group))
            if sequence.state is not State.RUNNING:
                return None
        pages = pool.take(needed)
        sequence.pages.extend(pages)
        return pages

    def _pages_to_come(self, group: int) -> bool:
        ended = (State.PREEMPTED, State.FINISHED)
        return any(s.group == group and s.state in ended for s in self._running)

    def _victim(self, group: int) -> Sequence:
        peers = (s for s in self._running if s.group == group and s.state is State.RUNNING)
        return max(peers, key=lambda s: s.arrival)

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence off the device; it is computed again from its tokens later."""
        sequence.state = State.PREEMPTED
        self._release_if_idle(sequence)

    # results

    def commit(self, result: StepResult) -> list[RequestOutput]:
        """Take in the result of the oldest launched step; return what it adds to requests."""
        outputs = []
        for g, sequences in enumerate(self._in_flight.popleft()):
            for r, sequence in enumerate(sequences):
                sequence.in_flight -= 1
                count = int(result.accept_lens[g, r])
                if sequence.state is not State.FINISHED and count:
                    tokens = result.tokens[g, r, :count].tolist()
                    outputs.append(self._extend(sequence, tokens))
                self._release_if_idle(sequence)
        return outputs

    def _extend(self, sequence: Sequence, tokens: list[int]) -> RequestOutput:
        sampling = sequence.request.sampling
        stops = sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else self._eos)
        taken: list[int] = []
        for token in tokens:
            taken.append(token)
            sequence.tokens.append(token)
            if token in stops:
                return self._finish(sequence, tuple(taken), FinishReason.STOP, token)
            if sequence.new_len == sequence.max_new_tokens:
                return self._finish(sequence, tuple(taken), FinishReason.LENGTH, None)
        return self._output(sequence, tuple(taken), None, None)

    def _finish(
        self,
        sequence: Sequence,
        tokens: tuple[int, ...],
        reason: FinishReason,
        matched: int | None,
    ) -> RequestOutput:
        sequence.state = State.FINISHED
        del self._alive[sequence.request.id]
        self._release_if_idle(sequence)
        return self._output(sequence, tokens, reason, matched)

    def _output(
        self,
        sequence: Sequence,
        tokens: tuple[int, ...],
        reason: FinishReason | None,
        matched: int | None,
    ) -> RequestOutput:
        return RequestOutput(
            request_id=sequence.request.id,
            token_ids=tokens,
            finish_reason=reason,
            matched_stop=matched,
            prompt_tokens=sequence.prompt_len,
            completion_tokens=sequence.new_len,
            cached_tokens=0,
        )

    def _release_if_idle(self, sequence: Sequence) -> None:
        """Free what an ended sequence holds, once no launched step has a row for it."""
        ended = sequence.state in (State.PREEMPTED, State.FINISHED)
        if not ended or sequence.in_flight or sequence.slot < 0:
            return
        self._pools[sequence.group].give_back(sequence.pages)
        self._free_slots[sequence.group].append(sequence.slot)
        self._running.remove(sequence)
        sequence.group, sequence.slot, sequence.pages = -1, -1, []
        if sequence.state is State.PREEMPTED:
            sequence.state = State.WAITING
            self._waiting.push(sequence)
