"""Answers that take a while: server-sent events, and clients that leave before the end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from glmjax.errors import GlmjaxError
from glmjax.server.frontend import Generation
from glmjax.server.http.errors import error_body

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"

log = logging.getLogger(__name__)


def event(value: Any) -> bytes:
    """A server-sent event with a JSON value."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client leaves first.

    Raises:
        ClientDisconnect: it left.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A generation as server-sent events; whatever ends the response ends the generation too.

    An error after the first event can no longer change the status: it is sent as an event, and then
    [DONE].
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, events: AsyncIterator[bytes]):
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._generation = generation
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._generation:
            try:
                await until_disconnect(receive, self._send(send))
            except ClientDisconnect:
                log.debug("%s: the client left", self._generation.id)

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except GlmjaxError as error:
            body = event(error_body(error)) + DONE
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
