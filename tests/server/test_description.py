"""/openapi.json is true: real answers, of every status, are as it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import jsonschema
import pytest
import requests
import schemathesis
from fastapi.openapi.utils import get_openapi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import Live, live, wait_until
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from glmjax.server.access import EVERYONE
from glmjax.server.http.description import answer_schemas
from glmjax.server.http.endpoints import ENDPOINTS, KINDS, TAGS
from glmjax.server.http.request_schemas import EITHER, EXTRA, FIELDS, OF_MODEL
from glmjax.server.http.server import create_app
from glmjax.server.request_times import RequestTimes
from glmjax.server.served import ServedModel
from glmjax.server.unserved import NOTHING

TEXT = (
    "\n<think>hm</think>\nHello."
    "\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>"
)
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
EXAMPLES = [(path, name) for path, endpoint in ENDPOINTS.items() for name in endpoint.examples]
STREAMED = [path for path, endpoint in ENDPOINTS.items() if endpoint.event]
GENERATING = [path for path, endpoint in ENDPOINTS.items() if 429 in KINDS[endpoint.kind]]
CASES = settings(deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def small(served: ServedModel) -> ServedModel:
    """With a short context, so that no answer is long."""
    return replace(served, max_seq_len=512)


@pytest.fixture(scope="module")
def talker(small: ServedModel) -> Iterator[Live]:
    """A server whose every answer has a thought, a text and a call."""
    script = small.tokenizer.encode(TEXT) + list(small.eos_token_ids[:1])
    with live(small, script=script, queue=256) as server:
        yield server


@pytest.fixture(scope="module")
def client(talker: Live) -> Iterator[httpx.Client]:
    with talker.http as made:
        yield made


@pytest.fixture(scope="module")
def description(client: httpx.Client) -> dict[str, Any]:
    return client.get("/openapi.json").json()


@pytest.fixture(scope="module")
def validate(description: dict[str, Any]) -> Any:
    """Check a value against a component, named as in an Endpoint."""

    def check(value: Any, name: str) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": description["components"]}
        jsonschema.Draft202012Validator(schema).validate(value)

    return check


def operations(description: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """By path: its one method, and what is said of it."""
    found = {}
    for path, methods in description["paths"].items():
        (found[path],) = methods.items()
    return found


# What it says


def test_every_path_is_described(description: dict[str, Any]):
    assert description["paths"].keys() == ENDPOINTS.keys()
    assert "HTTPValidationError" not in json.dumps(description)
    for path, (_, operation) in operations(description).items():
        statuses = {200, *KINDS[ENDPOINTS[path].kind]}
        assert set(operation["responses"]) == set(map(str, statuses))
        assert operation["description"]
        assert operation["tags"][0] in TAGS


def test_it_can_be_read(description: dict[str, Any]):
    """Whoever makes clients from it needs references that lead somewhere, and plain names."""
    assert description["openapi"] == "3.1.0"  # makers of clients refuse later ones
    assert "itemSchema" not in json.dumps(description)  # is of 3.2
    schemathesis.openapi.from_dict(description).validate()
    text = json.dumps(description)
    names = description["components"]["schemas"].keys()
    used = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used <= names
    assert all(name.isalpha() for name in names)
    ids = [operation["operationId"] for _, operation in operations(description).values()]
    assert len(ids) == len(set(ids))
    assert description["info"]["title"] == "glmjax"
    assert "unknown_path" in description["info"]["description"]


def test_events_of_streams_are_described(description: dict[str, Any]):
    for path, (_, operation) in operations(description).items():
        content, event = operation["responses"]["200"]["content"], ENDPOINTS[path].event
        assert ("text/event-stream" in content) == (event is not None), path
        if event is not None:
            words = json.dumps(content["text/event-stream"]["schema"])
            assert f"/{event.__name__}" in words
            assert ("[DONE]" in words) == (ENDPOINTS[path].last is not None)


def test_requests_and_answers_have_no_name_in_common(talker: Live):
    app = create_app(talker.frontend, RequestTimes(), EVERYONE)
    requests = get_openapi(title="requests", version="0", routes=app.routes)
    assert not requests["components"]["schemas"].keys() & answer_schemas().keys()


def test_every_body_has_examples(description: dict[str, Any]):
    for path, (_, operation) in operations(description).items():
        if "requestBody" in operation:
            content = operation["requestBody"]["content"]["application/json"]
            assert content["examples"].keys() == ENDPOINTS[path].examples.keys(), path
        else:
            assert not ENDPOINTS[path].examples, path


def test_requests_are_described_as_narrow_as_they_are(description: dict[str, Any]):
    components = description["components"]["schemas"]
    for name, fields in FIELDS.items():
        assert components[name]["properties"].keys() & fields.keys(), name
    assert FIELDS.keys() | EXTRA.keys() | EITHER.keys() | {*OF_MODEL} <= components.keys()
    assert "stop" in components["ChatRequest"]["properties"]
    hidden = components["ChatRequest"]["properties"]["return_hidden_states"]
    assert hidden == {"anyOf": [{"const": False}, {"type": "null"}]}
    assert components["ChatRequest"]["additionalProperties"] == NOTHING
    assert components["TokenizeRequest"]["additionalProperties"] == NOTHING


# Answers


def body_of(description: dict[str, Any], path: str, name: str) -> dict[str, Any]:
    _, operation = operations(description)[path]
    return operation["requestBody"]["content"]["application/json"]["examples"][name]["value"]


@pytest.mark.parametrize(("path", "name"), EXAMPLES)
def test_examples_succeed(
    client: httpx.Client, description: dict[str, Any], validate: Any, path: str, name: str
):
    body = body_of(description, path, name)
    schema = operations(description)[path][1]["requestBody"]["content"]["application/json"]
    schema = schema["schema"] | {"components": description["components"]}
    jsonschema.Draft202012Validator(schema).validate(body)
    response = client.post(path, json=body)
    client.post("/continue_generation")
    assert response.status_code == 200, response.text
    endpoint = ENDPOINTS[path]
    if body.get("stream"):
        assert endpoint.event
        for value in events(description, path, response):
            validate(value, endpoint.event.__name__)
    else:
        assert endpoint.answer
        validate(response.json(), endpoint.answer.__name__)


def events(description: dict[str, Any], path: str, response: httpx.Response) -> list[Any]:
    """The values of a stream, each of whose events is as it is described."""
    assert response.headers["content-type"].startswith("text/event-stream")
    _, operation = operations(description)[path]
    schema = operation["responses"]["200"]["content"]["text/event-stream"]["schema"]
    components = {"components": description["components"]}
    data = schema["properties"]["data"]
    kinds = data.get("anyOf", [data])
    sent = [dict(line.split(": ", 1) for line in e.split("\n")) for e in _blocks(response)]
    for one in sent:
        jsonschema.Draft202012Validator(schema | components).validate(one)
    last = {kind["const"] for kind in kinds if "const" in kind}
    assert last <= {sent[-1]["data"]}
    values = [json.loads(one["data"]) for one in sent if one["data"] not in last]
    for value in values:  # validators take the schema of what is in a string for a comment
        content = kinds[-1]["contentSchema"] | components
        jsonschema.Draft202012Validator(content).validate(value)
    return values


def _blocks(response: httpx.Response) -> list[str]:
    *blocks, rest = response.text.split("\n\n")
    assert rest == ""
    return blocks


@pytest.mark.parametrize("path", STREAMED)
@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_hold_all_there_is(
    client: httpx.Client, description: dict[str, Any], validate: Any, path: str, stream: bool
):
    more: dict[str, Any] = {
        "/v1/chat/completions": {
            "max_tokens": 200,
            "n": 2,
            "logprobs": True,
            "top_logprobs": 2,
            "stream_options": {"include_usage": True},
        },
        "/v1/completions": {"logprobs": 2, "echo": True, "n": 2, "max_tokens": 200},
        "/v1/responses": {
            "max_output_tokens": 200,
            "top_logprobs": 2,
            "metadata": {"a": "b"},
            "reasoning": {"effort": "high"},
        },
        "/v1/messages": {"max_tokens": 200, "thinking": {"type": "adaptive"}},
        "/generate": {
            "return_logprob": True,
            "top_logprobs_num": 2,
            "logprob_start_len": 0,
            "return_text_in_logprobs": True,
            "sampling_params": {"max_new_tokens": 200, "n": 2},
        },
    }[path]
    names = body_of(description, path, "with tools" if path in CONVERSATIONS else "text")
    response = client.post(path, json=names | more | {"stream": stream})
    assert response.status_code == 200, response.text
    endpoint = ENDPOINTS[path]
    if stream:
        assert endpoint.event
        for value in events(description, path, response):
            validate(value, endpoint.event.__name__)
    else:
        assert endpoint.answer
        validate(response.json(), endpoint.answer.__name__)
    if path in CONVERSATIONS and not stream:
        assert all(word in response.text for word in ("hm", "Hello.", "get_weather", "Rome"))


CONVERSATIONS = ("/v1/chat/completions", "/v1/responses", "/v1/messages")


@pytest.mark.parametrize("path", [path for path, e in ENDPOINTS.items() if not e.examples])
def test_endpoints_without_a_body(
    client: httpx.Client, description: dict[str, Any], validate: Any, talker: Live, path: str
):
    method, operation = operations(description)[path]
    response = client.request(method, path.format(name=talker.model))
    assert response.status_code == 200
    kind = response.headers["content-type"].split(";")[0]
    assert kind in operation["responses"]["200"]["content"]
    answer = ENDPOINTS[path].answer
    if answer is not None:
        validate(response.json(), answer.__name__)


# Errors


def check_error(
    description: dict[str, Any], validate: Any, path: str, response: httpx.Response, status: int
) -> None:
    """It is of that status, which is described, and so is its body."""
    assert response.status_code == status, response.text
    told = operations(description)[path][1]["responses"][str(status)]
    schema = told["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
    assert schema == ("AnthropicError" if path.startswith("/v1/messages") else "Error")
    validate(response.json(), schema)


def endless(description: dict[str, Any], path: str) -> dict[str, Any]:
    """A request of much work."""
    name = "short" if path in ("/v1/chat/completions", "/v1/messages") else "text"
    limits: dict[str, Any] = {
        "/v1/responses": {"max_output_tokens": 400},
        "/generate": {"sampling_params": {"max_new_tokens": 400, "ignore_eos": True}},
    }
    more = limits.get(path, {"max_tokens": 400})
    if path not in ("/generate", "/v1/messages"):
        more = more | {"ignore_eos": True}
    return body_of(description, path, name) | more


def test_no_such_model(client: httpx.Client, description: dict[str, Any], validate: Any):
    for path, endpoint in ENDPOINTS.items():
        if 404 in KINDS[endpoint.kind] and endpoint.examples:
            body = body_of(description, path, next(iter(endpoint.examples)))
            response = client.post(path, json=body | {"model": "gpt-4"})
            check_error(description, validate, path, response, 404)
    response = client.get("/v1/models/gpt-4")
    check_error(description, validate, "/v1/models/{name}", response, 404)


def test_bodies_that_are_malformed(
    client: httpx.Client, description: dict[str, Any], validate: Any
):
    for path, endpoint in ENDPOINTS.items():
        if endpoint.examples:
            body = body_of(description, path, next(iter(endpoint.examples)))
            for bad in (body | {"no_such_field": 1}, [], {"mode": 5}, {key: {} for key in body}):
                response = client.post(path, json=bad)
                check_error(description, validate, path, response, 400)


def test_a_full_queue_and_a_deadline(
    small: ServedModel, description: dict[str, Any], validate: Any
):
    with (
        live(small, slots=1, queue=1, step_s=0.01) as server,
        server.http as client,
        ThreadPoolExecutor() as others,
    ):
        busy = {"input_ids": [1], "sampling_params": {"max_new_tokens": 500, "ignore_eos": True}}
        load = server.frontend.engine.load
        for rid, then in (("runs", (1, 0)), ("waits", (1, 1))):
            others.submit(client.post, "/generate", json=busy | {"rid": rid})
            wait_until(lambda then=then: load()[:2] == then)
        for path in GENERATING:
            if path == "/health_generate":
                response = client.get(path)
            else:
                response = client.post(path, json=endless(description, path))
            check_error(description, validate, path, response, 429)
            assert int(response.headers["retry-after"]) > 0
        for rid in ("runs", "waits"):
            client.post("/abort_request", json={"rid": rid})
        server.wait_idle()
        for path in GENERATING:
            if path not in ("/health_generate", "/v1/messages"):
                body = endless(description, path) | {"timeout": 0.05}
                check_error(description, validate, path, client.post(path, json=body), 504)


def test_a_device_that_fails(small: ServedModel, description: dict[str, Any], validate: Any):
    with live(small) as server, server.http as client:
        for path in GENERATING:
            server.runner.broken = True
            if path == "/health_generate":
                response = client.get(path)
            else:
                response = client.post(path, json=endless(description, path))
            check_error(description, validate, path, response, 500)


def test_a_server_that_stops(small: ServedModel, description: dict[str, Any], validate: Any):
    with live(small) as server, server.http as client:
        assert server.drain()
        for path, endpoint in ENDPOINTS.items():
            if 429 in KINDS[endpoint.kind] and endpoint.examples:
                response = client.post(path, json=endless(description, path))
                check_error(description, validate, path, response, 503)
        check_error(description, validate, "/health_generate", client.get("/health_generate"), 503)
        health, told = client.get("/health"), operations(description)["/health"][1]["responses"]
        assert health.status_code == 503
        (name,) = told["503"]["content"]["application/json"]["schema"].values()
        validate(health.json(), name.split("/")[-1])
        server.frontend.engine.close()
        for path in ("/flush_cache", "/pause_generation", "/continue_generation"):
            check_error(description, validate, path, client.post(path), 503)


# Limits

BEYOND: dict[str, Any] = {
    "minimum": lambda limit: limit - 1,
    "exclusiveMinimum": lambda limit: limit,
    "maximum": lambda limit: limit + 1,
}


@pytest.mark.parametrize("name", ["ChatRequest", "CompletionRequest", "NativeSampling"])
def test_limits_are_those_that_are_enforced(client: httpx.Client, name: str):
    path, bare = {
        "ChatRequest": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        "CompletionRequest": ("/v1/completions", {"prompt": "a"}),
        "NativeSampling": ("/generate", {"text": "a"}),
    }[name]
    model = {"ChatRequest": True, "CompletionRequest": True}.get(name, False)
    for field, limits in FIELDS[name].items():
        for kind in BEYOND.keys() & limits.keys():
            for value, status in ((BEYOND[kind](limits[kind]), 400), (limits[kind], 200)):
                if status == 200 and (kind == "exclusiveMinimum" or field.startswith("max_")):
                    continue  # it is beyond too, or too little except with echo
                asked = {field: value} | ({"logprobs": True} if field == "top_logprobs" else {})
                body = bare | (asked if model else {"sampling_params": asked})
                response = client.post(path, json=body)
                unknown = "unknown field" in response.text
                assert response.status_code == status or unknown, (field, value, response.text)


# Anything


def operation_cases(description: dict[str, Any], path: str, mode: GenerationMode) -> Any:
    schema = schemathesis.openapi.from_dict(description)
    method, _ = operations(description)[path]
    return schema[path][method.upper()].as_strategy(generation_mode=mode)


def try_cases(talker: Live, description: dict[str, Any], path: str, count: int) -> None:
    valid, invalid = (operation_cases(description, path, mode) for mode in GenerationMode)
    wrong = invalid if ENDPOINTS[path].examples else st.nothing()

    with requests.Session() as session:

        @settings(CASES, max_examples=count)
        @given(case=valid | wrong)
        def attempt(case: Any) -> None:
            response = case.call(base_url=talker.url, session=session)
            assert response.status_code < 500 or response.status_code == 504
            case.validate_response(response, checks=CHECKS)
            if path == "/pause_generation":
                session.post(f"{talker.url}/continue_generation")

        attempt()
    talker.wait_idle()


@pytest.mark.parametrize("path", ENDPOINTS)
def test_anything_gets_what_is_described(talker: Live, description: dict[str, Any], path: str):
    try_cases(talker, description, path, 25 if ENDPOINTS[path].examples else 3)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path, e in ENDPOINTS.items() if e.examples])
def test_very_much_gets_what_is_described(talker: Live, description: dict[str, Any], path: str):
    try_cases(talker, description, path, 500)
