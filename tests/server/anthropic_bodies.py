"""Requests of Anthropic's API, and the same in OpenAI's form."""

from __future__ import annotations

from typing import Any

HI: list[Any] = [{"role": "user", "content": "hi"}]
PROMPT: dict[str, Any] = {"model": "tiny-glm", "messages": HI}
BASE = PROMPT | {"max_tokens": 8}
PATHS = ("/v1/messages", "/v1/messages/count_tokens")
TOOL = {"name": "ping", "input_schema": {"type": "object", "properties": {}}}
CACHED = {"cache_control": {"type": "ephemeral"}}


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": [*blocks]}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": [*blocks]}


def text(words: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": words} | fields


def use(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"id-{name}", "name": name, "input": arguments}


def result(name: str, *content: Any, **fields: Any) -> dict[str, Any]:
    block = {"type": "tool_result", "tool_use_id": f"id-{name}"} | fields
    return block | ({"content": content[0]} if content else {})


def document(words: str, **fields: Any) -> dict[str, Any]:
    source = {"type": "text", "media_type": "text/plain", "data": words}
    return {"type": "document", "source": source} | fields


def reference(name: str) -> dict[str, Any]:
    return {"type": "tool_reference", "tool_name": name}


def thought(words: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": words, "signature": "abc"}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"id-{name}", "type": "function", "function": function}


def answer(name: str, words: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"id-{name}", "content": words}


HELLO = {"role": "user", "content": "hi"}
IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x"}}
PDF = {"type": "base64", "media_type": "application/pdf", "data": "JVBERg=="}
UNSEEN = "[image not shown: this model reads text only]"
UNREAD = "[document not shown: this model reads text only]"
FORMAT = {"type": "json_schema", "schema": {"type": "object"}}
