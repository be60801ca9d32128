"""The waiting queue, and who may start: by place in the queue, when slots and pages are free."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from operator import attrgetter

import numpy as np

from glmjax.errors import ContextLengthError, InvalidRequestError, QueueFullError
from glmjax.plans import Limits
from glmjax.scheduler.sequence import Sequence
from glmjax.types import Request

PRIORITY_PLACES = 64  # places in the queue that a difference of one in priority is worth
FORESEEN_TOKENS = 1024  # of a sequence's output to come, how much is looked at

_place = attrgetter("place")


class WaitingQueue:
    """Sequences without a slot, by place. A preempted one returns to its old place."""

    def __init__(self, limit: int):
        self._sequences: list[Sequence] = []
        self._limit = limit

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def check_room(self) -> None:
        """Raise QueueFullError when a new request must be refused."""
        if len(self) >= self._limit:
            raise QueueFullError(
                f"{len(self)} requests are waiting, the limit is {self._limit} "
                "(max_queued_requests); try again later"
            )

    def push(self, sequence: Sequence) -> None:
        """Put a sequence at its place."""
        insort(self._sequences, sequence, key=_place)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence wherever it stands."""
        self._sequences.remove(sequence)


class Foresight:
    """How much of the output to come the pages must have room for when a sequence starts.

    Most requests end long before their bound, so only a share of it is set aside. The share grows
    when a sequence had to be preempted, and fades while none is.
    """

    LEAST, MOST, STEP, FADE = 0.1, 1.0, 0.2, 0.998

    def __init__(self) -> None:
        self._share = self.LEAST

    def tokens(self, sequence: Sequence) -> float:
        """Positions to set aside for what a sequence will yet put out."""
        left = sequence.max_new_tokens - sequence.new_len
        return self._share * min(left, FORESEEN_TOKENS)

    def preempted(self) -> None:
        """Too little was set aside."""
        self._share = min(self._share + self.STEP, self.MOST)

    def stepped(self) -> None:
        """A step went by."""
        self._share = max(self._share * self.FADE, self.LEAST)


def shared_pages(one: np.ndarray, other: np.ndarray, page_size: int) -> int:
    """Whole pages in which two sequences' tokens (int32) are the same."""
    n = min(len(one), len(other))
    different = np.flatnonzero(one[:n] != other[:n])
    return (int(different[0]) if len(different) else n) // page_size


def capacity_tokens(limits: Limits) -> int:
    """Longest sequence that can ever run: bounded by the context and by the pool."""
    return min(limits.max_seq_len, (limits.pages - 1) * limits.page_size)


def new_token_bound(request: Request, limits: Limits) -> int:
    """How many tokens `request` may generate.

    Raises:
        InvalidRequestError: an empty prompt.
        ContextLengthError: prompt and output exceed what can be held.
    """
    prompt, asked = len(request.prompt_ids), request.sampling.max_new_tokens
    capacity = capacity_tokens(limits)
    # Agents know this by its words, whatever the code beside them, and shorten the conversation.
    most = f"this model's maximum context length is {capacity} tokens"
    if prompt == 0:
        raise InvalidRequestError("the prompt is empty, but must have a token", "prompt")
    if prompt >= capacity:
        raise ContextLengthError(
            f"{most}, but the prompt is too long: it has {prompt} tokens, and at most "
            f"{capacity - 1} leave room for an answer",
            "prompt",
        )
    if asked is not None and prompt + asked > capacity:
        raise ContextLengthError(
            f"{most}, but {prompt} prompt tokens and max_new_tokens {asked} make "
            f"{prompt + asked}; ask for at most {capacity - prompt}, or shorten the prompt",
            "max_tokens",
        )
    return capacity - prompt if asked is None else asked
