"""Both servers on one event loop, from the first listener to the last request drained."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial

from glmjax.engine import Engine
from glmjax.server.access import Access
from glmjax.server.engine_thread import EngineThread
from glmjax.server.frontend import Frontend
from glmjax.server.grpc.server import grpc_server
from glmjax.server.http.server import HttpServer, listen
from glmjax.server.request_times import RequestTimes
from glmjax.server.served import ServedModel

log = logging.getLogger(__name__)

Watch = Callable[[Callable[[], object], Callable[[str], None]], None]


@dataclass(frozen=True)
class Running:
    """Servers that are up.

    Attributes:
        frontend: what they share.
        http: the HTTP server's task; it ends only when it fails.
        http_port, grpc_port: where they listen.
    """

    frontend: Frontend
    http: asyncio.Task[None]
    http_port: int
    grpc_port: int


@contextlib.asynccontextmanager
async def running(
    engine: Engine, served: ServedModel, access: Access, host: str, port: int, grpc_port: int
) -> AsyncIterator[Running]:
    """Serve until left; leaving ends requests that still run. Port 0 takes a free one.

    Raises:
        ConfigError: an address is taken or not of this machine.
    """
    times = RequestTimes()
    frontend = Frontend(EngineThread(engine, times), served)
    with listen(host, port) as sock:
        http = HttpServer(frontend, times, access)
        async with grpc_server(frontend, host, grpc_port, access) as bound:
            task = asyncio.create_task(http.serve(sockets=[sock]))
            try:
                await _first(http.ready.wait(), asyncio.shield(task))
                frontend.engine.start()
                yield Running(frontend, task, sock.getsockname()[1], bound)
            finally:
                await asyncio.to_thread(frontend.engine.close)
                http.should_exit = True
                await task


def check_free(host: str, *ports: int) -> None:
    """Raise ConfigError now, not after minutes of loading, when `serve` could not listen."""
    with contextlib.ExitStack() as held:  # all at once, so that two equal ports are seen too
        for port in ports:
            held.enter_context(listen(host, port))


async def serve(
    engine: Engine,
    served: ServedModel,
    access: Access,
    host: str = "127.0.0.1",
    port: int = 30000,
    grpc_port: int = 30001,
    drain_timeout_s: float = 60.0,
    watch: Watch | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return. A second signal ends at once.

    While it drains, the listeners stay up: health says unhealthy, new requests are refused, those
    that run finish, at the latest after `drain_timeout_s`. Must be called in the main thread.

    Args:
        access: who may use the servers.
        watch: is given, once this serves, what asks it to drain, as often as one likes, and what
            ends all requests with words; both for any thread.

    Raises:
        ConfigError: an address is taken or not of this machine.
    """
    with _stops_on_signals() as stop:
        async with running(engine, served, access, host, port, grpc_port) as servers:
            log.info(
                "ready: %s at http://%s:%d (OpenAI, Anthropic, SGLang) and grpc://%s:%d "
                "(SglangScheduler), %s",
                *(served.name, host, servers.http_port, host, servers.grpc_port, access),
            )
            if watch is not None:
                loop = asyncio.get_running_loop()
                drain = partial(loop.call_soon_threadsafe, stop.asked.set)
                watch(drain, servers.frontend.engine.fail)
            await _first(stop.asked.wait(), asyncio.shield(servers.http))
            load = servers.frontend.engine.load()
            log.info(
                "draining: %d requests run or wait; at most %g s, a second signal ends at once",
                *(load.running + load.waiting, drain_timeout_s),
            )
            await _first(stop.urged.wait(), servers.frontend.engine.drain(drain_timeout_s))
    log.info("stopped")


class _Stop:
    """What this process was told.

    Attributes:
        asked: to drain, by a signal or by another host.
        urged: to end at once, by its own second signal: that others were told so too, as when a
            whole group of hosts is stopped, hurries nothing.
    """

    def __init__(self) -> None:
        self.asked, self.urged = asyncio.Event(), asyncio.Event()
        self._signalled = False

    def signal(self) -> None:
        """SIGTERM or SIGINT came."""
        if self._signalled:
            self.urged.set()
        self._signalled = True
        self.asked.set()


@contextlib.contextmanager
def _stops_on_signals() -> Iterator[_Stop]:
    """Tells of each SIGTERM and SIGINT."""
    loop, stop = asyncio.get_running_loop(), _Stop()
    kinds = (signal.SIGTERM, signal.SIGINT)
    for kind in kinds:
        loop.add_signal_handler(kind, stop.signal)
    try:
        yield stop
    finally:
        for kind in kinds:
            loop.remove_signal_handler(kind)


async def _first(*awaitables: Awaitable[object]) -> None:
    """Wait until one is done, and cancel the others. Raises what it raised."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
