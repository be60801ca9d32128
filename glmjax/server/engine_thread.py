"""The one thread that owns the engine, and its bridge to asyncio."""

from __future__ import annotations

import asyncio
import enum
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

from glmjax.engine import Engine
from glmjax.errors import EngineStoppedError, GlmjaxError, InvalidRequestError
from glmjax.types import EngineLoad, Request, RequestOutput

log = logging.getLogger(__name__)


class EngineState(enum.StrEnum):
    """Where an engine is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"


REFUSALS = {
    EngineState.STARTING: "the server is starting; try again in a while",
    EngineState.DRAINING: "the server is shutting down and takes no new requests",
    EngineState.FAILED: "the engine has failed ({cause}) and the server must be restarted",
    EngineState.STOPPED: "the server has stopped",
}


class OutputStream:
    """Outputs of requests that were submitted together, in the order they became known.

    Belongs to the event loop it was made on. Ends when all its requests have ended; closing it
    early, or cancelling whoever waits for it, aborts them.
    """

    def __init__(self, request_ids: Iterable[str], abort: Callable[[str], None]):
        self.loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[None] = self.loop.create_future()
        self._open = set(request_ids)
        self._abort = abort
        self._outputs: deque[RequestOutput] = deque()
        self._error: Exception | None = None
        self._news = asyncio.Event()

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> RequestOutput:
        """The next output. Raises EngineStoppedError when the engine ended before the requests."""
        try:
            while self._open and not self._outputs and self._error is None:
                self._news.clear()
                await self._news.wait()
        except asyncio.CancelledError:
            self.close()
            raise
        if self._outputs:
            return self._take()
        if self._open and self._error is not None:
            raise self._error
        raise StopAsyncIteration

    def drop(self, request_id: str) -> None:
        """Abort one request and forget what it still puts out."""
        if request_id in self._open:
            self._open.discard(request_id)
            self._outputs = deque(o for o in self._outputs if o.request_id != request_id)
            self._news.set()
            self._abort(request_id)

    def close(self) -> None:
        """Abort what has not ended."""
        for request_id in list(self._open):
            self.drop(request_id)

    def put(self, output: RequestOutput) -> None:
        """Hand over an output; on the stream's loop."""
        if output.request_id in self._open:
            self._outputs.append(output)
            self._news.set()

    def fail(self, error: Exception) -> None:
        """End the stream with an error, after what it already holds; on the stream's loop."""
        self._error = error
        self._news.set()
        if not self.accepted.done():
            self.accepted.set_exception(error)

    def accept(self) -> None:
        """Say that the engine has taken the requests; on the stream's loop."""
        if not self.accepted.done():
            self.accepted.set_result(None)

    def _take(self) -> RequestOutput:
        output = self._outputs.popleft()
        if output.finish_reason is not None:
            self._open.discard(output.request_id)
        return output


