"""What stands at the root: for a person with a browser, and for clients that look who is there."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from glmjax.server.http.context import FrontendOf
from glmjax.server.http.json_response import JSONResponse

router = APIRouter()


class Welcome(BaseModel):
    """The body of /."""

    server: str
    model: str
    description: str


@router.head("/", include_in_schema=False)
@router.get("/")
async def welcome(frontend: FrontendOf) -> Response:
    """Which model is served, and where the API is described."""
    said = Welcome(server="glmjax", model=frontend.served.name, description="/openapi.json")
    return JSONResponse(said.model_dump())
