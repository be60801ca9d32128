"""For whoever runs the server, by SGLang's names: forget the cache, pause, go on."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from glmjax.engine import Engine
from glmjax.errors import InvalidRequestError
from glmjax.server.http.context import FrontendOf
from glmjax.server.http.json_body import JsonRoute
from glmjax.server.http.json_response import JSONResponse
from glmjax.server.unserved import Exact

# SGLang's ways to pause: what becomes of requests.
PAUSES = ("abort", "retract", "in_place")

router = APIRouter(route_class=JsonRoute)


class PauseRequest(Exact):
    """The body of /pause_generation, which may be left out.

    Attributes:
        mode: "abort": all requests end, by `finish_reason`; "in_place": they stay, and go on where
            they were; "retract": they leave the device, and are computed again as far as
            the prefix cache does not have them.
    """

    mode: str = "abort"


def _done(message: str) -> Response:
    return JSONResponse({"success": True, "message": message})


@router.get("/flush_cache", include_in_schema=False)
@router.post("/flush_cache")
async def flush_cache(frontend: FrontendOf) -> Response:
    """Forget all cached prefixes. Requests that run keep their own KV."""
    await frontend.engine.call(Engine.flush_cache)
    return _done("the prefix cache is empty")


@router.post("/pause_generation")
async def pause_generation(frontend: FrontendOf, body: PauseRequest | None = None) -> Response:
    """Launch no more steps. New requests are taken, and wait; deadlines still end them."""
    mode = (body or PauseRequest()).mode
    if mode not in PAUSES:
        raise InvalidRequestError(f"mode is {mode!r}, but must be one of {list(PAUSES)}", "mode")
    if mode == "abort":
        frontend.abort_all()
    await frontend.engine.call(Engine.retract if mode == "retract" else Engine.pause)
    return _done("paused; POST /continue_generation to go on")


@router.post("/continue_generation")
async def continue_generation(frontend: FrontendOf) -> Response:
    """Go on after a pause."""
    await frontend.engine.call(Engine.resume)
    return _done("generation goes on")
