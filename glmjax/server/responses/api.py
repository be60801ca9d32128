"""OpenAI's newer API: /v1/responses. No response is kept, only items of the latest."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Depends, HTTPException, Request
from starlette.responses import Response

from glmjax.errors import GlmjaxError
from glmjax.server.choice import ChoiceDelta
from glmjax.server.frontend import Frontend, Generation
from glmjax.server.http.context import FrontendOf
from glmjax.server.http.errors import kind_of
from glmjax.server.http.json_body import JsonRoute
from glmjax.server.http.json_response import JSONResponse
from glmjax.server.http.streams import EventStream, event, until_disconnect
from glmjax.server.logprob_words import chat_words
from glmjax.server.openai.chat import generate_chat
from glmjax.server.openai.requests import ChatRequest
from glmjax.server.responses.chat import Turn, chat_request, conversation, told
from glmjax.server.responses.kept import KeptItems, with_items
from glmjax.server.responses.requests import NO_STATE, RESEND, ResponsesRequest
from glmjax.server.responses.text_logprobs import TextLogprobs
from glmjax.server.responses.tools import FlatTool, flat_tools
from glmjax.server.responses.words import Output, Words, echo, head, new_id, usage
from glmjax.text.parts import Content
from glmjax.text.tokenizer import Tokenizer
from glmjax.types import FinishReason

router = APIRouter(prefix="/v1", route_class=JsonRoute)


def kept_by(request: Request) -> KeptItems:
    """The app's table of items."""
    return request.app.state.kept_items


KeptBy = Annotated[KeptItems, Depends(kept_by)]


@router.post("/responses")
async def create_response(
    body: ResponsesRequest, request: Request, frontend: FrontendOf, kept: KeptBy
) -> Response:
    """Continue a conversation."""
    answer = await _begin(body, frontend, kept)
    generation = answer.generation
    if body.stream:
        return EventStream(generation, answer.stream())
    async with generation:
        whole = await until_disconnect(request.receive, answer.whole())
    return JSONResponse(whole)


@router.post("/responses/input_tokens")
async def count_input_tokens(
    body: ResponsesRequest, frontend: FrontendOf, kept: KeptBy
) -> Response:
    """How many tokens a conversation's prompt has, those included that may be cached."""
    made = await asyncio.to_thread(_prepared, body, kept)
    frontend.served.check_name(made.chat.model)
    with told(made.turns, made.tools):
        prompt = await asyncio.to_thread(made.chat.prompt, frontend.served)
    return JSONResponse({"object": "response.input_tokens", "input_tokens": len(prompt)})


@router.get("/responses/{response_id}", include_in_schema=False)
@router.delete("/responses/{response_id}", include_in_schema=False)
@router.post("/responses/{response_id}/cancel", include_in_schema=False)
@router.get("/responses/{response_id}/input_items", include_in_schema=False)
async def kept_response() -> Response:
    """What would need a response that is kept."""
    raise HTTPException(404, f"{NO_STATE}; {RESEND} of the next request")


@router.post("/responses/compact", include_in_schema=False)
async def compact() -> Response:
    """What would make a conversation shorter."""
    raise HTTPException(404, f"this server compacts no conversations; {RESEND}")


@dataclass
class Answer:
    """A response that is being made.

    Attributes:
        generation: what it is made of.
        head: its fields, save for those that change.
        tokenizer: for log probabilities.
        text_logprobs: finds those that are wanted; None: none are.
        output: its items so far.
        last: what became known last.
    """

    generation: Generation
    head: Words
    tokenizer: Tokenizer
    text_logprobs: TextLogprobs | None
    output: Output = field(default_factory=Output)
    last: ChoiceDelta | None = None

    async def whole(self) -> Words:
        """All of it, when it has ended."""
        end: Words = {}
        async for words in self.events():
            end = words
        return end["response"]

    async def stream(self) -> AsyncIterator[bytes]:
        """Its events as they are sent; a failure is the last of them."""
        number = itertools.count()
        try:
            async for words in self.events():
                yield _sent(words, next(number))
        except GlmjaxError as error:
            kind = kind_of(error)
            for words in self._failed(str(error), kind.code or kind.type):
                yield _sent(words, next(number))

    async def events(self) -> AsyncIterator[Words]:
        """What happens to it; the last event holds all of it. Raises as `Generation` does."""
        for status in ("created", "in_progress"):
            yield {"type": f"response.{status}", "response": self._response("in_progress")}
        async for delta in self.generation:
            self.last = delta
            for words in self._more(delta):
                yield words
        for words in self._end():
            yield words

    def _more(self, delta: ChoiceDelta) -> Iterator[Words]:
        logprobs = self._logprobs(delta)
        for part in delta.parts:
            own = logprobs if isinstance(part, Content) else []
            yield from self.output.take(part, own)
            logprobs = [] if own else logprobs

    def _logprobs(self, delta: ChoiceDelta) -> list[Words]:
        if self.text_logprobs is None:
            return []
        return chat_words(self.tokenizer, self.text_logprobs.take(delta))["content"]

    def _end(self) -> Iterator[Words]:
        reason = self.last and self.last.finish_reason
        if reason is FinishReason.STOP:
            if not self.output.answers:  # agents expect a text or a call
                yield from self.output.take(Content(""), [])
            yield from self._ended("completed", completed_at=int(time.time()))
        elif reason is FinishReason.LENGTH:
            details = {"reason": "max_output_tokens"}
            yield from self._ended("incomplete", incomplete_details=details)
        else:
            yield from self._failed("the request was aborted before its end")

    def _failed(self, reason: str, code: str = "server_error") -> Iterator[Words]:
        yield from self._ended("failed", error={"code": code, "message": reason})

    def _ended(self, status: str, **more: Any) -> Iterator[Words]:
        yield from self.output.close("completed" if status == "completed" else "incomplete")
        counts = None if self.last is None else usage(self.last)
        response = self._response(status) | {"usage": counts} | more
        yield {"type": f"response.{status}", "response": response}

    def _response(self, status: str) -> Words:
        return self.head | {"status": status, "output": list(self.output.items)}


def _sent(words: Words, number: int) -> bytes:
    name = b"event: " + words["type"].encode() + b"\n"
    return name + event(words | {"sequence_number": number})


class _Prepared(NamedTuple):
    """A request as it is answered.

    Attributes:
        turns: its conversation.
        tools: its tools.
        chat: the same request for chat.
        repeated: what the answer repeats of it.
    """

    turns: list[Turn]
    tools: list[FlatTool]
    chat: ChatRequest
    repeated: Words


def _prepared(body: ResponsesRequest, kept: KeptItems) -> _Prepared:
    """May take a while, where a conversation is long."""
    body.check_served()
    turns, repeated = conversation(with_items(body, kept)), echo(body)
    tools = flat_tools(body.tools)
    return _Prepared(turns, tools, chat_request(body, turns, tools), repeated)


async def _begin(body: ResponsesRequest, frontend: Frontend, kept: KeptItems) -> Answer:
    made = await asyncio.to_thread(_prepared, body, kept)
    with told(made.turns, made.tools):
        generation = await generate_chat(made.chat, new_id("resp"), frontend)
    served = frontend.served
    found = TextLogprobs(generation.specs[0], served) if body.logprobs else None
    words = head(generation, served) | made.repeated
    keep = kept.keep if body.stores else None
    output = Output(body.seals, body.summarises, made.tools, keep)
    return Answer(generation, words, served.tokenizer, found, output)
