"""Anthropic's Messages API: /v1/messages."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterator

from fastapi import APIRouter, Request
from starlette.responses import Response

from glmjax.server.anthropic.messages import Origins, in_places
from glmjax.server.anthropic.requests import (
    UNSERVED,
    Conversation,
    MessagesRequest,
    PromptRequest,
)
from glmjax.server.anthropic.words import Answer
from glmjax.server.http.context import FrontendOf
from glmjax.server.http.json_body import JsonRoute
from glmjax.server.http.json_response import JSONResponse
from glmjax.server.http.streams import EventStream, until_disconnect
from glmjax.server.openai.chat import generate_chat
from glmjax.server.sampling_fields import spelled
from glmjax.server.unserved import check_extra

router = APIRouter(prefix="/v1", route_class=JsonRoute)


@router.post("/messages")
async def messages(body: MessagesRequest, request: Request, frontend: FrontendOf) -> Response:
    """Continue a conversation, without a thought unless `thinking` asks for one."""
    chat, origins = await asyncio.to_thread(_chat, body)
    with _worded(body, origins):
        generation = await generate_chat(chat, f"msg_{secrets.token_hex(12)}", frontend)
    name = frontend.served.name
    answer = Answer(generation.id, name, body.max_tokens, body.shows_thoughts)
    named = {"request-id": generation.id}  # as it is called in the log
    if body.stream:
        stream = EventStream(generation, answer.events(generation))
        stream.headers.update(named)
        return stream
    async with generation:
        whole = await until_disconnect(request.receive, answer.whole(generation))
    return JSONResponse(whole, headers=named)


@router.post("/messages/count_tokens")
async def count_tokens(body: PromptRequest, frontend: FrontendOf) -> Response:
    """How many tokens a conversation's prompt has, those included that may be cached."""
    chat, origins = await asyncio.to_thread(_chat, body)
    chat.check_model(frontend.served)
    with _worded(body, origins):
        prompt = await asyncio.to_thread(chat.prompt, frontend.served)
    return JSONResponse({"input_tokens": len(prompt)})


def _chat(body: PromptRequest) -> tuple[Conversation, Origins]:
    check_extra(body, UNSERVED)
    return body.chat()


@contextlib.contextmanager
def _worded(body: PromptRequest, origins: Origins) -> Iterator[None]:
    """Make errors speak of the client's own fields and messages."""
    with in_places(origins), spelled(body.spelling):
        yield
