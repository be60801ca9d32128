"""Errors as HTTP answers, in the shape of the API that was asked.

OpenAI's is {"error": {message, type, param, code}}, and that of every path but Anthropic's:
{"type": "error", "error": {type, message}, "request_id"}.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from itertools import takewhile
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from glmjax.errors import (
    ContextLengthError,
    EngineStoppedError,
    GlmjaxError,
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
    RequestFailedError,
)
from glmjax.server.frontend import DeadlineError
from glmjax.server.http.json_response import JSONResponse

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
    ContextLengthError: Kind(400, "invalid_request_error", "context_length_exceeded"),
    InvalidRequestError: Kind(400, "invalid_request_error"),
    QueueFullError: Kind(429, "rate_limit_error", "queue_full", retry_after_s=1),
    EngineStoppedError: Kind(503, "server_error", "unavailable", retry_after_s=5),
    DeadlineError: Kind(504, "server_error", "deadline_exceeded"),
    RequestFailedError: Kind(500, "server_error", "engine_error"),
    GlmjaxError: Kind(500, "server_error"),
}

HEAD, TAIL = 300, 200  # characters of a message that are told, as it may hold all of a request
BODY = "the body must be a JSON object"
NO_OBJECT = ("missing", "model_attributes_type")  # pydantic's, of a body
ANTHROPIC = "/v1/messages"
# Anthropic's types by status; of others, those of the nearest hundred.
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def kind_of(error: GlmjaxError) -> Kind:
    """How `error` is told."""
    return next(kind for cls, kind in KINDS.items() if isinstance(error, cls))


def error_body(error: GlmjaxError) -> dict[str, Any]:
    """The JSON that tells of `error`."""
    kind = kind_of(error)
    return _body(str(error), kind.type, getattr(error, "param", None), kind.code)


def anthropic_error(error: GlmjaxError, request_id: str) -> dict[str, Any]:
    """The same for clients of Anthropic's API, with the id that the log has."""
    details = getattr(error, "details", None)
    return _anthropic_body(str(error), kind_of(error).status, request_id, details)


def _body(
    message: str, type_: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    words = {"message": _told(message), "type": type_, "param": param and _told(param)}
    return {"error": words | {"code": code}}


def _anthropic_body(
    message: str, status: int, request_id: str, details: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    type_ = ANTHROPIC_TYPES.get(status) or ANTHROPIC_TYPES[status // 100 * 100]
    words = {"type": type_, "message": _told(message)}
    more = {"details": dict(details)} if details else {}
    return {"type": "error", "error": words | more, "request_id": request_id}


def _told(text: str) -> str:
    """`text`, cut, without halves of surrogate pairs: JSON can bring them, no answer hold them."""
    cut = text if len(text) <= HEAD + TAIL else f"{text[:HEAD]} ... {text[-TAIL:]}"
    return cut.encode("utf-8", "replace").decode()


def log_line(text: str) -> str:
    """`text` as it may stand in a log: cut, and on one line, whatever a client put into it."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in _told(text))


def _is_anthropic(request: Request) -> bool:
    return f"{request.url.path}/".startswith(f"{ANTHROPIC}/")


def _answer(
    request: Request,
    kind: Kind,
    message: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
    details: Mapping[str, Any] | None = None,
) -> Response:
    """An error in the shape of the API that was asked, with the id that the log has."""
    request_id = f"req_{secrets.token_hex(12)}"
    asked = f"{request.method} {request.url.path}: "
    log.info("%s: %s", request_id, log_line(f"{asked}{kind.status}, {message.removeprefix(asked)}"))
    if not _is_anthropic(request):
        return JSONResponse(_body(message, kind.type, param, kind.code), kind.status, headers)
    body = _anthropic_body(message, kind.status, request_id, details)
    return JSONResponse(body, kind.status, {**(headers or {}), "request-id": request_id})


async def _glmjax_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GlmjaxError)
    kind = kind_of(error)
    seconds = kind.retry_after_s
    headers = None if seconds is None else {"retry-after": str(seconds)}
    param, details = getattr(error, "param", None), getattr(error, "details", None)
    return _answer(request, kind, str(error), param, headers, details)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    param, message = (_place if _is_anthropic(request) else _fault)(_faults(error))
    return _answer(request, KINDS[InvalidRequestError], message, param)


def _place(faults: list[Fault]) -> tuple[str, str]:
    """As `_fault`, but of the first place that is at fault, written as messages[2].content."""
    first = faults[0].path
    near = [fault for fault in faults if fault.path[: len(first)] == first]
    path = max((fault.path for fault in near), key=len)
    words = " or ".join(dict.fromkeys(fault.words for fault in near if fault.path == path))
    place = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path).lstrip(".")
    return place, f"{place}: {words}" if place else words


def _fault(faults: list[Fault]) -> tuple[str | None, str]:
    """The field at fault and what is wrong with it; where types compete, all that may be."""
    depth = max(len(path) for path, _ in faults)
    own = [fault for fault in faults if len(fault.path) == depth]
    words = " or ".join(dict.fromkeys(fault.words for fault in own))
    levels = zip(*(fault.path for fault in own), strict=True)
    param = ".".join(level[0] for level in takewhile(lambda level: len({*level}) == 1, levels))
    return param or None, f"{param}: {words}" if param else words


class Fault(NamedTuple):
    """What pydantic found: where, and what is wrong there."""

    path: list[str]
    words: str


def _faults(error: RequestValidationError) -> list[Fault]:
    """What is wrong in the first place that is at fault; each type that competes has its own."""
    first: dict[tuple[Any, ...], Any] = {}  # in each object or list, as each type reads it
    faults = []
    for it in error.errors():
        loc, steps = it["loc"], _steps(it, error.body)
        if all(first.setdefault(loc[:i], loc[i]) == loc[i] for i in steps):
            words = it["msg"].removeprefix("Input ")
            no_object = not steps and it["type"] in NO_OBJECT
            faults.append(Fault([str(loc[i]) for i in steps], BODY if no_object else words))
    return faults


def _steps(fault: dict[str, Any], body: Any) -> list[int]:
    """Which parts of a fault's `loc` lead into `body`; others are pydantic's names of types."""
    steps: list[int] = []
    last = len(fault["loc"]) - 1
    for i, part in enumerate(fault["loc"][1:], 1):
        inside = isinstance(body, dict) and part in body
        if inside or (isinstance(body, list) and isinstance(part, int)):
            body = body[part]
        elif fault["type"] != "missing" or i < last:
            continue
        steps.append(i)
    return steps


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = Kind(error.status_code, "invalid_request_error", getattr(error, "code", None))
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _answer(request, kind, message, headers=error.headers)


async def _client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _bug(request: Request, error: Exception) -> Response:
    message = f"internal error ({type(error).__name__}); the server's log has the traceback"
    return _answer(request, KINDS[GlmjaxError], message)


def add_error_handlers(app: FastAPI) -> None:
    """Make every error of `app` take the shape of the API that was asked."""
    handlers = {
        GlmjaxError: _glmjax_error,
        RequestValidationError: _validation_error,
        HTTPException: _http_error,
        ClientDisconnect: _client_left,
        Exception: _bug,
    }
    for cls, handler in handlers.items():
        app.add_exception_handler(cls, handler)
