"""API keys of the HTTP server."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from glmjax.server.access import Access

OPEN = ("/health", "/metrics")  # to probes and monitors


class KeyRefusedError(HTTPException):
    """No key, or one that is not known. HTTP 401."""

    code = "invalid_api_key"

    def __init__(self, message: str):
        super().__init__(401, message, {"www-authenticate": "Bearer"})


class KeyCheck:
    """An application that only holders of a key reach; no body is read before that."""

    def __init__(self, app: ASGIApp, access: Access):
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or raise KeyRefusedError."""
        if scope["path"] not in OPEN:
            why = self._access.refusal(Headers(scope=scope).items())
            if why is not None:
                raise KeyRefusedError(why)
        await self._app(scope, receive, send)
