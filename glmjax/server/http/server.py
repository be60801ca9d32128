"""The HTTP server: OpenAI's APIs, Anthropic's, SGLang's and the metrics, on one uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from glmjax.errors import ConfigError
from glmjax.server import metrics
from glmjax.server.access import Access
from glmjax.server.anthropic import api as anthropic_api
from glmjax.server.frontend import Frontend
from glmjax.server.http import unserved_paths, welcome
from glmjax.server.http.description import describe
from glmjax.server.http.errors import add_error_handlers
from glmjax.server.http.keys import KeyCheck
from glmjax.server.info import VERSION
from glmjax.server.openai import api as openai_api
from glmjax.server.request_times import RequestTimes
from glmjax.server.responses import api as responses_api
from glmjax.server.responses.kept import KeptItems
from glmjax.server.sglang import admin_api, reading_api
from glmjax.server.sglang import api as sglang_api

BACKLOG = 2048
APIS = (
    openai_api,
    responses_api,
    anthropic_api,
    sglang_api,
    reading_api,
    admin_api,
    metrics,
    welcome,
)


class App(FastAPI):
    """An application with a description of its own."""

    def openapi(self) -> dict[str, Any]:
        """What /openapi.json says; made once, when it is asked for."""
        model, keyed = self.state.frontend.served.name, bool(self.state.access.keys)
        self.openapi_schema = self.openapi_schema or describe(self, model, keyed)
        return self.openapi_schema


def create_app(frontend: Frontend, times: RequestTimes, access: Access) -> FastAPI:
    """The application over a front end; `times` observes its requests, `access` admits them."""
    app = App(
        version=VERSION,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.frontend = frontend
    app.state.access = access
    app.state.kept_items = KeptItems()
    app.state.times = times
    app.state.metrics = metrics.EngineCollector(frontend.served.name, frontend.engine, times)
    for api in APIS:
        app.include_router(api.router)
    app.router.default = unserved_paths.refuse
    add_error_handlers(app)
    app.router.middleware_stack = KeyCheck(app.router.middleware_stack, access)
    return app


def for_browsers(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """`app` with what browsers ask for before they let pages of `origins` read any answer."""
    if not origins:
        return app
    every = ("*",)
    return CORSMiddleware(
        app, origins, allow_methods=every, allow_headers=every, expose_headers=every
    )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ConfigError: the address is taken or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another port"
        ) from None
    # Connections inherit it. asyncio sets it only on sockets that it made itself, and without it
    # an answer in two writes waits 40 ms for the client's delayed acknowledgement.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: whoever owns the loop decides when to stop."""

    def __init__(self, frontend: Frontend, times: RequestTimes, access: Access, grace_s: int = 5):
        super().__init__(
            uvicorn.Config(
                for_browsers(create_app(frontend, times, access), access.origins),
                lifespan="off",
                ws="none",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=grace_s,
            )
        )
        self.ready = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()
