"""Anthropic's Messages API: /v1/messages."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterator, Sequence
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from glmjax.server.anthropic.blocks import Message
from glmjax.server.anthropic.edits import edited
from glmjax.server.anthropic.messages import Origins, in_places
from glmjax.server.anthropic.requests import (
    UNSERVED,
    Conversation,
    MessagesRequest,
    PromptRequest,
)
from glmjax.server.anthropic.words import Answer, Words, counted
from glmjax.server.http.context import FrontendOf
from glmjax.server.http.json_body import JsonRoute
from glmjax.server.http.json_response import JSONResponse
from glmjax.server.http.streams import EventStream, until_disconnect
from glmjax.server.openai.chat import generate_chat
from glmjax.server.sampling_fields import spelled
from glmjax.server.served import ServedModel
from glmjax.server.unserved import check_extra

router = APIRouter(prefix="/v1", route_class=JsonRoute)


@router.post("/messages")
async def messages(body: MessagesRequest, request: Request, frontend: FrontendOf) -> Response:
    """Continue a conversation, without a thought unless `thinking` asks for one."""
    chat, origins, applied = await asyncio.to_thread(_chat, body, frontend.served)
    with _worded(body, origins):
        generation = await generate_chat(chat, f"msg_{secrets.token_hex(12)}", frontend)
    name = frontend.served.name
    answer = Answer(generation.id, name, body.max_tokens, body.shows_thoughts, applied)
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
    chat, origins, applied = await asyncio.to_thread(_chat, body, frontend.served)
    frontend.served.check_name(chat.model)
    with _worded(body, origins):
        size = len(await asyncio.to_thread(chat.prompt, frontend.served))
    return JSONResponse({"input_tokens": size} | counted(size, applied))


def _chat(
    body: PromptRequest, served: ServedModel
) -> tuple[Conversation, Origins, list[Words] | None]:
    """A conversation, and the edits that were applied to it; None: none were asked for."""
    check_extra(body, UNSERVED)
    management = body.context_management
    edits = management.clear_tool_uses if management else []
    if not edits:
        return (*body.chat(), None)
    size = partial(_size, body, served)
    messages, applied = edited(body.messages, edits, size, partial(_count, served))
    return (*body.with_messages(messages).chat(), applied)


def _size(body: PromptRequest, served: ServedModel, messages: Sequence[Message]) -> int:
    """Tokens of the prompt that these messages make."""
    chat, origins = body.with_messages(messages).chat()
    with _worded(body, origins):
        return len(chat.prompt(served))


def _count(served: ServedModel, text: str) -> int:
    """Tokens of a text."""
    return len(served.tokenizer.encode(text))


@contextlib.contextmanager
def _worded(body: PromptRequest, origins: Origins) -> Iterator[None]:
    """Make errors speak of the client's own fields and messages."""
    with in_places(origins), spelled(body.spelling):
        yield
