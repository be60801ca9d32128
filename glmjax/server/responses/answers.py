"""What the Responses API answers besides responses, as /openapi.json describes it."""

from __future__ import annotations

from typing import Literal

from glmjax.server.sglang.answers import Answer


class InputTokens(Answer):
    """How many tokens a prompt has."""

    object: Literal["response.input_tokens"]
    input_tokens: int
