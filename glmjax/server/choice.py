"""One answer to generate, and what becomes known of it: the words all protocols share."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

from glmjax.errors import InvalidRequestError
from glmjax.text.grammar import GrammarSpec
from glmjax.text.output import text_of
from glmjax.text.parts import Part
from glmjax.text.reader import Reading
from glmjax.types import FinishReason, SamplingParams, TokenLogprobs

MAX_CHOICES = 128
MAX_STOP_CHARS = 8192
SEED_STRIDE = 0x9E3779B1  # odd, so that the seeds of one request's choices are distinct


@dataclass(frozen=True)
class ChoiceSpec:
    """One answer to generate.

    Attributes:
        prompt_ids: the prompt's token ids.
        sampling: how to continue it.
        stops: strings that end the text.
        skip_special_tokens: special tokens add no text.
        hidden: the output is not shown, as only the prompt was asked about.
        grammar: what the output must be; None: anything.
        thinks: the model thinks before it answers, unless the prompt says that it has; then the
            grammar is that of the answer.
        max_thinking_tokens: the thought is ended when it has this many; None: never.
        reading: how the output is taken apart; None: it is text.
        priority: higher goes first.
        deadline_s: on the clock of time.monotonic; it fails then. None: never.
        keep_stop: the text holds the stop string, or the stop token's text, that ended it.
        rid: an id by which its client may end it alone; None: it has that of the request only.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stops: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    hidden: bool = False
    grammar: GrammarSpec | None = None
    thinks: bool = False
    max_thinking_tokens: int | None = None
    reading: Reading | None = None
    priority: int = 0
    deadline_s: float | None = None
    keep_stop: bool = False
    rid: str | None = None

    @property
    def constrained(self) -> bool:
        """Whether not every token may come everywhere."""
        return self.grammar is not None or self.max_thinking_tokens is not None

    def __post_init__(self) -> None:
        if self.max_thinking_tokens is not None and self.max_thinking_tokens < 0:
            raise InvalidRequestError(
                f"max_thinking_tokens is {self.max_thinking_tokens}, but must be 0 or more",
                "max_thinking_tokens",
            )
        if "" in self.stops:
            raise InvalidRequestError("stop holds an empty string, which would end at once", "stop")
        size = sum(map(len, self.stops))
        if size > MAX_STOP_CHARS:
            raise InvalidRequestError(
                f"stop has {size} characters in all, but may have {MAX_STOP_CHARS}", "stop"
            )


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What became known of one choice.

    Attributes:
        index: which choice.
        parts: new parts; none while it may yet become a stop string or a tag.
        token_ids: new tokens, those included that only ended the choice.
        finish_reason: None while it goes on.
        matched: the stop string or token id that ended it, when one did.
        prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens: counts so far.
        logprobs: one for each of `token_ids`, where they were asked for.
        prompt_logprobs: of the prompt tokens that were asked for, all in one delta.
        drafted_tokens, accepted_tokens: drafts verified so far, and accepted.
        accept_lengths: how often 0, 1, 2, ... drafts of a verification were accepted.
        weight_version: of the weights that computed it.
    """

    index: int = 0
    parts: tuple[Part, ...] = ()
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    matched: str | int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accept_lengths: tuple[int, ...] = ()
    weight_version: str = ""

    @property
    def text(self) -> str:
        """The text among the new parts."""
        return text_of(self.parts)


def choices(spec: ChoiceSpec, n: int, seed: int | None) -> list[ChoiceSpec]:
    """`n` choices of one prompt, each with a seed of its own; the first has `seed` itself.

    Without a seed they are random. Greedy choices need none.

    Raises:
        InvalidRequestError: n is out of range.
    """
    if not 1 <= n <= MAX_CHOICES:
        raise InvalidRequestError(f"n is {n}, but must be between 1 and {MAX_CHOICES}", "n")
    if seed is None:
        seed = 0 if spec.sampling.temperature == 0 else secrets.randbits(32)
    seeds = [(seed + i * SEED_STRIDE) % 2**32 for i in range(n)]
    return [replace(spec, sampling=replace(spec.sampling, seed=s)) for s in seeds]
