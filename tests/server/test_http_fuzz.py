"""Junk in any field is refused, never a bug."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Live

from glmjax.server.openai.requests import ChatRequest, CompletionRequest
from glmjax.server.sglang.requests import GenerateRequest, NativeSampling

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 600)
    | st.sampled_from([10**30, -(10**30)])
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["user", "assistant", "text", "hi", "json_schema", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "type", "text", "tool_calls", "function", "json_schema", "5"]
            )
            | st.sampled_from(["name", "arguments", "parameters"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/generate": {"text": "hi", "sampling_params": {"max_new_tokens": 2}},
}
FIELDS = {
    "/v1/chat/completions": [*ChatRequest.model_fields, "functions", "structural_tag"],
    "/v1/completions": [*CompletionRequest.model_fields, "best_of"],
    "/generate": [*GenerateRequest.model_fields, *NativeSampling.model_fields],
}


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[httpx.Client]:
    with server.http as made:
        yield made


@pytest.mark.parametrize("path", GOOD)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_junk(client: httpx.Client, path: str, data: st.DataObject):
    changes = data.draw(st.dictionaries(st.sampled_from(FIELDS[path]), JUNK, max_size=3))
    body = GOOD[path] | changes
    nested = set(changes) & set(NativeSampling.model_fields)
    if path == "/generate" and nested:
        body["sampling_params"] = {"max_new_tokens": 2} | {n: body.pop(n) for n in nested}
    headers = {"content-type": "application/json"}
    check(client.post(path, content=json.dumps(body), headers=headers), "timeout" in changes)


# Tools that are nearly what they should be, and what is said of them.

SCHEMAS = st.recursive(
    st.booleans()
    | st.sampled_from([{}, None, {"$ref": "#"}, {"$ref": "#/$defs/a"}, {"enum": ["a", 1, None]}])
    | st.sampled_from([{"type": kind} for kind in ("string", "integer", "object", "array", 5)])
    | st.sampled_from([{"type": "string", "pattern": "("}, {"minLength": -1}, {"const": "\ud800"}]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["anyOf", "allOf", "items", "properties", "required", "$defs", "a"])
            | st.sampled_from(["type", "additionalProperties", "patternProperties", "nullable"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
KEYS = st.sampled_from(["a", "b", "$ref", '"', "</arg_key>", "\n", ""])
PARAMETERS = st.fixed_dictionaries(
    {"properties": st.dictionaries(KEYS, SCHEMAS, max_size=3) | SCHEMAS},
    optional={"additionalProperties": SCHEMAS, "required": st.lists(KEYS), "$defs": SCHEMAS},
)
FUNCTIONS = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "g", "h-1.x"])},
    optional={"parameters": PARAMETERS, "strict": st.booleans() | JUNK, "description": JUNK},
)
TOOL: Any = st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTIONS})
TOOLS = st.lists(TOOL, min_size=1, max_size=3, unique_by=lambda tool: tool["function"]["name"])
ALLOWED = st.fixed_dictionaries({"mode": st.sampled_from(["auto", "required"]), "tools": TOOLS})
CHOICES = (
    st.sampled_from(["none", "auto", "required"])
    | TOOL
    | st.fixed_dictionaries({"type": st.just("allowed_tools"), "allowed_tools": ALLOWED})
    | JUNK
)
FORMAT = st.fixed_dictionaries(
    {"type": st.just("json_schema"), "json_schema": st.fixed_dictionaries({"schema": SCHEMAS})}
)


@settings(max_examples=150, deadline=None)
@given(
    changes=st.fixed_dictionaries(
        {"tools": TOOLS},
        optional={
            "tool_choice": CHOICES,
            "parallel_tool_calls": st.booleans(),
            "response_format": FORMAT | st.just({"type": "json_object"}),
            "thinking": st.sampled_from([{"type": "disabled"}, {"budget_tokens": 1}]),
        },
    )
)
def test_junk_tools(client: httpx.Client, changes: dict[str, Any]):
    path = "/v1/chat/completions"
    body, headers = json.dumps(GOOD[path] | changes), {"content-type": "application/json"}
    check(client.post(path, content=body, headers=headers))


def check(response: httpx.Response, timed: bool = False) -> None:
    late = {504} if timed else set()
    assert response.status_code in {200, 400, 404} | late, response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]
