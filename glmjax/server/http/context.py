"""What handlers take from their app."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from glmjax.server.frontend import Frontend


def frontend_of(request: Request) -> Frontend:
    """The app's front end."""
    return request.app.state.frontend


FrontendOf = Annotated[Frontend, Depends(frontend_of)]
