"""Errors in the shape of OpenAI's API: {"error": {message, type, param, code}}."""

from __future__ import annotations

import logging
from itertools import takewhile
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
    RequestFailedError,
)
from glmjax.server.frontend import DeadlineError
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
    DeadlineError: Kind(504, "server_error", "deadline_exceeded"),
    RequestFailedError: Kind(500, "server_error", "engine_error"),
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
    param, message = _fault(error)
    log.info("%s %s: 400, %s", request.method, request.url.path, message)
    return JSONResponse(_body(message, "invalid_request_error", param), 400)


def _fault(error: RequestValidationError) -> tuple[str | None, str]:
    """The field at fault and what is wrong with it; where types compete, all that may be."""
    faults = [(_path(fault, error.body), fault["msg"]) for fault in error.errors()]
    field = faults[0][0][:1]
    depth = max(len(path) for path, _ in faults if path[:1] == field)
    own = [(path, msg) for path, msg in faults if path[:1] == field and len(path) == depth]
    words = " or ".join(dict.fromkeys(msg.removeprefix("Input ") for _, msg in own))
    levels = zip(*(path for path, _ in own), strict=True)
    param = ".".join(level[0] for level in takewhile(lambda level: len({*level}) == 1, levels))
    return param or None, f"{param}: {words}" if param else words


def _path(fault: dict[str, Any], body: Any) -> list[str]:
    """Where in `body` a fault is: its place without the names of types that pydantic puts in."""
    path: list[str] = []
    for part in fault["loc"][1:]:
        inside = isinstance(body, dict) and part in body
        if inside or (isinstance(body, list) and isinstance(part, int)):
            body = body[part]
        elif fault["type"] != "missing" or part is not fault["loc"][-1]:
            continue
        path.append(str(part))
    return path


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
