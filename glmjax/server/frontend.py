"""What all protocols share: choices under way, text and stop strings, one log line a request."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Sequence
from types import TracebackType

from glmjax.errors import GlmjaxError, InvalidRequestError, RequestFailedError
from glmjax.server.choice import ChoiceDelta, ChoiceSpec
from glmjax.server.engine_thread import EngineThread, OutputStream
from glmjax.server.served import ServedModel
from glmjax.text.detokenizer import Detokenizer
from glmjax.text.output import AnswerDelta, take_output
from glmjax.text.reader import AnswerReader, Reader, TextReader
from glmjax.types import FinishReason, Request, RequestOutput

ABORTED = "aborted"  # what answers say that were ended early
DEADLINE = "deadline"  # how the engine's words for a request that ran out of time begin

log = logging.getLogger(__name__)


class DeadlineError(RequestFailedError):
    """A request had a deadline and did not end by it. HTTP 504."""


class Generation:
    """A request's choices under way. Iterate inside `async with`: leaving it aborts the rest.

    Attributes:
        id: the request's.
        specs: its choices.
        names: all ids by which it, or one of its choices, may be ended.
        begun_s: when it began, on the clock of time.monotonic.
        why: why it was ended early, if it was.
    """

    def __init__(self, frontend: Frontend, request_id: str, specs: Sequence[ChoiceSpec]):
        self.id = request_id
        self.specs = tuple(specs)
        self.names = {request_id, *(spec.rid for spec in specs if spec.rid is not None)}
        self.why = ABORTED
        self._frontend = frontend
        self.begun_s = time.monotonic()
        self._aborted: set[str] = set()
        self._stream: OutputStream | None = None
        self._last: dict[int, ChoiceDelta] = {}
        self._error: GlmjaxError | None = None
        self.choices = {
            f"{request_id}-{frontend.unique()}": _Choice(i, spec, frontend.served)
            for i, spec in enumerate(specs)
        }

    async def submit(self) -> None:
        """Hand the choices to the engine. Raises as `EngineThread.submit` does."""
        if any(choice.spec.constrained for choice in self.choices.values()):
            requests = await asyncio.to_thread(self._requests)  # milliseconds for each grammar
        else:
            requests = self._requests()
        self._stream = await self._frontend.engine.submit(*requests)
        for member in self._aborted:  # while grammars were compiled: the engine did not know it
            self._frontend.engine.abort(member)

    def abort(self, name: str, why: str = ABORTED) -> None:
        """End early the choices that a name means, or all by the request's id."""
        self.why = why
        for member, choice in self.choices.items():
            if name in (self.id, choice.spec.rid):
                self._aborted.add(member)
                self._frontend.engine.abort(member)

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
        """What becomes known, choice by choice.

        Raises:
            RequestFailedError: the engine could not finish one; a DeadlineError: not in time.
            EngineStoppedError: the engine ended before them.
        """
        assert self._stream is not None
        try:
            async for output in self._stream:
                delta = self.choices[output.request_id].take(output)
                self._last[delta.index] = delta
                if delta.finish_reason is not None and output.finish_reason is None:
                    self._stream.drop(output.request_id)
                yield delta
        except GlmjaxError as error:  # streams tell of it in an event, and end in peace
            self._error = error
            raise

    def close(self) -> None:
        """Abort what has not ended, and log the request."""
        if self._stream is not None:
            self._stream.close()
        self._frontend.forget(self)
        last = [self._last.get(i) for i in range(len(self.specs))]
        ends = [delta and delta.finish_reason for delta in last]
        early = "cancelled" if self._error is None else f"failed ({str(self._error)!r:.500})"
        log.info(
            "%.200s: %d prompt + %d completion tokens, %s, %.2f s",
            ", ".join(spec.rid for spec in self.specs if spec.rid) or self.id,
            sum(len(choice.spec.prompt_ids) for choice in self.choices.values()),
            sum(delta.completion_tokens for delta in self._last.values()),
            ", ".join(dict.fromkeys(end or early for end in ends)),
            time.monotonic() - self.begun_s,
        )

    def _requests(self) -> list[Request]:
        """For the engine; each has a constraint of its own, as those have state."""
        constraint = self._frontend.served.constraint
        return [
            Request(
                id=request_id,
                prompt_ids=spec.prompt_ids,
                sampling=spec.sampling,
                constraint=constraint(
                    spec.grammar, spec.prompt_ids, spec.thinks, spec.max_thinking_tokens
                ),
                priority=spec.priority,
                deadline_s=spec.deadline_s,
            )
            for request_id, spec in ((i, choice.spec) for i, choice in self.choices.items())
        ]


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
        for prompt_ids in {spec.prompt_ids for spec in specs}:
            self.served.check_prompt(prompt_ids)
        generation = Generation(self, request_id, specs)
        for name in sorted(generation.names):
            if name in self._alive or not name.isprintable():
                problem = "in use" if name in self._alive else "not printable"
                raise InvalidRequestError(f"request id {name!r} is {problem}", "request_id")
        self._alive |= dict.fromkeys(generation.names, generation)
        try:
            await generation.submit()
        except BaseException:
            self.forget(generation)
            raise
        return generation

    def abort(self, name: str, why: str = ABORTED) -> bool:
        """End a request early, or one of its choices, by its id; whether it was alive."""
        generation = self._alive.get(name)
        if generation is not None:
            generation.abort(name, why)
        return generation is not None

    def abort_all(self, why: str = ABORTED) -> bool:
        """End all requests early; whether there was one."""
        alive = set(self._alive.values())
        for generation in alive:
            generation.abort(generation.id, why)
        return bool(alive)

    def forget(self, generation: Generation) -> None:
        """A generation has ended."""
        for name in generation.names:
            self._alive.pop(name, None)


