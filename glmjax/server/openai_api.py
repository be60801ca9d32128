"""OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from glmjax.errors import InvalidRequestError, ModelNotFoundError
from glmjax.server import unserved
from glmjax.server.collect import Finished, collect
from glmjax.server.frontend import ChoiceDelta, ChoiceSpec, Frontend, Generation
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


def frontend_of(request: Request) -> Frontend:
    """The app's front end."""
    return request.app.state.frontend


FrontendOf = Annotated[Frontend, Depends(frontend_of)]


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
        include_usage: a stream ends with its usage.
    """

    shape: Shape
    head: dict[str, Any]
    include_usage: bool

    def whole(self, finished: list[Finished]) -> dict[str, Any]:
        """Everything at once."""
        return {
            **self.head,
            "object": self.shape.object,
            "choices": [
                _choice(done.last, self.shape.whole(done.text), done.last.finish_reason)
                for done in finished
            ],
            "usage": usage(finished),
        }

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """The same piece by piece."""
        finished = [Finished() for _ in range(generation.size)]
        opening = self.shape.opening
        for index in range(generation.size if opening else 0):
            yield self._chunk({"index": index, **(opening or {}), "finish_reason": None})
        async for delta in generation:
            finished[delta.index].add(delta)
            if delta.text:
                yield self._chunk(_choice(delta, self.shape.piece(delta.text), None))
            if delta.finish_reason is not None:
                yield self._chunk(_choice(delta, self.shape.piece(""), delta.finish_reason))
        if self.include_usage:
            yield event(self._head() | {"choices": [], "usage": usage(finished)})
        yield DONE

    def _head(self) -> dict[str, Any]:
        return self.head | {"object": self.shape.chunk_object}

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        end = {"usage": None} if self.include_usage else {}
        return event(self._head() | {"choices": [choice]} | end)


def _choice(delta: ChoiceDelta, words: dict[str, Any], end: str | None) -> dict[str, Any]:
    matched = {"matched_stop": delta.matched} if end else {}
    return {"index": delta.index, **words, "logprobs": None, "finish_reason": end} | matched


def usage(finished: list[Finished]) -> dict[str, Any]:
    """Tokens counted; a prompt counts once, however many choices it has."""
    prompts = {done.prompt: done.last for done in finished}
    prompt_tokens = sum(last.prompt_tokens for last in prompts.values())
    completion_tokens = sum(done.last.completion_tokens for done in finished)
    cached = sum(last.cached_tokens for last in prompts.values())
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
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
    answer = Answer(shape, head, body.include_usage)
    generation = await frontend.generate(request_id, specs)
    if body.stream:
        return EventStream(generation, answer.events(generation))
    async with generation:
        finished = await until_disconnect(request.receive, collect(generation))
    return JSONResponse(answer.whole(finished))
