"""Every refusal: the status, the shape, and the field that is named."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from live import Live, live, wait_until

from glmjax.server.served import ServedModel

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}
HELLO = {"prompt": "hello"}
JSON = {"content-type": "application/json"}
LONG_WORDS = [{"role": "user", "content": "x " * 5000}]
LONG = {"prompt": list(range(100)) * 50}


def post(server: Live, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    with server.http as client:
        response = client.post(path, content=json.dumps(body), headers=JSON)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return response.status_code, error


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (CHAT, {}, "messages", "required"),
        (CHAT, {"messages": "hi"}, "messages", "list"),
        (CHAT, {"messages": [{"role": "robot"}]}, "messages", "'robot'"),
        (CHAT, {"messages": [{"role": "user", "tool_calls": 5}]}, "messages", "list"),
        (CHAT, HI | {"stop": "x" * 9000}, "stop", "8192"),
        (COMPLETIONS, {"prompt": ["a"] * 20, "n": 100}, "prompt", "several requests"),
        (CHAT, HI | {"temperature": -1}, "temperature", "0 or more"),
        (CHAT, HI | {"temperature": "hot"}, "temperature", "number"),
        (CHAT, HI | {"top_p": 0}, "top_p", "above 0"),
        (CHAT, HI | {"top_k": 0}, "top_k", "-1"),
        (CHAT, {"messages": []}, "messages", "at least one message"),
        (CHAT, HI | {"min_p": 2}, "min_p", "between 0 and 1"),
        (CHAT, HI | {"frequency_penalty": 3}, "frequency_penalty", "between -2 and 2"),
        (CHAT, HI | {"presence_penalty": -3}, "presence_penalty", "between -2 and 2"),
        (CHAT, HI | {"repetition_penalty": 0}, "repetition_penalty", "above 0"),
        (CHAT, HI | {"min_tokens": -1}, "min_tokens", "min_tokens is -1"),
        (CHAT, HI | {"min_tokens": 5, "max_tokens": 4}, "min_tokens", "above max_tokens 4"),
        (CHAT, HI | {"logit_bias": {"a": 1}}, "logit_bias", "'a'"),
        (CHAT, HI | {"logit_bias": {"512": 1}}, "logit_bias", "0 to 511"),
        (CHAT, HI | {"logit_bias": {"5": "x"}}, "logit_bias.5", "number"),
        (CHAT, HI | {"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        (CHAT, HI | {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
        (CHAT, HI | {"logprobs": 5}, "logprobs", "boolean"),
        (CHAT, HI | {"timeout": 0}, "timeout", "above 0"),
        (CHAT, HI | {"max_tokens": 0}, "max_tokens", "max_tokens is 0"),
        (CHAT, HI | {"max_completion_tokens": 0}, "max_completion_tokens", "1 or more"),
        (CHAT, HI | {"n": 0}, "n", "between 1"),
        (CHAT, HI | {"n": 1000}, "n", "between 1"),
        (CHAT, HI | {"stop": ["a", ""]}, "stop", "empty"),
        (CHAT, HI | {"stop": 3}, "stop", "stop: should be a valid list"),
        (CHAT, HI | {"stop": ["a", 3]}, "stop.1", "stop.1: should be a valid string"),
        (CHAT, HI | {"max_tokn": 3}, "max_tokn", "unknown field"),
        (CHAT, HI | {"\ud800": 3}, None, "valid"),
        (CHAT, HI | {"stream_options": {"x": 1}}, "stream_options.x", "not permitted"),
        (CHAT, HI | {"continue_final_message": True}, "continue_final_message", "of role user"),
        (CHAT, HI | {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "tools"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, None, "Unicode"),
        (COMPLETIONS, {}, "prompt", "required"),
        (COMPLETIONS, {"prompt": []}, "prompt", "empty"),
        (COMPLETIONS, {"prompt": ""}, "prompt", "empty"),
        (COMPLETIONS, {"prompt": [1, 512]}, "prompt", "512"),
        (COMPLETIONS, {"prompt": [[1], [-1]]}, "prompt", "-1"),
        (COMPLETIONS, {"prompt": ["a", [1]]}, "prompt", "string or should be a valid list"),
        (COMPLETIONS, {"prompt": 5}, "prompt", "prompt: should be a valid string or"),
        (COMPLETIONS, HELLO | {"logprobs": 21}, "logprobs", "logprobs is 21"),
        (COMPLETIONS, HELLO | {"max_tokens": 0}, "max_tokens", "1 or more"),
        (COMPLETIONS, HELLO | {"max_tokens": 0, "logprobs": 1}, "max_tokens", "1 or more"),
        ("/generate", {}, "text", "either text or input_ids"),
        ("/generate", {"text": "a", "input_ids": [1]}, "text", "either"),
        ("/generate", {"input_ids": []}, "text", "empty"),
        ("/generate", {"input_ids": [[]]}, "prompt", "empty"),
        ("/generate", {"text": "a", "sampling_params": {"top_p": 3}}, "top_p", "at most 1"),
        (
            "/generate",
            {"text": ["a", "b"], "sampling_params": [{}]},
            "sampling_params",
            "1 sampling_params for 2 prompts",
        ),
        (
            "/generate",
            {"text": "a", "sampling_params": {"stop": 3}},
            "sampling_params.stop",
            "sampling_params.stop: should be a valid list",
        ),
        (
            "/generate",
            {"text": "a", "sampling_params": {"max_new_tokens": 0}},
            "max_new_tokens",
            "1 or more",
        ),
        (
            "/generate",
            {"input_ids": [1, 2], "return_logprob": True, "logprob_start_len": 3},
            "logprob_start_len",
            "2 tokens",
        ),
        (
            "/generate",
            {"input_ids": [1, 2], "return_logprob": True, "logprob_start_len": -2},
            "logprob_start_len",
            "-2",
        ),
        (
            "/generate",
            {"text": "a", "return_logprob": True, "top_logprobs_num": 21},
            "top_logprobs_num",
            "top_logprobs_num is 21",
        ),
        ("/generate", {"text": "a", "rid": "x\ny"}, "request_id", "not printable"),
        (
            "/generate",
            {"text": "a", "sampling_params": {"structural_tag": "{}"}},
            "sampling_params.structural_tag",
            "not served",
        ),
        ("/tokenize", {}, "prompt", "required"),
        ("/detokenize", {"tokens": [9999]}, "prompt", "9999"),
        ("/abort_request", {"rid": "a", "all": True}, "all", "not permitted"),
    ],
)
def test_bad_requests(server: Live, path: str, body: dict, param: str | None, words: str):
    status, error = post(server, path, body)
    assert (status, error["type"], error["code"]) == (400, "invalid_request_error", None)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (CHAT, HI | {"max_tokens": 100_000}, "max_tokens", "max_tokens 100000"),
        (CHAT, HI | {"max_completion_tokens": 99_999}, "max_completion_tokens", "at most"),
        (CHAT, {"messages": LONG_WORDS}, "messages", "at most 4095"),
        (COMPLETIONS, LONG, "prompt", "5000 tokens"),
        (
            "/generate",
            {"text": "a", "sampling_params": {"max_new_tokens": 5000}},
            "max_new_tokens",
            "max_new_tokens 5000",
        ),
    ],
)
def test_beyond_the_context(server: Live, path: str, body: dict, param: str, words: str):
    status, error = post(server, path, body)
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == param
    assert words in error["message"]


UNSERVED: list[tuple[str, dict, str, Any]] = [
    (CHAT, HI, "functions", [{"name": "f"}]),
    (CHAT, HI, "function_call", {"name": "f"}),
    (CHAT, HI, "structural_tag", "{}"),
    (CHAT, HI, "stop_regex", "a+"),
    (CHAT, HI, "lora_path", "x"),
    (CHAT, HI, "audio", {"voice": "x"}),
    (CHAT, HI, "web_search_options", {}),
    (CHAT, HI, "do_sample", False),
    (COMPLETIONS, HELLO, "best_of", 2),
    (COMPLETIONS, HELLO, "suffix", "x"),
    ("/generate", {"text": "a"}, "token_ids_logprob", [5]),
    ("/generate", {"text": "a"}, "image_data", "x"),
]


@pytest.mark.parametrize(("path", "body", "field", "value"), UNSERVED)
def test_what_is_not_served_is_named(server: Live, path: str, body: dict, field: str, value: Any):
    status, error = post(server, path, body | {field: value})
    assert (status, error["param"]) == (400, field)
    assert f"{field} is not served yet" in error["message"]


NEUTRAL = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0,
    "repetition_penalty": 1.0,
    "min_p": 0,
    "logit_bias": None,
    "response_format": {"type": "text"},
    "user": "someone",
    "metadata": {"a": "b"},
    "best_of": 1,
    "regex": None,
    "max_tokens": 2,
}
NEUTRAL_CHAT = {"tools": [], "tool_choice": "none", "logprobs": False, "top_logprobs": None}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, HI | NEUTRAL | NEUTRAL_CHAT),
        (COMPLETIONS, HELLO | NEUTRAL | {"echo": False, "logprobs": None}),
        ("/generate", {"text": "a", "return_logprob": False, "sampling_params": {"min_p": 0.0}}),
        ("/generate", {"text": "a", "logprob_start_len": 99, "top_logprobs_num": 2}),
    ],
)
def test_neutral_values_are_accepted(server: Live, path: str, body: dict):
    with server.http as client:
        assert client.post(path, json=body).status_code == 200


@pytest.mark.parametrize(("path", "body"), [(CHAT, HI), (COMPLETIONS, HELLO)])
def test_another_model(server: Live, path: str, body: dict):
    status, error = post(server, path, body | {"model": "gpt-4"})
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "'tiny-glm' is" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nope", 404), ("GET", CHAT, 405), ("POST", "/health", 405)],
)
def test_no_such_place(server: Live, method: str, path: str, status: int):
    with server.http as client:
        response = client.request(method, path)
    assert response.status_code == status
    assert path in response.json()["error"]["message"]


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b'"x"', b"\xff"])
def test_bodies_that_are_no_json_object(server: Live, data: bytes):
    with server.http as client:
        response = client.post(CHAT, content=data, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


# A step that fails


@pytest.fixture
def broken(served: ServedModel) -> Iterator[Live]:
    """A server whose device fails as soon as the first token has come."""
    with live(served, step_s=0.002) as server:
        yield server


def break_soon(server: Live) -> threading.Thread:
    def wait() -> None:
        wait_until(lambda: server.frontend.engine.load().running == 1)
        server.runner.broken = True

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, HI | {"max_tokens": 4000, "ignore_eos": True}),
        (COMPLETIONS, HELLO | {"max_tokens": 4000, "ignore_eos": True}),
        (
            "/generate",
            {"text": "a", "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}},
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_step_that_fails(broken: Live, path: str, body: dict, stream: bool):
    thread = break_soon(broken)
    with broken.http as client:
        response = client.post(path, json=body | {"stream": stream})
        thread.join()
        if stream:
            *_, last, done, rest = response.text.split("\n\n")
            assert (done, rest) == ("data: [DONE]", "")
            error = json.loads(last.removeprefix("data: "))["error"]
        else:
            error = response.json()["error"]
            assert response.status_code == 500
        assert (error["type"], error["code"]) == ("server_error", "engine_error")
        assert "the device is on fire" in error["message"]
        broken.runner.broken = False
        short = HELLO | {"max_tokens": 2}
        assert client.post(COMPLETIONS, json=short).status_code == 200, "it serves others on"
