"""The engine's thread from outside: calls between steps, pauses, and who watches."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter

import pytest
from engine_threads import failure, request, started, tokens_of
from live import PacedRunner, make_engine, make_limits, oracle

from glmjax.engine import Engine
from glmjax.errors import EngineStoppedError, InvalidRequestError
from glmjax.server.engine_thread import EngineState, EngineThread, Observer
from glmjax.server.served import ServedModel
from glmjax.types import FinishReason, Request

# calls


def name_of_thread(engine: Engine) -> str:
    return threading.current_thread().name


def test_a_call_runs_on_the_engines_thread(served: ServedModel):
    async def main() -> None:
        async with started(served, step_s=0.002) as thread:
            assert await thread.call(name_of_thread) == "engine", "idle"
            stream = await thread.submit(request("a", 3000))
            await anext(stream)
            assert await thread.call(name_of_thread) == "engine", "busy"
            stream.close()
            with pytest.raises(ZeroDivisionError):
                await thread.call(lambda engine: 1 // 0)
            assert thread.state is EngineState.RUNNING

    asyncio.run(main())


def test_calls_from_many_loops(served: ServedModel):
    thread = EngineThread(make_engine(served, step_s=0.001)[0])
    thread.start()
    counts = Counter[str]()

    def add(engine: Engine) -> int:
        counts["calls"] += 1  # no lock: all calls are on one thread
        time.sleep(0)
        return counts["calls"]

    async def many() -> list[int]:
        stream = await thread.submit(request(f"of {threading.get_ident()}", 50))
        numbers = await asyncio.gather(*(thread.call(add) for _ in range(50)))
        assert len(await tokens_of(stream)) == 50
        return numbers

    results: list[list[int]] = []
    loops = [threading.Thread(target=lambda: results.append(asyncio.run(many()))) for _ in range(4)]
    for loop in loops:
        loop.start()
    for loop in loops:
        loop.join()
    assert sorted(n for numbers in results for n in numbers) == list(range(1, 201))
    assert all(numbers == sorted(numbers) for numbers in results), "each loop's in its order"
    thread.close()


def test_a_call_sees_no_request_move(served: ServedModel):
    def watch(engine: Engine) -> bool:
        before = engine.counters()
        time.sleep(0.05)
        return engine.counters() == before

    async def main() -> None:
        async with started(served, step_s=0.001) as thread:
            stream = await thread.submit(request("a", 3000))
            await anext(stream)
            assert await thread.call(watch)
            stream.close()

    asyncio.run(main())


def test_calls_before_the_start_and_after_the_end(served: ServedModel):
    async def main() -> None:
        thread = EngineThread(make_engine(served)[0])
        with pytest.raises(EngineStoppedError, match="starting"):
            await thread.call(Engine.load)
        thread.start()
        assert (await thread.call(Engine.load)).running == 0
        assert await thread.drain(5)
        assert (await thread.call(Engine.load)).running == 0, "while it drains"
        await asyncio.to_thread(thread.close)
        with pytest.raises(EngineStoppedError, match="stopped"):
            await thread.call(Engine.load)

    asyncio.run(main())


def test_a_call_whose_turn_never_comes(served: ServedModel):
    async def main() -> None:
        thread = EngineThread(make_engine(served)[0])
        thread.start()
        begun, go_on = threading.Event(), threading.Event()

        def block(engine: Engine) -> str:
            begun.set()
            go_on.wait()
            return "done"

        first = asyncio.create_task(thread.call(block))
        await asyncio.to_thread(begun.wait)
        left = asyncio.create_task(thread.call(lambda engine: pytest.fail("it ran")))
        late = asyncio.create_task(thread.call(Engine.load))
        await asyncio.sleep(0)
        left.cancel()
        closing = asyncio.create_task(asyncio.to_thread(thread.close))
        while thread.state is not EngineState.STOPPED:
            await asyncio.sleep(0.001)
        go_on.set()
        assert await first == "done"
        assert isinstance(await failure(late), EngineStoppedError)
        await closing
        await asyncio.wait([left])
        assert left.cancelled()

    asyncio.run(main())


# a pause


def test_requests_wait_while_it_is_paused(served: ServedModel):
    async def main() -> None:
        async with started(served) as thread:
            await thread.call(Engine.pause)
            assert thread.snapshot().paused
            stream = await thread.submit(request("a", 5))
            reader = asyncio.create_task(tokens_of(stream))
            await asyncio.sleep(0.1)
            assert not reader.done()
            assert thread.load()[:2] == (0, 1)
            await thread.call(Engine.resume)
            assert await reader == oracle([1, 2, 3], 5)

    asyncio.run(main())


def test_a_deadline_ends_a_request_of_a_paused_engine(served: ServedModel):
    async def main() -> None:
        async with started(served) as thread:
            await thread.call(Engine.pause)
            deadline_s = time.monotonic() + 0.05
            stream = await thread.submit(Request("a", (1, 2), deadline_s=deadline_s))
            output = await asyncio.wait_for(anext(stream), 5)
            assert output.finish_reason is FinishReason.ABORT
            assert "deadline" in (output.error or "")

    asyncio.run(main())


def test_a_paused_engine_hardly_works(served: ServedModel):
    steps = 0

    class CountingEngine(Engine):
        def step(self):
            nonlocal steps
            steps += 1
            return super().step()

    async def main() -> None:
        thread = EngineThread(CountingEngine(PacedRunner(make_limits(served, 2))))
        thread.start()
        await thread.call(Engine.pause)
        stream = await thread.submit(request("a"))
        before = steps
        await asyncio.sleep(0.3)
        assert 2 <= steps - before <= 20
        stream.close()
        await asyncio.to_thread(thread.close)

    asyncio.run(main())


# an observer


class Notes(Observer):
    """Writes down what it sees."""

    def __init__(self) -> None:
        self.submitted = 0
        self.tokens = Counter[int]()
        self.ends: dict[int, FinishReason] = {}

    def began(self) -> int:
        self.submitted += 1
        return self.submitted - 1

    def output(self, ticket: int, new_tokens: int) -> None:
        assert ticket not in self.ends
        self.tokens[ticket] += new_tokens

    def ended(self, ticket: int, reason: FinishReason) -> None:
        assert ticket not in self.ends, "ended twice"
        self.ends[ticket] = reason


def test_the_observer_sees_each_request_once(served: ServedModel):
    notes = Notes()

    async def main() -> None:
        thread = EngineThread(make_engine(served, step_s=0.002)[0], notes)
        thread.start()
        assert len(await tokens_of(await thread.submit(request("whole", 20)))) == 20
        with pytest.raises(InvalidRequestError):
            await thread.submit(Request("refused", ()))
        for name in ("closed", "stopped", "aborted", "running"):
            stream = await thread.submit(request(name, 3000))
            await anext(stream)
            if name == "closed":
                stream.close()
            elif name == "stopped":
                stream.drop(name)
            elif name == "aborted":
                thread.abort(name)
        while len(notes.ends) < 4:
            await asyncio.sleep(0.002)
        await asyncio.to_thread(thread.close)

    asyncio.run(main())
    stop, abort = FinishReason.STOP, FinishReason.ABORT
    assert notes.submitted == 6
    assert notes.ends == {0: FinishReason.LENGTH, 2: abort, 3: stop, 4: abort, 5: abort}
    assert notes.tokens[0] == 20
    assert notes.tokens.keys() == {0, 2, 3, 4, 5}
