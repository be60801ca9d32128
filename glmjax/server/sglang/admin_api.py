"""For whoever runs the server, by SGLang's names: forget the cache, pause, go on."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from glmjax.engine import Engine
from glmjax.errors import InvalidRequestError
from glmjax.server.http.context import FrontendOf
from glmjax.server.http.json_body import JsonRoute
from glmjax.server.http.json_response import JSONResponse

router = APIRouter(route_class=JsonRoute)


class PauseRequest(BaseModel):
    """The body of /pause_generation, which may be left out.

    Attributes:
        mode: SGLang's; only "in_place" is served: requests stay, and go on where they were.
    """

    model_config = ConfigDict(extra="forbid")

    mode: str = "in_place"


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
    """Launch no more steps. Requests are still taken, and wait; deadlines still end them."""
    mode = (body or PauseRequest()).mode
    if mode != "in_place":
        raise InvalidRequestError(
            f"mode is {mode!r}, but only 'in_place' is served; to end requests use /abort_request",
            "mode",
        )
    await frontend.engine.call(Engine.pause)
    return _done("paused; POST /continue_generation to go on")


@router.post("/continue_generation")
async def continue_generation(frontend: FrontendOf) -> Response:
    """Go on after a pause."""
    await frontend.engine.call(Engine.resume)
    return _done("generation goes on")
