"""What the model is told of a tool's answer, and of the tools that it refers to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from glmjax.errors import InvalidRequestError
from glmjax.server.anthropic.blocks import Reference, ResultBlock, ToolResult, joined

Functions = Mapping[str, Mapping[str, Any]]


def result_text(result: ToolResult, where: str, tools: Functions) -> str:
    """A result as text: there is no other way to tell the model of an error, or of a tool.

    Args:
        result: of a tool.
        where: the client has it.
        tools: in OpenAI's form, by their names.

    Raises:
        InvalidRequestError: it refers to another tool.
    """
    text = _text(result.content or "", where, tools)
    return f"Error: {text}" if result.is_error else text


def _text(content: str | Sequence[ResultBlock], where: str, tools: Functions) -> str:
    if isinstance(content, str):
        return content
    placed: list[Any] = [(f"{where}.content[{i}]", block) for i, block in enumerate(content)]
    texts: list[str] = []
    for refers, run in groupby(placed, key=lambda it: isinstance(it[1], Reference)):
        found = [*run]
        texts.append(_shown(found, tools) if refers else joined(block for _, block in found))
    return "\n".join(texts)


def _shown(found: Sequence[tuple[str, Reference]], tools: Functions) -> str:
    """Tools as GLM's chat templates show them before a conversation."""
    lines = [_json(reference.tool_name, where, tools) for where, reference in found]
    return "\n".join(["<tools>", *lines, "</tools>"])


def _json(name: str, where: str, tools: Functions) -> str:
    if name not in tools:
        raise InvalidRequestError(
            f"{where}.tool_name is {name!r}, but tools has no such tool; send it there, with "
            "defer_loading: true, or leave the reference out",
            "messages",
        )
    try:
        return json.dumps(tools[name], ensure_ascii=False)
    except RecursionError:
        raise InvalidRequestError(f"{where}: {name!r} is nested too deep", "tools") from None
