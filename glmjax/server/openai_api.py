"""OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from starlette.responses import Response

from glmjax.errors import InvalidRequestError, ModelNotFoundError
from glmjax.server import unserved
from glmjax.server.collect import NOTHING, Collected, collect
from glmjax.server.frontend import ChoiceDelta, ChoiceSpec, Frontend, Generation
from glmjax.server.http_context import FrontendOf
from glmjax.server.http_streams import DONE, EventStream, event, until_disconnect
from glmjax.server.json_response import JSONResponse
from glmjax.server.openai_types import ChatRequest, CompletionRequest, SamplingRequest
from glmjax.server.served import ServedModel

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions only

router = APIRouter(prefix="/v1")


class Shape(NamedTuple):
    """How an endpoint words its answers."""

    prefix: str
    object: str
    chunk_object: str
    opening: dict[str, Any] | None  # first chunk of a streamed choice
    piece: Callable[[str], dict[str, Any]]  # text, in a stream
    whole: Callable[[str], dict[str, Any]]  # text, at once


CHAT = Shape(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    {"delta": {"role": "assistant", "content": ""}},
    lambda text: {"delta": {"content": text} if text else {}},
    lambda text: {"message": {"role": "assistant", "content": text}},
)
COMPLETION = Shape(
    "cmpl",
    "text_completion",
    "text_completion",
    None,
    lambda text: {"text": text},
    lambda text: {"text": text},
)


@router.post("/chat/completions")
async def chat_completions(body: ChatRequest, request: Request, frontend: FrontendOf) -> Response:
    """Continue a conversation."""
    served = frontend.served
    body.check_model(served)
    unserved.check_extra(body, unserved.CHAT)
    prompt = await asyncio.to_thread(_chat_prompt, body, served)
    limit = body.max_completion_tokens
    specs = body.specs([prompt], served, body.max_tokens if limit is None else limit)
    return await _answer(CHAT, body, specs, request, frontend)


@router.post("/completions")
async def completions(body: CompletionRequest, request: Request, frontend: FrontendOf) -> Response:
    """Continue text or token ids."""
    served = frontend.served
    body.check_model(served)
    unserved.check_extra(body, unserved.COMPLETION)
    prompts = await asyncio.to_thread(_prompts, body.prompt, served)
    limit = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    specs = body.specs(prompts, served, limit)
    return await _answer(COMPLETION, body, specs, request, frontend)


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
        n: choices of each prompt.
        include_usage: a stream ends with its usage.
    """

    shape: Shape
    head: dict[str, Any]
    n: int
    include_usage: bool

    def whole(self, choices: list[Collected]) -> dict[str, Any]:
        """Everything at once."""
        words = [
            _choice(choice.last, self.shape.whole(choice.text), choice.last.finish_reason)
            for choice in choices
        ]
        tail = {"choices": words, "usage": usage(choices, self.n)}
        return self.head | {"object": self.shape.object} | tail

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """The same piece by piece."""
        choices = [Collected() for _ in range(generation.size)]
        if self.shape.opening is not None:
            for index in range(generation.size):
                opening = replace(NOTHING, index=index)
                yield self._chunk(_choice(opening, self.shape.opening, None))
        async for delta in generation:
            choices[delta.index].add(delta)
            if delta.text:
                yield self._chunk(_choice(delta, self.shape.piece(delta.text), None))
            if delta.finish_reason is not None:
                yield self._chunk(_choice(delta, self.shape.piece(""), delta.finish_reason))
        if self.include_usage:
            yield event(self._head() | {"choices": [], "usage": usage(choices, self.n)})
        yield DONE

    def _head(self) -> dict[str, Any]:
        return self.head | {"object": self.shape.chunk_object}

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        end = {"usage": None} if self.include_usage else {}
        return event(self._head() | {"choices": [choice]} | end)


def _choice(delta: ChoiceDelta, words: dict[str, Any], end: str | None) -> dict[str, Any]:
    matched = {"matched_stop": delta.matched} if end else {}
    return {"index": delta.index, **words, "logprobs": None, "finish_reason": end} | matched


def usage(choices: list[Collected], n: int) -> dict[str, Any]:
    """Tokens counted; a prompt counts once, however many choices it has."""
    prompt_tokens = sum(choice.last.prompt_tokens for choice in choices[::n])
    cached_tokens = sum(choice.last.cached_tokens for choice in choices[::n])
    completion_tokens = sum(choice.last.completion_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


async def _answer(
    shape: Shape,
    body: SamplingRequest,
    specs: list[ChoiceSpec],
    request: Request,
    frontend: Frontend,
) -> Response:
    request_id = f"{shape.prefix}-{secrets.token_hex(12)}"
    head = {"id": request_id, "created": int(time.time()), "model": frontend.served.name}
    answer = Answer(shape, head, body.n or 1, body.include_usage)
    generation = await frontend.generate(request_id, specs)
    if body.stream:
        return EventStream(generation, answer.events(generation))
    async with generation:
        choices = await until_disconnect(request.receive, collect(generation))
    return JSONResponse(answer.whole(choices))
