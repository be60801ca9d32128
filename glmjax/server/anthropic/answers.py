"""Answers of Anthropic's API, as /openapi.json describes them; no code makes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from glmjax.server.sglang.answers import Answer


class ThinkingBlock(Answer):
    """A thought; one that is not shown is in its signature. Any signature is taken back."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class TextBlock(Answer):
    """Text for the user."""

    type: Literal["text"]
    text: str


class ToolUseBlock(Answer):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ThinkingTokens(Answer):
    """Of the answer's tokens, those of thoughts."""

    thinking_tokens: int


class MessageUsage(Answer):
    """Tokens counted; those read from the prefix cache are not among the input tokens."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens


class AppliedEdit(Answer):
    """What was left out of a conversation."""

    type: Literal["clear_tool_uses_20250919"]
    cleared_tool_uses: int
    cleared_input_tokens: int


class AppliedEdits(Answer):
    """All that was left out, where the request asked for it."""

    applied_edits: list[AppliedEdit]


class MessageAnswer(Answer):
    """A whole answer, as blocks in the order in which they were said."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ThinkingBlock | TextBlock | ToolUseBlock]
    stop_reason: (
        Literal[
            "end_turn",
            "max_tokens",
            "stop_sequence",
            "tool_use",
            "model_context_window_exceeded",
        ]
        | None
    )
    stop_sequence: str | None
    usage: MessageUsage
    context_management: AppliedEdits | None = None


class MessageEvent(BaseModel):
    """An event of a streamed answer, in Anthropic's words."""

    type: Literal[
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]


class OriginalCount(Answer):
    """How many tokens there were before any were left out."""

    original_input_tokens: int


class TokenCount(Answer):
    """How many tokens a prompt has."""

    input_tokens: int
    context_management: OriginalCount | None = None
