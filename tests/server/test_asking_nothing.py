"""Fields that a server does not know are no error where they ask for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import Live
from pydantic import ValidationError

from glmjax.server.http.endpoints import ENDPOINTS
from glmjax.server.unserved import Exact, asks_nothing

CHAT = "/v1/chat/completions"
PATHS = [path for path, endpoint in ENDPOINTS.items() if endpoint.examples]
NOTHINGS: list[Any] = [None, False, "", [], {}, [None], [None, None]]
SOMETHINGS: list[Any] = [True, 0, 1, 0.0, " ", [0], [[]], [False], [None, ""], {"a": None}]

# What clients send who write down all fields of their own requests.
GENERATE: dict[str, Any] = {
    "session_id": None,
    "input_ids": None,
    "input_embeds": None,
    "image_data": [None],
    "video_data": "",
    "audio_data": None,
    "mm_hashes": None,
    "use_audio_in_video": False,
    "watermark": None,
    "return_logprob": None,
    "logprob_start_len": None,
    "top_logprobs_num": None,
    "token_ids_logprob": None,
    "return_sampling_mask": None,
    "return_text_in_logprobs": False,
    "return_flat_raw_top_logprobs": False,
    "stream": False,
    "log_metrics": True,
    "return_hidden_states": False,
    "return_routed_experts": False,
    "routed_experts_start_len": 0,
    "modalities": [],
    "session_params": None,
    "lora_path": [None],
    "lora_id": None,
    "custom_logit_processor": None,
    "bootstrap_host": None,
    "bootstrap_port": None,
    "bootstrap_room": None,
    "routed_dp_rank": 0,
    "data_parallel_rank": None,
    "background": False,
    "require_reasoning": False,
    "conversation_id": "mine",
    "priority": None,
    "extra_key": None,
    "cache_salt": None,
    "routing_key": "there",
    "no_logs": True,
    "custom_labels": {"a": "b"},
}
SAMPLING: dict[str, Any] = {
    "max_new_tokens": 4,
    "stop": None,
    "stop_strs": None,
    "stop_regex": None,
    "stop_regex_strs": None,
    "stop_str_max_len": 0,
    "stop_regex_max_len": 0,
    "beam_width": None,
    "json_schema": None,
    "structural_tag": None,
    "spaces_between_special_tokens": True,
    "no_stop_trim": False,
    "stream_interval": 8,
    "custom_params": None,
    "is_normalized": False,
    "dtype": None,
    "top_k": 0,
}
OPENAI: dict[str, Any] = {
    "max_tokens": 4,
    "n": 1,
    "stop": [],
    "rid": None,
    "request_id": "0123abc",
    "bootstrap_host": None,
    "session_params": None,
    "session_id": "mine",
    "extra_key": None,
    "cache_salt": None,
    "kv_transfer_params": None,
    "vllm_xargs": None,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "include_stop_str_in_output": False,
    "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None,
    "prompt_logprobs": None,
    "allowed_token_ids": None,
    "bad_words": [],
    "add_special_tokens": False,
    "return_token_ids": False,
    "return_tokens_as_token_ids": None,
    "return_routed_experts": False,
    "routed_experts_start_len": 0,
    "return_flat_raw_top_logprobs_b64": True,
    "data_parallel_rank": None,
}
OF_CHAT: dict[str, Any] = {
    "stream_options": {"include_usage": True, "include_nothing": None},
    "thinking": {"type": "disabled", "budget": None},
    "echo": False,
    "documents": None,
    "chat_template": None,
    "modalities": [],
}


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[httpx.Client]:
    with server.http as made:
        yield made
    server.wait_idle()


@pytest.fixture(scope="module")
def description(client: httpx.Client) -> dict[str, Any]:
    return client.get("/openapi.json").json()


@pytest.mark.parametrize("path", PATHS)
def test_fields_that_nobody_knows(client: httpx.Client, description: dict[str, Any], path: str):
    """They are described, too."""
    content = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    components = {"components": description["components"]}
    schema = jsonschema.Draft202012Validator(content["schema"] | components)
    body = next(iter(content["examples"].values()))["value"]
    for n, value in enumerate(NOTHINGS + SOMETHINGS):
        asked = body | {"no_such_field": value}
        response = client.post(path, json=asked)
        client.post("/continue_generation")
        fine = n < len(NOTHINGS)
        assert response.status_code == (200 if fine else 400), (value, response.text)
        assert fine or "no_such_field" in response.json()["error"]["message"]
        assert schema.is_valid(asked) == fine, value


def test_whole_requests_of_other_clients(client: httpx.Client, server: Live):
    plain = {"text": "a", "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
    whole = {"text": "a"} | GENERATE | {"sampling_params": SAMPLING | {"temperature": 0}}
    answers = [client.post("/generate", json=body) for body in (plain, whole)]
    assert [each.status_code for each in answers] == [200, 200], answers[1].text
    assert answers[0].json()["output_ids"] == answers[1].json()["output_ids"]
    for path, body in {
        CHAT: {"messages": [{"role": "user", "content": "a"}]} | OF_CHAT,
        "/v1/completions": {"prompt": "a"},
    }.items():
        response = client.post(path, json=body | OPENAI)
        assert response.status_code == 200, response.text


USE = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
NESTED: dict[str, dict[str, Any]] = {
    "/v1/messages": {
        "max_tokens": 4,
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, USE]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]},
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "enabled", "budget_tokens": 2},
        "output_config": {"effort": "low"},
        "context_management": {
            "edits": [
                {
                    "type": "clear_tool_uses_20250919",
                    "trigger": {"type": "input_tokens", "value": 9999},
                    "keep": {"type": "tool_uses", "value": 1},
                }
            ]
        },
    },
    "/v1/responses": {
        "max_output_tokens": 4,
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
            {"type": "function_call", "call_id": "t", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "t", "output": "b"},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "text"}, "verbosity": "low"},
    },
}


def with_nothing(value: Any) -> Any:
    """With a field that nobody knows in each object, but in what the model reads as it is."""
    if isinstance(value, list):
        return [with_nothing(each) for each in value]
    if not isinstance(value, dict):
        return value
    within = {k: v if v == {} or k == "tools" else with_nothing(v) for k, v in value.items()}
    return within | {"no_such_field": None}


@pytest.mark.parametrize("path", NESTED)
def test_fields_that_nobody_knows_within_others(client: httpx.Client, server: Live, path: str):
    told = []
    for body in (NESTED[path], with_nothing(NESTED[path])):
        client.post("/flush_cache")
        response = client.post(path, json=body | {"model": server.model, "temperature": 0})
        assert response.status_code == 200, response.text
        told.append(response.json()["usage"]["input_tokens"])
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a", "cache_salt": "x"}),
        ("/generate", {"text": "a", "extra_key": "x"}),
        ("/generate", {"text": "a", "data_parallel_rank": 1}),
        ("/generate", {"text": "a", "lora_path": ["x"]}),
        ("/generate", {"text": "a", "return_routed_experts": True}),
        ("/generate", {"text": "a", "sampling_params": {"length_penalty": 2}}),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "use_beam_search": True}),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "include_reasoning": False}),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "web_search_options": {}}),
    ],
)
def test_what_asks_for_something_is_refused(client: httpx.Client, path: str, body: dict[str, Any]):
    response = client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"].split(".")[-1] in str(body)


class Point(Exact):
    """Of two fields."""

    x: int = 0
    y: dict[str, int] | None = None


@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_an_object_has_its_own_fields_only(value: Any):
    if asks_nothing(value):
        assert Point.model_validate({"x": 5, "z": value}) == Point(x=5)
    else:
        with pytest.raises(ValidationError, match="z"):
            Point.model_validate({"x": 5, "z": value})


def test_own_fields_stay_as_they_are():
    assert Point.model_validate({"y": {}}).y == {}
    with pytest.raises(ValidationError, match="dictionary"):
        Point.model_validate({"y": ""})
