"""Streams that pause."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from glmjax.server.anthropic.pauses import with_pauses


def test_pauses_are_told_and_nothing_is_lost():
    async def main() -> list[int | None]:
        paused = asyncio.Event()

        async def items() -> AsyncIterator[int]:
            yield 1
            await paused.wait()
            yield 2
            yield 3

        got = []
        async for item in with_pauses(items(), 0.001):
            got.append(item)
            if got.count(None) == 3:
                paused.set()
        return got

    got = asyncio.run(main())
    assert [item for item in got if item] == [1, 2, 3]
    assert got[:4] == [1, None, None, None]


def test_errors_come_behind_what_came_before():
    async def items() -> AsyncIterator[int]:
        yield 1
        raise KeyError("x")

    async def main() -> None:
        paced = with_pauses(items(), 10)
        assert await anext(paced) == 1
        with pytest.raises(KeyError):
            await anext(paced)

    asyncio.run(main())


def test_who_leaves_ends_it():
    async def main() -> None:
        ended = asyncio.Event()

        async def items() -> AsyncIterator[int]:
            try:
                yield 1
                await asyncio.Event().wait()
            finally:
                ended.set()

        paced = with_pauses(items(), 0.001)
        async for item in paced:
            if item is None:
                break
        await paced.aclose()  # type: ignore[attr-defined]
        await ended.wait()

    asyncio.run(asyncio.wait_for(main(), 5))
