"""What handlers take from their app."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from glmjax.server.frontend import Frontend
from glmjax.server.request_times import RequestTimes


def frontend_of(request: Request) -> Frontend:
    """The app's front end."""
    return request.app.state.frontend


def times_of(request: Request) -> RequestTimes:
    """Times of the app's requests."""
    return request.app.state.times


FrontendOf = Annotated[Frontend, Depends(frontend_of)]
TimesOf = Annotated[RequestTimes, Depends(times_of)]
