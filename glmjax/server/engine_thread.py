"""The one thread that owns the engine, and its bridge to asyncio."""

from __future__ import annotations

import asyncio
import concurrent.futures
import enum
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from glmjax.engine import Engine
from glmjax.errors import EngineStoppedError, GlmjaxError, InvalidRequestError
from glmjax.plans import Limits
from glmjax.server.output_stream import OutputStream
from glmjax.types import EngineCounters, EngineLoad, FinishReason, Request, RequestOutput

log = logging.getLogger(__name__)

PAUSED_POLL_S = 0.02  # how late the end of a deadline may be seen while paused

T = TypeVar("T")


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


class Snapshot(NamedTuple):
    """What an engine told of itself after its last step.

    Attributes:
        load: how busy it was.
        counters: what it had done.
        paused: whether it launched nothing new.
        weight_version: of the weights of its next step.
    """

    load: EngineLoad
    counters: EngineCounters
    paused: bool
    weight_version: str

    @classmethod
    def of(cls, engine: Engine) -> Snapshot:
        """As `engine` is now; on the thread that owns it."""
        return cls(engine.load(), engine.counters(), engine.paused, engine.weight_version)


class Observer:
    """Sees every request come and go; this one does nothing with it.

    `began` is called on the thread that submits, for a request that may yet be refused; all else on
    the engine's thread, and so it must be quick.
    """

    def began(self) -> Any:
        """A request is submitted. What is returned stands for it in the other calls."""

    def output(self, ticket: Any, new_tokens: int) -> None:
        """A step gave a request this many tokens, 1 or more."""

    def ended(self, ticket: Any, reason: FinishReason) -> None:
        """A request ended, as its client sees it: a stop string is a STOP."""


