"""The engine's thread: streams, refusals, ends, and how little it says to the event loop."""

from __future__ import annotations

import asyncio

import pytest
from engine_threads import failure, idle, request, started, tokens_of
from live import PacedRunner, make_engine, make_limits, oracle

from glmjax.engine import Engine
from glmjax.errors import EngineStoppedError, InvalidRequestError, QueueFullError
from glmjax.plans import StepPlan
from glmjax.runner.fake import FakeHandle
from glmjax.server.engine_thread import EngineState, EngineThread
from glmjax.server.served import ServedModel
from glmjax.types import FinishReason, Request


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


class StumblingRunner(PacedRunner):
    """A runner that fails as many steps as `stumbles` says, and then works again."""

    stumbles = 0

    def launch(self, plan: StepPlan) -> FakeHandle:
        if self.stumbles:
            self.stumbles -= 1
            raise RuntimeError("the device has stumbled")
        return super().launch(plan)


def test_a_failing_step_ends_its_requests_only(served: ServedModel, caplog):
    async def main() -> None:
        runner = StumblingRunner(make_limits(served, 2), 0.002)
        thread = EngineThread(Engine(runner))
        thread.start()
        running = [await thread.submit(request(f"r{i}", 3000)) for i in range(2)]
        await asyncio.gather(*map(anext, running))
        waiting = await thread.submit(request("waiting", 5))
        runner.stumbles = 1
        for stream in running:
            *_, last = [output async for output in stream]
            assert last.finish_reason is FinishReason.ABORT
            assert "RuntimeError: the device has stumbled" in (last.error or "")
        assert await tokens_of(waiting) == oracle([1, 2, 3], 5)
        assert thread.state is EngineState.RUNNING
        assert thread.snapshot().counters.failed_requests == 2
        await asyncio.to_thread(thread.close)

    asyncio.run(main())
    assert "the device has stumbled" in caplog.text


class LostRunner(PacedRunner):
    """A runner that cannot be brought back after a step that failed."""

    def reset(self) -> None:
        if self.launched:
            raise RuntimeError("the device is gone")
        super().reset()


def lost_engine(served: ServedModel, step_s: float) -> tuple[Engine, LostRunner]:
    runner = LostRunner(make_limits(served, 8), step_s)
    return Engine(runner), runner


def test_an_engine_that_cannot_go_on(served: ServedModel, caplog: pytest.LogCaptureFixture):
    async def main() -> None:
        engine, runner = lost_engine(served, 0.002)
        thread = EngineThread(engine)
        thread.start()
        streams = [await thread.submit(request(f"r{i}", 3000)) for i in range(3)]
        await anext(streams[0])
        runner.broken = True
        results = await asyncio.gather(*map(tokens_of, streams), return_exceptions=True)
        for result in results:
            assert isinstance(result, EngineStoppedError)
            assert "RuntimeError: the device is on fire" in str(result)
            assert "the device is gone" in str(result)
        assert thread.state is EngineState.FAILED
        with pytest.raises(EngineStoppedError, match="on fire"):
            await thread.submit(request("after"))
        with pytest.raises(EngineStoppedError, match="on fire"):
            await thread.call(Engine.load)
        assert await thread.drain(1)
        thread.close()
        assert thread.state is EngineState.FAILED

    asyncio.run(main())
    assert "Traceback" in caplog.text
    assert "the server must be restarted" in caplog.text


def test_what_waits_when_the_engine_fails(served: ServedModel):
    async def main() -> None:
        engine, runner = lost_engine(served, 0.05)
        thread = EngineThread(engine)
        thread.start()
        stream = await thread.submit(request("first", 3000))
        await anext(stream)
        runner.broken = True
        results = await asyncio.gather(
            *(thread.submit(request(f"r{i}")) for i in range(3)), return_exceptions=True
        )
        ends = [r if isinstance(r, BaseException) else await failure(tokens_of(r)) for r in results]
        assert all(isinstance(end, EngineStoppedError) for end in ends)
        thread.close()

    asyncio.run(main())


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
