"""OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from glmjax.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError
from glmjax.server import unserved
from glmjax.server.collect import Collected, collect
from glmjax.server.frontend import Frontend, Generation
from glmjax.server.http.context import FrontendOf
from glmjax.server.http.json_body import JsonRoute
from glmjax.server.http.json_response import JSONResponse
from glmjax.server.http.streams import DONE, EventStream, event, until_disconnect
from glmjax.server.openai.chat import generate_chat
from glmjax.server.openai.requests import (
    ChatRequest,
    CompletionRequest,
    SamplingRequest,
    StreamOptions,
)
from glmjax.server.openai.words import CHAT, COMPLETION, Shape, Writer, usage
from glmjax.server.sampling_fields import spelled
from glmjax.server.served import ServedModel

router = APIRouter(prefix="/v1", route_class=JsonRoute)


@router.post("/chat/completions")
async def chat_completions(body: ChatRequest, request: Request, frontend: FrontendOf) -> Response:
    """Continue a conversation."""
    with _about_messages():
        generation = await generate_chat(body, _id(CHAT, body), frontend)
    return await _answer(CHAT, body, generation, request, frontend.served)


@router.post("/completions")
async def completions(body: CompletionRequest, request: Request, frontend: FrontendOf) -> Response:
    """Continue text or token ids."""
    served = frontend.served
    served.check_name(body.model)
    unserved.check_extra(body, unserved.COMPLETION)
    prompts = await asyncio.to_thread(_prompts, body.prompt, served)
    with spelled(body.spelling):
        specs = body.choices(prompts, served)
        generation = await frontend.generate(_id(COMPLETION, body), specs)
    return await _answer(COMPLETION, body, generation, request, served)


@router.get("/models")
async def models(frontend: FrontendOf) -> Response:
    """The one model, under each of its names."""
    names = frontend.served.names
    data = [_model(frontend, name) for name in names]
    page = {"first_id": names[0], "last_id": names[-1], "has_more": False}
    return JSONResponse({"object": "list", "data": data} | page)


@router.get("/models/{name:path}")
async def model(name: str, frontend: FrontendOf) -> Response:
    """The one model, by one of its names."""
    if name not in frontend.served.names:
        raise ModelNotFoundError(f"the model {name!r} is not served here", "model")
    return JSONResponse(_model(frontend, name))


def _model(frontend: Frontend, name: str) -> dict[str, Any]:
    """In the words of OpenAI, of Anthropic and of vLLM."""
    started = datetime.fromtimestamp(frontend.started, UTC)
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "display_name": name,
        "created": int(frontend.started),
        "created_at": started.isoformat(timespec="seconds"),
        "owned_by": "glmjax",
        "root": str(frontend.served.folder),
        "max_model_len": frontend.served.max_seq_len,
    }


def _prompts(
    prompt: str | list[int] | list[str] | list[list[int]], served: ServedModel
) -> list[list[int]]:
    """Token ids of each prompt."""
    prompts: list[Any] = [prompt] if isinstance(prompt, str) or _is_ids(prompt) else list(prompt)
    if not prompts:
        raise InvalidRequestError("prompt is empty", "prompt")
    texts = [p for p in prompts if isinstance(p, str)]
    return served.tokenizer.encode_batch(texts) if texts else prompts


def _is_ids(prompt: Sequence[Any]) -> bool:
    return bool(prompt) and isinstance(prompt[0], int)


@dataclass(frozen=True)
class Answer:
    """Words for one request's answer.

    Attributes:
        shape: of its endpoint.
        head: fields of every object that is sent.
        writers: one for each choice.
        n: choices of each prompt.
        stream: what a stream tells besides.
        lead: fields of the whole answer, or of a stream's first chunk.
    """

    shape: Shape
    head: dict[str, Any]
    writers: list[Writer]
    n: int
    stream: StreamOptions
    lead: dict[str, Any]

    def whole(self, choices: list[Collected]) -> dict[str, Any]:
        """Everything at once."""
        words = [writer.whole(each) for writer, each in zip(self.writers, choices, strict=True)]
        tail = {"choices": words, "usage": usage(choices, self.n)}
        return self.head | {"object": self.shape.object} | self.lead | tail

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """The same piece by piece."""
        choices, lead = [Collected() for _ in self.writers], self.lead
        async for delta in generation:
            choices[delta.index].add(delta)
            for words in self.writers[delta.index].pieces(delta):
                yield self._chunk([words], choices, lead)
                lead = {}
        if self.stream.include_usage:
            yield self._chunk([], choices)
        yield DONE

    def _chunk(
        self,
        words: list[dict[str, Any]],
        choices: list[Collected],
        lead: dict[str, Any] | None = None,
    ) -> bytes:
        """A chunk, with the usage where it is wanted: in the last, which has no words, or all."""
        chunk = self.head | {"object": self.shape.chunk_object, "choices": words} | (lead or {})
        if self.stream.include_usage:
            told = not words or self.stream.continuous_usage_stats
            chunk["usage"] = usage(choices, self.n) if told else None
        return event(chunk)


@contextlib.contextmanager
def _about_messages() -> Iterator[None]:
    """Name the field that the prompt is made of where the prompt is at fault."""
    try:
        yield
    except ContextLengthError as error:
        param = "messages" if error.param == "prompt" else error.param
        raise ContextLengthError(str(error), param) from None


def _id(shape: Shape, body: SamplingRequest) -> str:
    return body.rid or f"{shape.prefix}-{secrets.token_hex(12)}"


async def _answer(
    shape: Shape,
    body: SamplingRequest,
    generation: Generation,
    request: Request,
    served: ServedModel,
) -> Response:
    head = {"id": generation.id, "created": int(time.time()), "model": served.name}
    specs = generation.specs
    ids = bool(body.return_token_ids)
    writers = [Writer(shape, spec, served.tokenizer, body.echoes, ids) for spec in specs]
    lead = {"prompt_token_ids": specs[0].prompt_ids} if ids and shape is CHAT else {}
    options = body.stream_options or StreamOptions()
    answer = Answer(shape, head, writers, body.n or 1, options, lead)
    if body.stream:
        return EventStream(generation, answer.events(generation))
    async with generation:
        choices = await until_disconnect(request.receive, collect(generation))
    return JSONResponse(answer.whole(choices))
