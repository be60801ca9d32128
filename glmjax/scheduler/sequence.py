"""What the scheduler knows about one request."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from glmjax.scheduler.drafting import Acceptance
from glmjax.scheduler.prefix import Node
from glmjax.types import Constraint, Request, TokenLogprobs


class State(enum.Enum):
    """Life of a sequence. PREEMPTED and FINISHED hold pages until no launched step uses them."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False)
class Sequence:
    """A request with its progress. "Planned" counts what launched steps will have done.

    How many tokens a launched step with drafts gives is not known before it is read: `least_new`
    and `most_len` are bounds, and meet when nothing is in flight.

    Attributes:
        request: what was asked.
        place: in the queue; lower goes first.
        max_new_tokens: bound of the output, from the request or the context.
        tokens: prompt, then the output as far as it is known: `new_len` tokens.
        acceptance: how its drafts fare.
        stops: token ids that end it.
        constraint: the request's, until it is over.
        state: where it stands.
        group, slot: where it runs; -1 while it does not.
        pages: page ids it holds, in order of position; `sent_pages` of them the device knows.
        node: where it stands in its group's prefix cache; holds a lock there while it runs.
        duplicates: pages it holds that the cache has copies of.
        known: the tokens to compute before decoding starts, int32.
        planned_len: how many of them launched steps compute.
        in_flight: launched steps that have a row for it and have not been read.
        pending_samples, pending_drafts: in those, rows that sample, and drafts they verify.
        has_drafts: whether the device has drafts for its next token.
        drafts: these, where the sequence is constrained and they are known here.
        counted: whether its prompt is in the counters.
        cached_tokens: prompt tokens that were found in the cache when it first started.
        drafted, accepted: drafts verified, and accepted, so far.
        accept_lengths: how often 0, 1, 2, ... drafts of a verification were accepted.
        spoiled: its KV is of no use to others.
        prompt_logprobs: by position, as far as computed; None: not wanted (any more).
        version: of the weights that computed its last token.
    """

    request: Request
    place: int
    max_new_tokens: int
    tokens: list[int]
    acceptance: Acceptance
    accept_lengths: list[int]
    stops: frozenset[int]
    constraint: Constraint | None = None
    new_len: int = 0
    state: State = State.WAITING
    group: int = -1
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    sent_pages: int = 0
    node: Node | None = None
    duplicates: list[int] = field(default_factory=list)
    known: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    planned_len: int = 0
    in_flight: int = 0
    pending_samples: int = 0
    pending_drafts: int = 0
    has_drafts: bool = False
    drafts: list[int] = field(default_factory=list)
    counted: bool = False
    cached_tokens: int | None = None
    drafted: int = 0
    accepted: int = 0
    spoiled: bool = False
    prompt_logprobs: dict[int, TokenLogprobs] | None = None
    version: str = "default"

    @cached_property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def least_new(self) -> int:
        """Output tokens there will be at least when all launched steps are read."""
        return self.new_len + self.pending_samples

    @property
    def most_len(self) -> int:
        """Positions whose KV launched steps have at most computed, once decoding."""
        return len(self.tokens) - 1 + self.pending_samples + self.pending_drafts

    @property
    def total_len(self) -> int:
        """Positions it can ever have."""
        return self.prompt_len + self.max_new_tokens

    @property
    def prefilling(self) -> bool:
        """Whether known tokens are still to be computed."""
        return self.state is State.RUNNING and self.planned_len < len(self.known)

    @property
    def decoding(self) -> bool:
        """Whether another token should be planned."""
        return (
            self.state is State.RUNNING
            and self.planned_len >= len(self.known)
            and self.least_new < self.max_new_tokens
        )

    @property
    def first_logprob(self) -> int | None:
        """First position whose prompt logprob is still owed, if any is."""
        owed = self.prompt_logprobs is not None
        return self.request.sampling.prompt_logprobs_start if owed else None

    def append(self, tokens: list[int]) -> None:
        """Add to the output."""
        self.tokens += tokens
        self.new_len += len(tokens)

    def start(self, group: int, slot: int, node: Node, pages: list[int], cached: int) -> None:
        """Take a place on the device; what is known beyond `cached` positions is to be computed."""
        self.state = State.RUNNING
        self.group, self.slot, self.node, self.pages = group, slot, node, pages
        self.planned_len, self.sent_pages = cached, 0
        self.has_drafts = self.spoiled = False
        if self.cached_tokens is None:
            self.cached_tokens = cached

    def learn_known(self) -> np.ndarray:
        """All tokens known so far as int32, to be computed when it starts."""
        if len(self.known) != len(self.tokens):
            self.known = np.asarray(self.tokens, np.int32)
        return self.known

    def leave(self) -> None:
        """Give up its place on the device."""
        self.group, self.slot, self.pages, self.duplicates = -1, -1, [], []
        self.node, self.drafts = None, []
        if self.state is State.PREEMPTED:
            self.state = State.WAITING
