"""The engine's thread: streams, refusals, ends, and how little it says to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine

import pytest
from live import PacedRunner, make_engine, make_limits, oracle

from glmjax.engine import Engine
from glmjax.errors import EngineStoppedError, InvalidRequestError, QueueFullError
from glmjax.server.engine_thread import EngineState, EngineThread, OutputStream
from glmjax.server.served import ServedModel
from glmjax.types import FinishReason, Request, SamplingParams


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


def test_outputs_of_many_at_once(served: ServedModel):
    async def main() -> None:
        async with started(served) as thread:
            streams = [await thread.submit(request(f"r{i}", 5 + i)) for i in range(12)]
            results = await asyncio.gather(*map(tokens_of, streams))
            assert results == [oracle([1, 2, 3], 5 + i) for i in range(12)]

    asyncio.run(main())


def test_requests_submitted_together_share_a_stream(served: ServedModel):
    async def main() -> None:
        async with started(served) as thread:
            stream = await thread.submit(request("a", 3), request("b", 5))
            counts = {}
            async for output in stream:
                counts[output.request_id] = output.completion_tokens
            assert counts == {"a": 3, "b": 5}

    asyncio.run(main())


def test_refusals_come_at_the_call(served: ServedModel):
    async def main() -> None:
        async with started(served, slots=1, queue=1, step_s=0.002) as thread:
            with pytest.raises(InvalidRequestError, match="the prompt is empty"):
                await thread.submit(Request("x", ()))
            with pytest.raises(InvalidRequestError, match="the prompt is empty"):
                await thread.submit(request("good"), Request("bad", ()))
            await idle(thread)  # none of the two runs
            running = await thread.submit(request("running", 3000))
            await anext(running)
            with pytest.raises(InvalidRequestError, match="'running' is in use"):
                await thread.submit(request("running"))
            waiting = await thread.submit(request("waiting"))
            with pytest.raises(QueueFullError, match="try again later"):
                await thread.submit(request("too many"))
            running.close()
            assert len(await tokens_of(waiting)) == 10

    asyncio.run(main())


@pytest.mark.parametrize("leave", ["close", "cancel", "abort", "drop"])
def test_leaving_early_frees_the_slot(served: ServedModel, leave: str):
    async def main() -> None:
        async with started(served, slots=1, step_s=0.002) as thread:
            stream = await thread.submit(request("long", 3000))
            reader = asyncio.create_task(tokens_of(stream))
            await asyncio.sleep(0.02)
            ways = {
                "close": stream.close,
                "cancel": reader.cancel,
                "abort": lambda: thread.abort("long"),
                "drop": lambda: stream.drop("long"),
            }
            ways[leave]()
            await asyncio.wait([reader])
            assert len(await tokens_of(await thread.submit(request("next", 5)))) == 5
            await idle(thread)

    asyncio.run(main())


def test_an_abort_is_told(served: ServedModel):
    async def main() -> None:
        async with started(served, step_s=0.002) as thread:
            stream = await thread.submit(request("a", 3000))
            await anext(stream)
            thread.abort("a")
            thread.abort("unknown")
            outputs = [output async for output in stream]
            assert outputs[-1].finish_reason is FinishReason.ABORT

    asyncio.run(main())


def test_a_submission_that_is_cancelled_does_not_run(served: ServedModel):
    async def main() -> None:
        async with started(served, step_s=0.05) as thread:
            first = await thread.submit(request("first", 20))
            await anext(first)
            pending = asyncio.create_task(thread.submit(request("second", 3000)))
            await asyncio.sleep(0)
            pending.cancel()
            await asyncio.wait([pending])
            assert pending.cancelled()
            first.close()
            await idle(thread)

    asyncio.run(main())


def test_draining(served: ServedModel):
    async def main() -> None:
        async with started(served, step_s=0.002) as thread:
            stream = await thread.submit(request("a", 30))
            reader = asyncio.create_task(tokens_of(stream))
            drained = asyncio.create_task(thread.drain(20))
            await asyncio.sleep(0)
            with pytest.raises(EngineStoppedError, match="shutting down"):
                await thread.submit(request("late"))
            assert await drained
            assert len(await reader) == 30
            assert await thread.drain(0.01), "a second time, with nothing to wait for"

    asyncio.run(main())


def test_draining_takes_only_so_long(served: ServedModel):
    async def main() -> None:
        async with started(served, step_s=0.002) as thread:
            stream = await thread.submit(request("a", 4000))
            assert not await thread.drain(0.02)
            await asyncio.to_thread(thread.close)
            with pytest.raises(EngineStoppedError, match="stopped"):
                await tokens_of(stream)

    asyncio.run(main())


def test_before_the_start(served: ServedModel):
    async def main() -> None:
        thread = EngineThread(make_engine(served)[0])
        with pytest.raises(EngineStoppedError, match="starting"):
            await thread.submit(request("early"))
        thread.close()

    asyncio.run(main())


def test_a_failing_step_ends_every_request(served: ServedModel, caplog: pytest.LogCaptureFixture):
    async def main() -> None:
        engine, runner = make_engine(served, step_s=0.002)
        thread = EngineThread(engine)
        thread.start()
        streams = [await thread.submit(request(f"r{i}", 3000)) for i in range(3)]
        await anext(streams[0])
        runner.broken = True
        results = await asyncio.gather(*map(tokens_of, streams), return_exceptions=True)
        for result in results:
            assert isinstance(result, EngineStoppedError)
            assert "RuntimeError: the device is on fire" in str(result)
        assert thread.state is EngineState.FAILED
        with pytest.raises(EngineStoppedError, match="on fire"):
            await thread.submit(request("after"))
        assert await thread.drain(1)
        thread.close()
        assert thread.state is EngineState.FAILED

    asyncio.run(main())
    assert "Traceback" in caplog.text
    assert "the device is on fire" in caplog.text


def test_submissions_that_wait_when_a_step_fails(served: ServedModel):
    async def main() -> None:
        engine, runner = make_engine(served, step_s=0.05)
        thread = EngineThread(engine)
        thread.start()
        stream = await thread.submit(request("first", 3000))
        await anext(stream)
        runner.broken = True
        results = await asyncio.gather(
            *(thread.submit(request(f"r{i}")) for i in range(3)), return_exceptions=True
        )
        ends = [r if isinstance(r, Exception) else await failure(tokens_of(r)) for r in results]
        assert all(isinstance(end, EngineStoppedError) for end in ends)
        thread.close()

    asyncio.run(main())


async def failure(work: Coroutine) -> BaseException:
    return (await asyncio.gather(work, return_exceptions=True))[0]


def test_one_call_a_step_reaches_the_loop(served: ServedModel):
    calls = 0

    class CountingLoop(asyncio.SelectorEventLoop):
        def call_soon_threadsafe(self, callback, *args, context=None):
            nonlocal calls
            calls += 1
            return super().call_soon_threadsafe(callback, *args, context=context)

    async def main() -> int:
        engine, runner = make_engine(served, slots=8)
        thread = EngineThread(engine)
        thread.start()
        streams = [await thread.submit(request(f"r{i}", 40)) for i in range(8)]
        counts = [len(tokens) for tokens in await asyncio.gather(*map(tokens_of, streams))]
        assert counts == [40] * 8
        thread.close()
        return runner.launched

    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        launched = runner.run(main())
    assert calls <= launched + 8  # a call a step, and one to accept each request


def test_an_idle_engine_sleeps(served: ServedModel):
    looks = 0

    class CountingEngine(Engine):
        def has_work(self) -> bool:
            nonlocal looks
            looks += 1
            return super().has_work()

    async def main() -> None:
        thread = EngineThread(CountingEngine(PacedRunner(make_limits(served, 2))))
        thread.start()
        await tokens_of(await thread.submit(request("a")))
        await idle(thread)
        await asyncio.sleep(0.02)
        before = looks
        await asyncio.sleep(0.1)
        assert looks == before
        thread.close()

    asyncio.run(main())


def test_a_loop_that_closes_early(served: ServedModel):
    thread = EngineThread(make_engine(served, slots=1, step_s=0.002)[0])
    thread.start()

    async def leave() -> None:
        await thread.submit(request("abandoned", 50))

    async def stay() -> None:
        assert len(await tokens_of(await thread.submit(request("next", 5)))) == 5

    asyncio.run(leave())
    asyncio.run(stay())
    thread.close()