class EngineThread:
    """Runs an engine on a thread of its own, which sleeps while there is nothing to do.

    All methods may be called from any thread; the asynchronous ones from any event loop.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._load = engine.load()
        self._state = EngineState.STARTING
        self._cause = ""
        self._changed = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._streams: dict[str, OutputStream] = {}
        self._watchers: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def state(self) -> EngineState:
        """Where the engine is in its life."""
        return self._state

    def load(self) -> EngineLoad:
        """How busy the engine was after its last step."""
        return self._load

    def start(self) -> None:
        """Begin to serve."""
        self._set_state(EngineState.RUNNING)
        self._thread.start()

    async def submit(self, *requests: Request) -> OutputStream:
        """Queue requests, all of them or none; their outputs come from the stream.

        Raises:
            InvalidRequestError: one can never be served, or its id is in use.
            QueueFullError: too many are waiting.
            EngineStoppedError: the engine is not running.
        """
        stream = OutputStream([request.id for request in requests], self.abort)
        with self._changed:
            if self._state is not EngineState.RUNNING:
                raise self._refusal()
            for request in requests:
                if request.id in self._streams:
                    raise InvalidRequestError(f"request id {request.id!r} is in use")
            self._streams.update({request.id: stream for request in requests})
            self._post(partial(self._add, requests, stream))
        try:
            await stream.accepted
        except asyncio.CancelledError:
            stream.close()
            raise
        return stream

    def abort(self, request_id: str) -> None:
        """End a request early; its stream says so. Unknown ids are ignored."""
        with self._changed:
            self._post(partial(self._engine.abort, request_id))

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those that run; False: some did not end in time."""
        if self._state in (EngineState.STARTING, EngineState.RUNNING):
            self._set_state(EngineState.DRAINING)
        try:
            async with asyncio.timeout(timeout_s):
                await self.wait_until(
                    lambda: not self._streams or self._state is not EngineState.DRAINING
                )
        except TimeoutError:
            return False
        return True

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        """Wait for `holds`, which is asked when the state changes and when all requests ended."""
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        watcher = partial(_call_soon, loop, news.set)
        with self._changed:
            self._watchers.append(watcher)
        try:
            while not holds():
                await news.wait()
                news.clear()
        finally:
            with self._changed:
                self._watchers.remove(watcher)

    def close(self) -> None:
        """Stop after the step that runs; requests that have not ended get EngineStoppedError."""
        if self._state is not EngineState.FAILED:
            self._set_state(EngineState.STOPPED)
        if self._thread.is_alive():
            self._thread.join()

    # what follows runs on the engine's thread, or holds the lock

    def _post(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._changed.notify_all()

    def _set_state(self, state: EngineState) -> None:
        with self._changed:
            self._state = state
            self._changed.notify_all()
            self._tell_watchers()

    def _tell_watchers(self) -> None:
        for watcher in self._watchers:
            watcher()

    def _refusal(self) -> EngineStoppedError:
        return EngineStoppedError(REFUSALS[self._state].format(cause=self._cause))

    def _run(self) -> None:
        try:
            while self._wait():
                self._run_commands()
                outputs = self._engine.step() if self._engine.has_work() else []
                self._load = self._engine.load()
                self._deliver(outputs)
        except Exception as error:
            log.exception("the engine failed; every request ends and the server must be restarted")
            self._cause = f"{type(error).__name__}: {error}"
            self._set_state(EngineState.FAILED)
        self._end_streams()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False: stop."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._commands or self._state is EngineState.STOPPED or self._engine.has_work()
                )
            )
            return self._state is not EngineState.STOPPED

    def _run_commands(self) -> None:
        with self._changed:
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()

    def _add(self, requests: Iterable[Request], stream: OutputStream) -> None:
        added: list[str] = []
        try:
            for request in requests:
                self._engine.add(request)
                added.append(request.id)
        except Exception as error:  # told to the caller: one odd request must not end the rest
            if not isinstance(error, GlmjaxError):
                log.exception("the engine could not take a request")
            for request_id in added:
                self._engine.abort(request_id)
            self._forget(request.id for request in requests)
            _call_soon(stream.loop, stream.fail, error)
        else:
            _call_soon(stream.loop, stream.accept)

    def _deliver(self, outputs: Iterable[RequestOutput]) -> None:
        """Hand outputs to their streams: one call for each loop, however many tokens."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[OutputStream, RequestOutput]]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                batches.setdefault(stream.loop, []).append((stream, output))
        for loop, batch in batches.items():
            _call_soon(loop, _hand_over, batch)
        self._forget(o.request_id for o in outputs if o.finish_reason is not None)

    def _forget(self, request_ids: Iterable[str]) -> None:
        with self._changed:
            had_streams = bool(self._streams)
            for request_id in request_ids:
                self._streams.pop(request_id, None)
            if had_streams and not self._streams:
                self._tell_watchers()

    def _end_streams(self) -> None:
        with self._changed:
            streams = set(self._streams.values())
            self._streams.clear()
            error = self._refusal()
            self._tell_watchers()
        for stream in streams:
            _call_soon(stream.loop, stream.fail, EngineStoppedError(str(error)))


def _hand_over(batch: list[tuple[OutputStream, RequestOutput]]) -> None:
    for stream, output in batch:
        stream.put(output)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args) -> None:
    """Call `function` on a loop; a loop that was closed has nobody left to tell."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        log.debug("an event loop closed before its requests ended")
