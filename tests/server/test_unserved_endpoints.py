"""Paths that are not served say so, and what is served instead; bodies are JSON or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from live import Live

from glmjax.server.http.endpoints import ENDPOINTS
from glmjax.server.http.json_body import parsed
from glmjax.server.http.unserved_paths import UNSERVED

JSON = {"content-type": "application/json"}
ROOTS = [root for roots in UNSERVED.values() for root in roots]
WITH_BODY = [path for path, endpoint in ENDPOINTS.items() if endpoint.examples]


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[httpx.Client]:
    with server.http as made:
        yield made


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    """What it says, in the shape of its path."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    if response.url.path.startswith("/v1/messages"):
        assert body["type"] == "error"
        return body["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "invalid_request_error"
    return body["error"]


# Paths


@pytest.mark.parametrize("root", ROOTS)
def test_what_is_not_served_is_told_with_what_is(client: httpx.Client, root: str):
    served = root in ENDPOINTS
    for path in (f"{root}/an-id/more", *([] if served else [root])):
        for method in ("GET", "POST", "DELETE"):
            told = error(client.request(method, path), 404)
            assert f"{method} {path}: not served: " in told["message"]
            assert told.get("code", "not_served") == "not_served"


def test_what_is_recommended_is_served():
    for why in UNSERVED:
        words = [word.strip(";,.") for word in why.split() if word.startswith("/")]
        assert set(words) <= ENDPOINTS.keys(), why


def test_no_path_is_in_the_table_twice():
    assert len(ROOTS) == len(set(ROOTS))
    assert not [r for r in ROOTS for other in ROOTS if r.startswith(f"{other}/")]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/V1/Models", "/v1/models"),
        ("/v1/message", "/v1/messages"),
        ("/v1/completions/x", "/v1/completions"),
        ("/v1/completes", "/v1/completions"),  # /v1/complete is another server's
        ("/v1/chat/completions2", "/v1/chat/completions"),
        ("/genrate", "/generate"),
        ("/get_serverinfo", "/get_server_info"),
        ("/metric", "/metrics"),
    ],
)
def test_a_typo_gets_the_path_that_was_meant(client: httpx.Client, typed: str, meant: str):
    told = error(client.post(typed), 404)
    assert told["message"] == f"POST {typed}: no such path; did you mean {meant}?"
    assert told["code"] == "unknown_path"


@pytest.mark.parametrize("path", ["/_", "/nope", "/version", "/%F0%9F%8E%89", "/" + "x" * 5000])
def test_a_path_that_is_like_none(client: httpx.Client, path: str):
    assert "no such path; /openapi.json lists" in error(client.get(path), 404)["message"]


def test_a_wrong_method(client: httpx.Client):
    for method, path, allowed in (("GET", "/generate", "POST"), ("PUT", "/health", "GET")):
        response = client.request(method, path)
        assert "Method Not Allowed" in error(response, 405)["message"]
        assert allowed in response.headers["allow"]


def test_a_client_does_not_try_again(server: Live):
    import openai

    with server.openai as client, pytest.raises(openai.NotFoundError, match="no embeddings"):
        client.with_options(max_retries=5).embeddings.create(model="x", input="hi")


# Bodies

JUNK: list[tuple[bytes, str]] = [
    (b"", "must be a JSON object"),
    (b"{", "not JSON"),
    (b"hello", "not JSON"),
    (b'{"a": 1} x', "not JSON"),
    (b"[]", "must be a JSON object"),
    (b'"text"', "must be a JSON object"),
    (b"5", "must be a JSON object"),
    (b"null", "must be a JSON object"),
    (b'{"n": NaN}', "NaN is no number"),
    (b'{"n": -Infinity}', "-Infinity is no number"),
    (b'{"m": 1, "n": 2, "n": 3}', "'n' more than once"),
    (b'{"m": {"deep": [{"a": 1, "a": 1}]}}', "'a' more than once"),
    (b'{"\\ud800": 1, "\\ud800": 1}', "more than once"),
    (b'{"text": "\xff"}', "not UTF-8, at byte 10"),
    (b'\xef\xbb\xbf{"text": "a"}', "not JSON"),
    ('{"text": "a"}'.encode("utf-16"), "not UTF-8"),
    (b"[" * 10_000 + b"]" * 10_000, "too deep"),
    (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "too deep"),
    (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
    (b'{"n": 1e999}', ""),
]


@pytest.mark.parametrize(("body", "words"), JUNK)
def test_junk_is_refused(client: httpx.Client, body: bytes, words: str):
    for path in WITH_BODY:
        if path == "/pause_generation" and body in (b"", b"null"):
            continue  # its body may be left out
        told = error(client.post(path, content=body, headers=JSON), 400)
        assert words in told["message"], path


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None, "x;y"])
def test_a_body_must_say_that_it_is_json(client: httpx.Client, kind: str | None):
    for path in WITH_BODY:
        example = next(iter(ENDPOINTS[path].examples.values()))
        headers = {} if kind is None else {"content-type": kind}
        response = client.post(path, content=json.dumps(example).encode(), headers=headers)
        assert "content-type: application/json" in error(response, 400)["message"]


def test_ways_to_say_that_it_is_json(client: httpx.Client):
    for kind in ("application/json", "Application/JSON; charset=utf-8"):
        body = {"content": b'{"prompt": "a"}', "headers": {"content-type": kind}}
        assert client.post("/tokenize", **body).status_code == 200


@pytest.mark.parametrize("depth", [100, 300, 900])
def test_deep_values_of_free_fields(client: httpx.Client, depth: int):
    deep: Any = 1
    for _ in range(depth):
        deep = [deep]
    bodies = {
        "/v1/chat/completions": {"tools": deep, "messages": [{"role": "user", "content": deep}]},
        "/v1/completions": {"prompt": "a", "user": deep, "metadata": deep, "max_tokens": 1},
        "/tokenize": {"messages": [{"role": "user", "content": "a", "x": deep}]},
        "/parse_function_call": {"text": "a", "tools": [{"type": "function", "function": deep}]},
    }
    for path, body in bodies.items():
        assert client.post(path, json=body).status_code in (200, 400)


def test_what_is_json_is_read_as_python_reads_it():
    text = '{"a": [1, 2.5, null, true, "\\u00e9\\ud83c\\udf89"], "b": {}, "c": 1e5, "": -0}'
    assert parsed(text.encode()) == json.loads(text)
