"""The waiting queue, and who may start: first come, first served, when pages are free."""

from __future__ import annotations

import heapq
from collections.abc import Sequence as SequenceOf

from glmjax.errors import InvalidRequestError, QueueFullError
from glmjax.scheduler.pages import PagePool, pages_for
from glmjax.scheduler.sequence import Sequence
from glmjax.types import Limits, Request


class WaitingQueue:
    """Sequences without a slot, in order of arrival. A preempted one returns to its old place."""

    def __init__(self, limit: int):
        self._heap: list[tuple[int, Sequence]] = []
        self._limit = limit

    def __len__(self) -> int:
        return len(self._heap)

    def check_room(self) -> None:
        """Raise QueueFullError when a new request must be refused."""
        if len(self._heap) >= self._limit:
            raise QueueFullError(
                f"{len(self._heap)} requests are waiting, the limit is {self._limit} "
                "(max_queued_requests); try again later"
            )

    def push(self, sequence: Sequence) -> None:
        """Put a sequence at the place its arrival gives it."""
        heapq.heappush(self._heap, (sequence.arrival, sequence))

    def first(self) -> Sequence:
        """The longest waiting."""
        return self._heap[0][1]

    def pop(self) -> Sequence:
        """Remove and return the longest waiting."""
        return heapq.heappop(self._heap)[1]

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence wherever it stands."""
        self._heap.remove((sequence.arrival, sequence))
        heapq.heapify(self._heap)


def capacity_tokens(limits: Limits) -> int:
    """Longest sequence that can ever run: bounded by the context and by the pool."""
    return min(limits.max_seq_len, (limits.pages - 1) * limits.page_size)


def new_token_bound(request: Request, limits: Limits) -> int:
    """How many tokens `request` may generate.

    Raises:
        InvalidRequestError: an empty prompt, or prompt and output exceed what can be held.
    """
    prompt, asked = len(request.prompt_ids), request.sampling.max_new_tokens
    capacity = capacity_tokens(limits)
    if prompt == 0:
        raise InvalidRequestError("the prompt is empty, but must have a token", "prompt")
    if prompt >= capacity:
        raise InvalidRequestError(
            f"the prompt has {prompt} tokens, but at most {capacity - 1} leave room for an "
            f"answer in a context of {capacity}",
            "prompt",
        )
    if asked is not None and prompt + asked > capacity:
        raise InvalidRequestError(
            f"{prompt} prompt tokens and max_new_tokens {asked} make {prompt + asked}, but the "
            f"context holds {capacity}; ask for at most {capacity - prompt}",
            "max_tokens",
        )
    return capacity - prompt if asked is None else asked


def choose_group(
    sequence: Sequence,
    pools: SequenceOf[PagePool],
    free_slots: SequenceOf[list[int]],
    limits: Limits,
) -> int | None:
    """The data group with the most free pages that can take `sequence`, or None for now.

    A page is left for each sequence that runs there: who starts should not preempt at once.
    """
    needed = pages_for(len(sequence.tokens), limits.page_size)
    fits = [
        group
        for group, (pool, slots) in enumerate(zip(pools, free_slots, strict=True))
        if slots and pool.free >= needed + limits.slots - len(slots)
    ]
    return max(fits, key=lambda g: pools[g].free, default=None)
