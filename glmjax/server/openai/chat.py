"""A conversation to be continued: what all chat protocols come down to."""

from __future__ import annotations

import asyncio

from glmjax.server import unserved
from glmjax.server.choice import ChoiceSpec
from glmjax.server.frontend import Frontend, Generation
from glmjax.server.openai.requests import ChatRequest
from glmjax.server.sampling_fields import spelled
from glmjax.server.served import ServedModel


async def generate_chat(body: ChatRequest, request_id: str, frontend: Frontend) -> Generation:
    """Start to answer a conversation.

    Raises:
        ModelNotFoundError: another model is asked for.
        InvalidRequestError: something that is not served, or out of its range; and as
            `Frontend.generate` does.
    """
    frontend.served.check_name(body.model)
    unserved.check_extra(body, unserved.CHAT)
    with spelled(body.spelling):
        specs = await asyncio.to_thread(_specs, body, frontend.served)
        return await frontend.generate(request_id, specs)


def _specs(body: ChatRequest, served: ServedModel) -> list[ChoiceSpec]:
    return body.choices([body.prompt(served)], served)
