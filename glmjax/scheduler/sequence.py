"""What the scheduler knows about one request."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from glmjax.types import Request


class State(enum.Enum):
    """Life of a sequence. PREEMPTED and FINISHED hold pages until no launched step uses them."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False)
class Sequence:
    """A request with its progress. "Planned" counts what launched steps will have done.

    Attributes:
        request: what was asked.
        arrival: place in the order of arrival.
        max_new_tokens: bound of the output, from the request or the context.
        tokens: prompt, then the output as far as it is known.
        state: where it stands.
        group, slot: where it runs; -1 while it does not.
        pages: page ids it holds, in order of position.
        prefill_target: positions to compute from known tokens before decoding starts.
        planned_len: positions whose KV launched steps compute.
        planned_new: output tokens, those of launched steps included.
        in_flight: launched steps that have a row for it and have not committed.
    """

    request: Request
    arrival: int
    max_new_tokens: int
    tokens: list[int]
    state: State = State.WAITING
    group: int = -1
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    prefill_target: int = 0
    planned_len: int = 0
    planned_new: int = 0
    in_flight: int = 0

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def new_len(self) -> int:
        """Output tokens known so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def prefilling(self) -> bool:
        """Whether known tokens are still to be computed."""
        return self.state is State.RUNNING and self.planned_len < self.prefill_target

    @property
    def decoding(self) -> bool:
        """Whether another token should be planned."""
        computed = self.planned_len >= self.prefill_target
        running = self.state is State.RUNNING
        return running and computed and self.planned_new < self.max_new_tokens

    def start(self, group: int, slot: int, pages: tuple[int, ...]) -> None:
        """Take a place on the device; all that is known is to be computed (again)."""
        self.state = State.RUNNING
        self.group, self.slot, self.pages = group, slot, list(pages)
        self.prefill_target = len(self.tokens)
        self.planned_len, self.planned_new = 0, self.new_len
