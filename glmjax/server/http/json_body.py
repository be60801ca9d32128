"""Bodies of requests: JSON as RFC 8259 has it, in UTF-8, or a refusal that says why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

MAX_BODY_BYTES = 32 * 2**20  # reading and tokenising more would take minutes

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRequest(Request):
    """A request whose body is read strictly, and not without end."""

    async def body(self) -> bytes:
        """Its body. Raises HTTPException, 413, where it is too large."""
        if not hasattr(self, "_body"):
            whole = bytearray()
            async for piece in self.stream():
                whole += piece
                if len(whole) > MAX_BODY_BYTES:
                    raise HTTPException(413, f"the body is above {MAX_BODY_BYTES} bytes")
            self._body = bytes(whole)
        return self._body

    async def json(self) -> Any:
        """Its body as a value. Raises HTTPException, 400, where it is no JSON."""
        return parsed(await self.body())


class JsonRoute(APIRoute):
    """A route whose body is read strictly: `APIRouter(route_class=JsonRoute)`."""

    def get_route_handler(self) -> Handler:
        """The handler, behind the check of its body's type; JSON has to say that it is."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def strict(request: Request) -> Response:
            given = JsonRequest(request.scope, request.receive)
            kind = given.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json" and await given.body():
                raise _refusal(
                    f"the body is of type {kind or 'unknown'}; send JSON, with the header "
                    "content-type: application/json"
                )
            return await handle(given)

        return strict


def parsed(body: bytes) -> Any:
    """The value of a JSON text.

    Python's own reader takes more than JSON: NaN and Infinity, and of equal names of an object it
    forgets all but the last. Neither can be what a client means.

    Raises:
        HTTPException: 400, it is no JSON, or not in UTF-8, or too deep.
    """
    try:
        return json.loads(body.decode(), object_pairs_hook=_object, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise _refusal(f"the body is not UTF-8, at byte {error.start}") from None
    except RecursionError:
        raise _refusal("the body is nested too deep") from None
    except ValueError as error:
        raise _refusal(f"the body is not JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = Counter(name for name, _ in pairs)
        twice = next(name for name in found if names[name] > 1)
        raise ValueError(f"an object has {twice!r} more than once")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON; leave it out, or send null")


def _refusal(message: str) -> HTTPException:
    return HTTPException(400, message.encode("utf-8", "replace").decode())
