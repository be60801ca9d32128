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

from glmjax.server.native_types import GenerateRequest, NativeSampling
from glmjax.server.openai_types import ChatRequest, CompletionRequest

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
            ),
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
    "/v1/chat/completions": [*ChatRequest.model_fields, "tools", "structural_tag"],
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
    response = client.post(path, content=json.dumps(body), headers=headers)
    late = {504} if "timeout" in changes else set()
    assert response.status_code in {200, 400, 404} | late, response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]