class _Choice:
    """What one choice says, and where its stop strings end it."""

    def __init__(self, index: int, spec: ChoiceSpec, served: ServedModel):
        self.index = index
        self.spec = spec
        self._reader = _reader(spec, served)

    def take(self, output: RequestOutput) -> ChoiceDelta:
        """What an output adds. Raises RequestFailedError where it tells of a failure."""
        delta = take_output(self._reader, output, self.spec.keep_stop)
        if output.error is not None and delta.finish_reason is FinishReason.ABORT:
            late = output.error.startswith(DEADLINE)
            raise (DeadlineError if late else RequestFailedError)(output.error)
        dropped = len(output.token_ids) - len(delta.token_ids)
        completion_tokens = output.completion_tokens - dropped
        if self.spec.hidden:
            delta, completion_tokens = _hide(delta), 0
        return ChoiceDelta(
            index=self.index,
            parts=delta.parts,
            token_ids=delta.token_ids,
            finish_reason=delta.finish_reason,
            matched=delta.matched,
            prompt_tokens=output.prompt_tokens,
            completion_tokens=completion_tokens,
            cached_tokens=output.cached_tokens,
            reasoning_tokens=self._reader.reasoning_tokens,
            logprobs=delta.logprobs,
            prompt_logprobs=output.prompt_logprobs,
            drafted_tokens=output.drafted_tokens,
            accepted_tokens=output.accepted_tokens,
            accept_lengths=output.accept_lengths,
            weight_version=output.weight_version,
        )


def _reader(spec: ChoiceSpec, served: ServedModel) -> Reader:
    if spec.reading is None:
        return TextReader(
            Detokenizer(
                served.tokenizer, spec.stops, spec.skip_special_tokens, keep_stop=spec.keep_stop
            )
        )
    opening = served.opening(spec.prompt_ids)
    return AnswerReader(
        served.tokenizer,
        spec.reading,
        opening,
        spec.stops,
        spec.skip_special_tokens,
        keep_stop=spec.keep_stop,
    )


def _hide(delta: AnswerDelta) -> AnswerDelta:
    """As if no token had been wanted: whatever token ended it, it is at its length."""
    end = delta.finish_reason
    return AnswerDelta((), (), FinishReason.LENGTH if end is FinishReason.STOP else end, None)
