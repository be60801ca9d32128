"""A generation's deltas put together again."""

from __future__ import annotations

from dataclasses import dataclass, field

from glmjax.server.choice import ChoiceDelta
from glmjax.server.frontend import Generation
from glmjax.text.output import text_of
from glmjax.text.parts import Message, Part, joined, message
from glmjax.types import TokenLogprobs

NOTHING = ChoiceDelta()


@dataclass
class Collected:
    """One choice as far as it is known.

    Attributes:
        token_ids: all its tokens.
        logprobs: one for each of them, where they were asked for.
        prompt_logprobs: of its prompt, where they were asked for.
        last: its latest delta, with the counts.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    last: ChoiceDelta = NOTHING
    _parts: list[Part] = field(default_factory=list)

    def add(self, delta: ChoiceDelta) -> None:
        """Take in the next delta."""
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        self.last = delta
        self._parts += delta.parts

    @property
    def text(self) -> str:
        """All its text."""
        self._parts = joined(self._parts)
        return text_of(self._parts)

    @property
    def message(self) -> Message:
        """Everything it says."""
        return message(self._parts)


async def collect(generation: Generation) -> list[Collected]:
    """Every choice, by index, when all have ended."""
    collected = [Collected() for _ in generation.specs]
    async for delta in generation:
        collected[delta.index].add(delta)
    return collected
