"""OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from glmjax.errors import InvalidRequestError, ModelNotFoundError
from glmjax.server import unserved
from glmjax.server.collect import Collected, collect
from glmjax.server.frontend import Frontend, Generation
from glmjax.server.http_context import FrontendOf
from glmjax.server.http_streams import DONE, EventStream, event, until_disconnect
from glmjax.server.json_response import JSONResponse
from glmjax.server.openai_types import ChatRequest, CompletionRequest, SamplingRequest
from glmjax.server.openai_words import CHAT, COMPLETION, Shape, Writer, opening, usage
from glmjax.server.sampling_fields import spelled
from glmjax.server.served import ServedModel

router = APIRouter(prefix="/v1")


@router.post("/chat/completions")
async def chat_completions(body: ChatRequest, request: Request, frontend: FrontendOf) -> Response:
    """Continue a conversation."""
    served = frontend.served
    body.check_model(served)
    unserved.check_extra(body, unserved.CHAT)
    prompt = await asyncio.to_thread(_chat_prompt, body, served)
    return await _answer(CHAT, body, [prompt], request, frontend)


@router.post("/completions")
async def completions(body: CompletionRequest, request: Request, frontend: FrontendOf) -> Response:
    """Continue text or token ids."""
    served = frontend.served
    body.check_model(served)
    unserved.check_extra(body, unserved.COMPLETION)
    prompts = await asyncio.to_thread(_prompts, body.prompt, served)
    return await _answer(COMPLETION, body, prompts, request, frontend)


@router.get("/models")
async def models(frontend: FrontendOf) -> Response:
    """The one model."""
    return JSONResponse({"object": "list", "data": [_model(frontend)]})


@router.get("/models/{name:path}")
async def model(name: str, frontend: FrontendOf) -> Response:
    """The one model, by its name."""
    if name != frontend.served.name:
        raise ModelNotFoundError(f"the model {name!r} is not served here", "model")
    return JSONResponse(_model(frontend))


def _model(frontend: Frontend) -> dict[str, Any]:
    return {
        "id": frontend.served.name,
        "object": "model",
        "created": int(frontend.started),
        "owned_by": "glmjax",
        "root": str(frontend.served.folder),
        "max_model_len": frontend.served.max_seq_len,
    }


def _chat_prompt(body: ChatRequest, served: ServedModel) -> list[int]:
    if not body.messages:
        raise InvalidRequestError("messages is empty; send at least one message", "messages")
    variables = body.template_variables()
    taken = {"messages", "tools"} & variables.keys()
    if taken:
        raise InvalidRequestError(
            f"chat_template_kwargs holds {', '.join(sorted(taken))}, which is not for it",
            "chat_template_kwargs",
        )
    return served.chat_prompt(body.messages, **variables)


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
        include_usage: a stream ends with its usage.
    """

    shape: Shape
    head: dict[str, Any]
    writers: list[Writer]
    n: int
    include_usage: bool

    def whole(self, choices: list[Collected]) -> dict[str, Any]:
        """Everything at once."""
        words = [writer.whole(each) for writer, each in zip(self.writers, choices, strict=True)]
        tail = {"choices": words, "usage": usage(choices, self.n)}
        return self.head | {"object": self.shape.object} | tail

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """The same piece by piece."""
        choices = [Collected() for _ in self.writers]
        for index in range(len(choices)):
            if (first := opening(self.shape, index)) is not None:
                yield self._chunk(first)
        async for delta in generation:
            choices[delta.index].add(delta)
            for words in self.writers[delta.index].pieces(delta):
                yield self._chunk(words)
        if self.include_usage:
            yield event(self._head() | {"choices": [], "usage": usage(choices, self.n)})
        yield DONE

    def _head(self) -> dict[str, Any]:
        return self.head | {"object": self.shape.chunk_object}

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        end = {"usage": None} if self.include_usage else {}
        return event(self._head() | {"choices": [choice]} | end)


async def _answer(
    shape: Shape,
    body: SamplingRequest,
    prompts: list[list[int]],
    request: Request,
    frontend: Frontend,
) -> Response:
    served, request_id = frontend.served, f"{shape.prefix}-{secrets.token_hex(12)}"
    with spelled(body.spelling):
        specs = body.choices(prompts, served)
        generation = await frontend.generate(request_id, specs)
    head = {"id": request_id, "created": int(time.time()), "model": served.name}
    writers = [Writer(shape, spec, served.tokenizer, body.echoes) for spec in specs]
    answer = Answer(shape, head, writers, body.n or 1, body.include_usage)
    if body.stream:
        return EventStream(generation, answer.events(generation))
    async with generation:
        choices = await until_disconnect(request.receive, collect(generation))
    return JSONResponse(answer.whole(choices))
