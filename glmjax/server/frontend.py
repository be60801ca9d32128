"""What both protocols share: choices to generate, text and stop strings, one log line a request."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from glmjax.errors import InvalidRequestError
from glmjax.server.engine_thread import EngineThread, OutputStream
from glmjax.server.served import ServedModel
from glmjax.text.detokenizer import Detokenizer
from glmjax.text.output import take_output
from glmjax.text.tokenizer import Tokenizer
from glmjax.types import FinishReason, Request, RequestOutput, SamplingParams

MAX_CHOICES = 128
MAX_STOP_CHARS = 8192
SEED_STRIDE = 0x9E3779B1  # odd, so that the seeds of one request's choices are distinct

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChoiceSpec:
    """One answer to generate.

    Attributes:
        prompt_ids: the prompt's token ids.
        sampling: how to continue it.
        stops: strings that end the text, which does not hold them.
        skip_special_tokens: special tokens add no text.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stops: tuple[str, ...] = ()
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
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
        text: new text; "" while it may yet become a stop string.
        token_ids: new tokens, those included that only ended the choice.
        finish_reason: None while it goes on.
        matched: the stop string or token id that ended it, when one did.
        prompt_tokens, completion_tokens, cached_tokens: counts so far.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    matched: str | int | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


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


class Generation:
    """A request's choices under way. Iterate inside `async with`: leaving it aborts the rest."""

    def __init__(self, frontend: Frontend, request_id: str, specs: Sequence[ChoiceSpec]):
        self.id = request_id
        self.size = len(specs)
        self._frontend = frontend
        self._begun = time.monotonic()
        self._stream: OutputStream | None = None
        self._last: dict[int, ChoiceDelta] = {}
        self.choices = {
            f"{request_id}-{frontend.unique()}": _Choice(i, spec, frontend.served.tokenizer)
            for i, spec in enumerate(specs)
        }

    async def submit(self) -> None:
        """Hand the choices to the engine. Raises as `EngineThread.submit` does."""
        requests = [
            Request(request_id, choice.spec.prompt_ids, choice.spec.sampling)
            for request_id, choice in self.choices.items()
        ]
        self._stream = await self._frontend.engine.submit(*requests)

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aiter__(self) -> AsyncIterator[ChoiceDelta]:
        assert self._stream is not None
        async for output in self._stream:
            delta = self.choices[output.request_id].take(output)
            self._last[delta.index] = delta
            if delta.finish_reason is not None and output.finish_reason is None:
                self._stream.drop(output.request_id)
            yield delta

    def close(self) -> None:
        """Abort what has not ended, and log the request."""
        if self._stream is not None:
            self._stream.close()
        self._frontend.forget(self)
        ends = [self._last[i].finish_reason if i in self._last else None for i in range(self.size)]
        log.info(
            "%s: %d prompt + %d completion tokens, %s, %.2f s",
            self.id,
            sum(len(choice.spec.prompt_ids) for choice in self.choices.values()),
            sum(delta.completion_tokens for delta in self._last.values()),
            ", ".join(dict.fromkeys(end or "cancelled" for end in ends)),
            time.monotonic() - self._begun,
        )


class Frontend:
    """The engine's thread and the model, and the requests alive.

    Args:
        engine: where requests run.
        served: the model.
    """

    def __init__(self, engine: EngineThread, served: ServedModel):
        self.engine = engine
        self.served = served
        self.started = time.time()
        self._alive: dict[str, Generation] = {}
        self._counter = itertools.count()

    def unique(self) -> int:
        """A number given out once."""
        return next(self._counter)

    async def generate(self, request_id: str, specs: Sequence[ChoiceSpec]) -> Generation:
        """Start to generate choices, all of them or none.

        Raises:
            InvalidRequestError: one can never be served, or the id is in use.
            QueueFullError: too many requests are waiting.
            EngineStoppedError: the engine is not running.
        """
        if request_id in self._alive or not request_id.isprintable():
            problem = "in use" if request_id in self._alive else "not printable"
            raise InvalidRequestError(f"request id {request_id!r} is {problem}", "request_id")
        for prompt_ids in {spec.prompt_ids for spec in specs}:
            self.served.check_prompt(prompt_ids)
        generation = Generation(self, request_id, specs)
        self._alive[request_id] = generation
        try:
            await generation.submit()
        except BaseException:
            self.forget(generation)
            raise
        return generation

    def abort(self, request_id: str) -> bool:
        """End a request early; whether it was alive."""
        generation = self._alive.get(request_id)
        for member in generation.choices if generation else ():
            self.engine.abort(member)
        return generation is not None

    def forget(self, generation: Generation) -> None:
        """A generation has ended."""
        self._alive.pop(generation.id, None)


class _Choice:
    """Text of one choice, and where its stop strings end it."""

    def __init__(self, index: int, spec: ChoiceSpec, tokenizer: Tokenizer):
        self.index = index
        self.spec = spec
        self._text = Detokenizer(tokenizer, spec.stops, spec.skip_special_tokens)

    def take(self, output: RequestOutput) -> ChoiceDelta:
        """What an output adds."""
        delta = take_output(self._text, output)
        dropped = len(output.token_ids) - len(delta.token_ids)
        return ChoiceDelta(
            index=self.index,
            text=delta.text,
            token_ids=delta.token_ids,
            finish_reason=delta.finish_reason,
            matched=delta.matched,
            prompt_tokens=output.prompt_tokens,
            completion_tokens=output.completion_tokens - dropped,
            cached_tokens=output.cached_tokens,
        )
