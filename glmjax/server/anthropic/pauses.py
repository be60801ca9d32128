"""Pauses of a stream, told while they last, so that nobody takes the connection for dead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar, cast

T = TypeVar("T")


async def with_pauses(items: AsyncIterator[T], seconds: float) -> AsyncIterator[T | None]:
    """Items as they come, and None whenever there was none for `seconds`. Raises as `items` does.

    A task of its own reads them, as what waits is cancelled at each pause, and an asynchronous
    generator that is cancelled has ended.
    """
    queue: asyncio.Queue[T | object] = asyncio.Queue()
    end = object()

    async def read() -> None:
        try:
            async for item in items:
                queue.put_nowait(item)
        finally:
            queue.put_nowait(end)

    reading = asyncio.create_task(read())
    try:
        while (item := await _next(queue, seconds)) is not end:
            yield cast("T | None", item)
        await reading
    finally:
        reading.cancel()


async def _next(queue: asyncio.Queue[T], seconds: float) -> T | None:
    try:
        async with asyncio.timeout(seconds):
            return await queue.get()
    except TimeoutError:
        return None
