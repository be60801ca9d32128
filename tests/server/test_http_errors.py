"""Every refusal: the status, the shape, and the field that is named."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import Live, live, logged, wait_until

from glmjax.server.http.errors import HEAD, TAIL, log_line
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
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages", "list"),
        (CHAT, {"messages": [{"role": "user", "contents": "hi"}]}, "messages", "has no content"),
        (CHAT, HI | {"prompt": "hi"}, "prompt", "unknown field"),
        (CHAT, HI | {"thinking": {"budget_tokens": -1}}, "thinking.budget_tokens", "is -1"),
        (CHAT, HI | {"reasoning": {"max_tokens": -1}}, "reasoning.max_tokens", "is -1"),
        (CHAT, HI | {"reasoning": {"exclude": True}}, "reasoning.exclude", "should be"),
        (
            CHAT,
            HI | {"chat_template_kwargs": {"enable_thinking": "no"}},
            "chat_template_kwargs",
            "must be true or false",
        ),
        (CHAT, HI | {"stop": "x" * 9000}, "stop", "8192"),
        (COMPLETIONS, {"prompt": ["a"] * 20, "n": 100}, "prompt", "several requests"),
        (CHAT, HI | {"temperature": -1}, "temperature", "0 or more"),
        (CHAT, HI | {"temperature": "hot"}, "temperature", "number"),
        (CHAT, HI | {"top_p": 0}, "top_p", "above 0"),
        (CHAT, HI | {"top_k": -2}, "top_k", "-1"),
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
        (CHAT, HI | {"n": 2000}, "n", "n is 2000, but must be between 1"),
        (CHAT, HI | {"n": -(10**30)}, "n", "between 1"),
        (COMPLETIONS, {"prompt": ["a"] * 20, "n": 2000}, "n", "between 1"),
        (CHAT, HI | {"max_tokens": 10**20}, "max_tokens", "at most 2147483647"),
        (CHAT, HI | {"stop_token_ids": [10**30, 5]}, "stop_token_ids", f"is [{10**30}, 5], but"),
        (CHAT, {"messages": [5, "a"]}, "messages.0", "messages.0: should be a valid dictionary"),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": 5}, {"role": "robot", "content": "x"}]},
            "input.0.content",
            "input.0.content: should be a valid string or should be a valid list",
        ),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": "a"}, {"role": "robot", "content": 5}]},
            "input.1.role",
            "input.1.role: should be 'user'",
        ),
        (
            "/v1/responses",
            {"input": [{"type": "one"}, {"type": "other"}]},
            "input.0",
            "input.0: is of type 'one'",
        ),
        (CHAT, HI | {"stop": ["a", ""]}, "stop", "empty"),
        (CHAT, HI | {"stop": 3}, "stop", "stop: should be a valid list"),
        (CHAT, HI | {"stop": ["a", 3]}, "stop.1", "stop.1: should be a valid string"),
        (CHAT, HI | {"max_tokn": 3}, "max_tokn", "unknown field 'max_tokn'"),
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
        (COMPLETIONS, HELLO | {"max_tokens": -1}, "max_tokens", "1 or more"),
        ("/generate", {}, "text", "either text or input_ids"),
        ("/generate", {"text": "a", "input_ids": [1]}, "text", "either"),
        ("/generate", {"input_ids": []}, "text", "empty"),
        ("/generate", {"input_ids": [[]]}, "input_ids", "empty"),
        ("/generate", {"input_ids": [9999]}, "input_ids", "token id 9999"),
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
            {"text": "a", "sampling_params": {"max_new_tokens": -1}},
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
        ("/generate", {"text": "a", "rid": "x\ny"}, "rid", "not printable"),
        (
            "/generate",
            {"text": "a", "sampling_params": {"structural_tag": "{}"}},
            "sampling_params.structural_tag",
            "not served",
        ),
        ("/tokenize", {}, "prompt", "required"),
        ("/detokenize", {"tokens": [9999]}, "tokens", "tokens holds token id 9999"),
        ("/detokenize", {"tokens": [[1], [-1]]}, "tokens", "tokens holds token id -1"),
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
        (CHAT, {"messages": LONG_WORDS}, "messages", "the prompt is too long"),
        (COMPLETIONS, LONG, "prompt", "5000 tokens"),
        ("/generate", {"input_ids": [1] * 5000}, "input_ids", "too long: it has 5000 tokens"),
        ("/generate", {"text": "x " * 5000}, "text", "too long: it has 10000 tokens"),
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
    assert error["message"].startswith("this model's maximum context length is 4096 tokens")


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


@pytest.mark.parametrize("verbosity", ["low", "medium", "high", None])
def test_verbosity_changes_nothing(server: Live, verbosity: str | None):
    with server.http as client:
        body = HI | {"max_tokens": 2, "verbosity": verbosity}
        assert client.post(CHAT, json=body).status_code == 200
    assert post(server, CHAT, HI | {"verbosity": "loud"})[0] == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, HI),
        (COMPLETIONS, HELLO),
        ("/tokenize", HELLO),
        ("/tokenize", HI),
        ("/detokenize", {"tokens": [1]}),
    ],
)
def test_another_model(server: Live, path: str, body: dict):
    status, error = post(server, path, body | {"model": "gpt-4"})
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "'tiny-glm' is" in error["message"]
    with server.http as client:
        assert client.post(path, json=body | {"model": "tiny-glm"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nope", 404), ("GET", CHAT, 405), ("POST", "/health", 405)],
)
def test_no_such_place(server: Live, method: str, path: str, status: int):
    with server.http as client:
        response = client.request(method, path)
    assert response.status_code == status
    assert path in response.json()["error"]["message"]


# Words of a client's own

FORGED = "a\n2026-01-01 INFO ready: forged\u2028\x1b[2J"
HUGE = "x" * 300_000
TOOL = {"type": "function", "function": {"name": "f"}}
OWN: list[tuple[str, dict[str, Any], Callable[[str], dict[str, Any]]]] = [
    (CHAT, HI, lambda own: {own: 1}),
    (CHAT, HI, lambda own: {"model": own}),
    (CHAT, HI, lambda own: {"tools": [TOOL], "tool_choice": own}),
    (CHAT, HI, lambda own: {"tools": [{"type": own}]}),
    (CHAT, HI, lambda own: {"response_format": {"type": own}}),
    (CHAT, HI, lambda own: {"logit_bias": {own: 1}}),
    (CHAT, HI, lambda own: {"regex": f"({own}"}),
    ("/v1/responses", {"input": "a"}, lambda own: {own: 1}),
    ("/generate", {"text": "a"}, lambda own: {"sampling_params": {own: 1}}),
    ("/tokenize", HELLO, lambda own: {own: 1}),
    ("/parse_function_call", {"text": "a"}, lambda own: {"tool_call_parser": own}),
    ("/v1/messages", HI | {"model": "tiny-glm", "max_tokens": 1}, lambda own: {own: 1}),
]


@pytest.mark.parametrize(("path", "body", "made"), OWN)
@pytest.mark.parametrize("own", [FORGED, HUGE])
def test_words_of_a_client_forge_and_fill_nothing(
    server: Live, path: str, body: dict, made: Callable[[str], dict], own: str, caplog: Any
):
    caplog.set_level(logging.INFO, "glmjax")
    with server.http as client:
        response = client.post(path, json=body | made(own))
    assert response.status_code in (400, 404)
    assert len(response.content) < 3000
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"POST {path}: {response.status_code}, " in line
    assert line.isprintable()
    assert len(line) < 1000
    error = response.json()["error"]
    assert len(error["message"]) <= HEAD + TAIL + 5
    assert len(error.get("param") or "") <= HEAD + TAIL + 5


@given(text=st.text(max_size=20) | st.integers(0, 2000).map("ab\n".__mul__))
def test_a_line_of_a_log_is_one_line(text: str):
    line = log_line(text)
    assert line.isprintable()
    assert line.startswith(text[:5]) or not text[:5].isprintable()
    assert line.endswith(text[-5:]) or not text[-5:].isprintable()
    if len(text) <= HEAD + TAIL and text.isprintable():
        assert line == text


@pytest.mark.parametrize(
    ("method", "path", "data", "words"),
    [
        ("GET", "/nope", b"", "404, no such path"),
        ("GET", "/a%0Ab", b"", "404, no such path"),
        ("GET", "/" + "x" * 5000, b"", "no such path"),
        ("PUT", CHAT, b"", "405, Method Not Allowed"),
        ("POST", CHAT, b"{", "400, the body is not JSON"),
    ],
)
def test_every_refusal_is_in_the_log(
    server: Live, method: str, path: str, data: bytes, words: str, caplog: Any
):
    caplog.set_level(logging.INFO, "glmjax")
    with server.http as client:
        client.request(method, path, content=data, headers=JSON)
    (line,) = [record.getMessage() for record in caplog.records]
    assert words in line
    assert f"{method} /" in line
    assert line.isprintable()
    assert len(line) < 700


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b'"x"', b"\xff"])
def test_bodies_that_are_no_json_object(server: Live, data: bytes):
    with server.http as client:
        response = client.post(CHAT, content=data, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    json_of_another_kind = data not in (b"{", b"\xff")
    assert ("must be a JSON object" in response.text) == json_of_another_kind


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
def test_a_step_that_fails(broken: Live, path: str, body: dict, stream: bool, caplog: Any):
    caplog.set_level(logging.INFO, "glmjax.server.frontend")
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
        assert f", failed ({error['message']!r}), " in logged(caplog, " tokens, ")
        assert "cancelled" not in caplog.text
        broken.runner.broken = False
        short = HELLO | {"max_tokens": 2}
        assert client.post(COMPLETIONS, json=short).status_code == 200, "it serves others on"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "hi", "max_output_tokens": 4000, "ignore_eos": True}),
        ("/v1/messages", HI | {"model": "tiny-glm", "max_tokens": 4000}),
    ],
)
def test_streams_that_end_with_an_error_of_their_own(
    served: ServedModel, path: str, body: dict, caplog: Any
):
    caplog.set_level(logging.INFO, "glmjax.server.frontend")
    script = served.tokenizer.encode("a")
    with live(served, step_s=0.002, script=script) as server, server.http as client:
        thread = break_soon(server)
        response = client.post(path, json=body | {"stream": True})
        thread.join()
    assert "the device is on fire" in response.text
    assert "failed ('a step of the engine failed" in caplog.text
    assert "cancelled" not in caplog.text
