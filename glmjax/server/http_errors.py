"""Errors in the shape of OpenAI's API: {"error": {message, type, param, code}}."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from glmjax.errors import (
    EngineStoppedError,
    GlmjaxError,
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
)
from glmjax.server.json_response import JSONResponse

log = logging.getLogger(__name__)


class Kind(NamedTuple):
    """How an error is told: HTTP status, OpenAI's type and code, seconds to wait before a retry."""

    status: int
    type: str
    code: str | None = None
    retry_after_s: int | None = None


# The first class that fits counts.
KINDS: dict[type[Exception], Kind] = {
    ModelNotFoundError: Kind(404, "invalid_request_error", "model_not_found"),
    InvalidRequestError: Kind(400, "invalid_request_error"),
    QueueFullError: Kind(429, "rate_limit_error", "queue_full", retry_after_s=1),
    EngineStoppedError: Kind(503, "server_error", "unavailable", retry_after_s=5),
    GlmjaxError: Kind(500, "server_error"),
}


def kind_of(error: GlmjaxError) -> Kind:
    """How `error` is told."""
    return next(kind for cls, kind in KINDS.items() if isinstance(error, cls))


def error_body(error: GlmjaxError) -> dict[str, Any]:
    """The JSON that tells of `error`."""
    kind = kind_of(error)
    return _body(str(error), kind.type, getattr(error, "param", None), kind.code)


def _body(
    message: str, type_: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    words = {"message": _valid(message), "type": type_, "param": param and _valid(param)}
    return {"error": words | {"code": code}}


def _valid(text: str) -> str:
    """`text` without halves of surrogate pairs, which JSON can bring but no answer can hold."""
    return text.encode("utf-8", "replace").decode()


async def _glmjax_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GlmjaxError)
    kind = kind_of(error)
    log.info("%s %s: %d, %s", request.method, request.url.path, kind.status, error)
    seconds = kind.retry_after_s
    headers = None if seconds is None else {"retry-after": str(seconds)}
    return JSONResponse(error_body(error), kind.status, headers)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body") or None
    message = f"{param}: {first['msg']}" if param else first["msg"]
    log.info("%s %s: 400, %s", request.method, request.url.path, message)
    return JSONResponse(_body(message, "invalid_request_error", param), 400)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = _body(message, "invalid_request_error")
    return JSONResponse(body, error.status_code, dict(error.headers or {}))


async def _client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _bug(request: Request, error: Exception) -> Response:
    message = f"internal error ({type(error).__name__}); the server's log has the traceback"
    return JSONResponse(_body(message, "server_error"), 500)


def add_error_handlers(app: FastAPI) -> None:
    """Make every error of `app` take OpenAI's shape."""
    handlers = {
        GlmjaxError: _glmjax_error,
        RequestValidationError: _validation_error,
        HTTPException: _http_error,
        ClientDisconnect: _client_left,
        Exception: _bug,
    }
    for cls, handler in handlers.items():
        app.add_exception_handler(cls, handler)