class EngineThread:
    """Runs an engine on a thread of its own, which sleeps while there is nothing to do.

    All methods may be called from any thread; the asynchronous ones from any event loop.

    Args:
        engine: from here on only this may touch it.
        observer: sees its requests.
    """

    def __init__(self, engine: Engine, observer: Observer | None = None):
        self._engine = engine
        self._observer = observer or Observer()
        self._snapshot = Snapshot.of(engine)
        self._state = EngineState.STARTING
        self._cause = ""
        self._changed = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._streams: dict[str, OutputStream] = {}
        self._tickets: dict[str, Any] = {}  # of requests whose end the observer has not seen
        self._calls: set[concurrent.futures.Future[Any]] = set()
        self._watchers: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def state(self) -> EngineState:
        """Where the engine is in its life."""
        return self._state

    @property
    def limits(self) -> Limits:
        """What the engine's runner offers."""
        return self._engine.limits

    def snapshot(self) -> Snapshot:
        """What the engine told of itself after its last step or call."""
        return self._snapshot

    def load(self) -> EngineLoad:
        """How busy the engine was after its last step or call."""
        return self._snapshot.load

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
        stream = OutputStream([request.id for request in requests], self._leave)
        tickets = [self._observer.began() for _ in requests]
        with self._changed:
            if self._state is not EngineState.RUNNING:
                raise self._refusal()
            for request in requests:
                if request.id in self._streams:
                    raise InvalidRequestError(f"request id {request.id!r} is in use")
            self._streams.update({request.id: stream for request in requests})
            self._post(partial(self._add, requests, tickets, stream))
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

    async def call(self, function: Callable[[Engine], T]) -> T:
        """Run a function on the engine's thread, between two steps; also while it is paused.

        Args:
            function: takes the engine. No request moves until it returns.

        Returns:
            What it returns. Cancelled before it began, it does not run.

        Raises:
            EngineStoppedError: the engine is not running, or ended before the function's turn.
            Exception: what the function raised.
        """
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._changed:
            if self._state not in (EngineState.RUNNING, EngineState.DRAINING):
                raise self._refusal()
            self._calls.add(done)
            self._post(partial(self._answer, function, done))
        return await asyncio.wrap_future(done)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those that run; False: some did not end in time.

        A paused engine goes on: what waits for it is to end.
        """
        with self._changed:
            if self._state in (EngineState.STARTING, EngineState.RUNNING):
                self._set_state(EngineState.DRAINING)
                self._post(self._engine.resume)
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

    def fail(self, cause: str) -> None:
        """End all requests with EngineStoppedError: the engine's thread may never come back."""
        self._cause = cause
        self._set_state(EngineState.FAILED)
        self._end_streams()

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
                self._snapshot = Snapshot.of(self._engine)
                self._deliver(outputs)
        except Exception as error:
            log.exception("the engine failed; every request ends and the server must be restarted")
            known = isinstance(error, GlmjaxError)
            self._cause = str(error) if known else f"{type(error).__name__}: {error}"
            self._set_state(EngineState.FAILED)
        self._end_all()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False: stop.

        Paused, steps only see who has run out of time: no need to hurry.
        """
        idle = not self._engine.has_work()
        with self._changed:
            if idle or self._engine.paused:
                self._changed.wait_for(self._is_called, None if idle else PAUSED_POLL_S)
            return self._state in (EngineState.RUNNING, EngineState.DRAINING)

    def _is_called(self) -> bool:
        ended = (EngineState.STOPPED, EngineState.FAILED)
        return bool(self._commands) or self._state in ended

    def _run_commands(self) -> None:
        with self._changed:
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()

    def _answer(self, function: Callable[[Engine], T], done: concurrent.futures.Future[T]) -> None:
        self._calls.discard(done)
        if not done.set_running_or_notify_cancel():
            return
        try:
            result = function(self._engine)
            self._snapshot = Snapshot.of(self._engine)  # for who looks once this is answered
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(result)

    def _leave(self, request_id: str, reason: FinishReason) -> None:
        with self._changed:
            self._post(partial(self._end, request_id, reason))

    def _end(self, request_id: str, reason: FinishReason) -> None:
        """End a request whose client has left."""
        self._observe_end(request_id, reason)
        self._engine.abort(request_id)

    def _add(
        self, requests: Sequence[Request], tickets: Iterable[Any], stream: OutputStream
    ) -> None:
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
            self._tickets.update(zip(added, tickets, strict=True))
            _call_soon(stream.loop, stream.accept)

    def _deliver(self, outputs: Iterable[RequestOutput]) -> None:
        """Hand outputs to their streams: one call for each loop, however many tokens."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[OutputStream, RequestOutput]]] = {}
        for output in outputs:
            self._observe(output)
            stream = self._streams.get(output.request_id)
            if stream is not None:
                batches.setdefault(stream.loop, []).append((stream, output))
        for loop, batch in batches.items():
            _call_soon(loop, _hand_over, batch)
        self._forget(o.request_id for o in outputs if o.finish_reason is not None)

    def _observe(self, output: RequestOutput) -> None:
        if output.token_ids and output.request_id in self._tickets:
            self._observer.output(self._tickets[output.request_id], len(output.token_ids))
        if output.finish_reason is not None:
            self._observe_end(output.request_id, output.finish_reason)

    def _observe_end(self, request_id: str, reason: FinishReason) -> None:
        if request_id in self._tickets:
            self._observer.ended(self._tickets.pop(request_id), reason)

    def _forget(self, request_ids: Iterable[str]) -> None:
        with self._changed:
            had_streams = bool(self._streams)
            for request_id in request_ids:
                self._streams.pop(request_id, None)
            if had_streams and not self._streams:
                self._tell_watchers()

    def _end_all(self) -> None:
        self._end_streams()
        for request_id in list(self._tickets):
            self._observe_end(request_id, FinishReason.ABORT)

    def _end_streams(self) -> None:
        with self._changed:
            streams, calls = set(self._streams.values()), self._calls
            self._streams, self._calls = {}, set()
            message = str(self._refusal())
            self._tell_watchers()
        for stream in streams:
            _call_soon(stream.loop, stream.fail, EngineStoppedError(message))
        for done in calls:
            if done.set_running_or_notify_cancel():
                done.set_exception(EngineStoppedError(message))


def _hand_over(batch: list[tuple[OutputStream, RequestOutput]]) -> None:
    for stream, output in batch:
        stream.put(output)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args) -> None:
    """Call `function` on a loop; a loop that was closed has nobody left to tell."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        log.debug("an event loop closed before its requests ended")
