"""What the model is told of a tool's answer, and of the tools that it refers to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from glmjax.errors import InvalidRequestError
from glmjax.server.anthropic.blocks import Reference, ResultBlock, ToolResult, joined

Functions = Mapping[str, Mapping[str, Any]]


def result_text(result: ToolResult, where: str, tools: Functions, shown: set[str]) -> str:
    """A result as text: there is no other way to tell the model of an error, or of a tool.

    Args:
        result: of a tool.
        where: the client has it.
        tools: in OpenAI's form, by their names.
        shown: names of those that were shown before; it grows by those shown here. A tool is only
            named again, as a prompt would grow by all of it with every reference.

    Raises:
        InvalidRequestError: it refers to another tool.
    """
    text = _text(result.content or "", where, tools, shown)
    return f"Error: {text}" if result.is_error else text


def _text(
    content: str | Sequence[ResultBlock], where: str, tools: Functions, shown: set[str]
) -> str:
    if isinstance(content, str):
        return content
    placed: list[Any] = [(f"{where}.content[{i}]", block) for i, block in enumerate(content)]
    texts: list[str] = []
    for refers, run in groupby(placed, key=lambda it: isinstance(it[1], Reference)):
        found = [*run]
        blocks = (block for _, block in found)
        texts.append(_shown(found, tools, shown) if refers else joined(blocks))
    return "\n".join(texts)


def _shown(found: Sequence[tuple[str, Reference]], tools: Functions, shown: set[str]) -> str:
    """Tools as GLM's chat templates show them before a conversation, and names of those known."""
    lines: list[str] = []
    known: list[str] = []
    for where, reference in found:
        name = reference.tool_name
        if name in shown:
            known.append(f"[tool {name}: shown above]")
        else:
            lines.append(_json(name, where, tools))
            shown.add(name)
    return "\n".join([*(["<tools>", *lines, "</tools>"] if lines else ()), *known])


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
