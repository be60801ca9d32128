"""Engine threads over a runner that needs no device, and requests for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable

from live import make_engine

from glmjax.server.engine_thread import EngineThread, OutputStream
from glmjax.server.served import ServedModel
from glmjax.types import Request, SamplingParams


def request(name: str, count: int = 10) -> Request:
    return Request(name, (1, 2, 3), SamplingParams(max_new_tokens=count, ignore_eos=True))


async def tokens_of(stream: OutputStream) -> list[int]:
    return [token async for output in stream for token in output.token_ids]


@contextlib.asynccontextmanager
async def started(served: ServedModel, **options) -> AsyncIterator[EngineThread]:
    thread = EngineThread(make_engine(served, **options)[0])
    thread.start()
    try:
        yield thread
    finally:
        await asyncio.to_thread(thread.close)


async def idle(thread: EngineThread) -> None:
    while sum(thread.load()[:3]):
        await asyncio.sleep(0.005)


async def failure(work: Awaitable) -> BaseException:
    return (await asyncio.gather(work, return_exceptions=True))[0]
