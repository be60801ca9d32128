"""Anthropic's API: how a request is refused, and what its client makes of that."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import anthropic
import httpx
import pytest
from anthropic_bodies import (
    BASE,
    FORMAT,
    HELLO,
    HI,
    IMAGE,
    PATHS,
    PROMPT,
    TOOL,
    assistant,
    document,
    reference,
    result,
    text,
    thought,
    use,
    user,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Live, live, logged, wait_until
from test_http_fuzz import JUNK

from glmjax.server.anthropic.requests import MessagesRequest, PromptRequest
from glmjax.server.served import ServedModel
from glmjax.text.chat import ChatTemplate

SYSTEM = {"role": "system", "content": "x"}
AUDIO = {"type": "audio"}
REFERENCE = reference("x")
DEFERRED = TOOL | {"name": "later", "defer_loading": True}
UNSOLVABLE = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
BEGUN = {"messages": [*HI, assistant(text("[1"))]}
JSON = {"content-type": "application/json"}
DEEP = json.loads("[" * 101 + "]" * 101)


def post(server: Live, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    with server.http as client:
        response = client.post(path, content=json.dumps(body), headers=JSON)
    told = response.json()
    assert set(told) == {"type", "error", "request_id"}
    assert told["type"] == "error"
    assert told["request_id"] == response.headers["request-id"]
    assert set(told["error"]) == {"type", "message"}
    return response.status_code, told["error"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": None}, "messages: should be a valid list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [], "system": "x"}, "messages is empty"),
        ({"messages": [user()]}, "no message but the system's has content"),
        ({"messages": [SYSTEM]}, "no message but the system's has content"),
        ({"messages": [5]}, "messages[0]: role is None"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]: role is 'robot'"),
        ({"messages": [*HI, {"role": "user"}]}, "messages[1].content: Field required"),
        ({"messages": [*HI, HELLO | {"x": 1}]}, "messages[1].x: Extra inputs"),
        ({"messages": [HELLO | {"content": 5}]}, "messages[0].content: should be a valid"),
        ({"messages": [user(AUDIO)]}, "messages[0].content[0]: type is 'audio'"),
        ({"messages": [user({"type": "x"})]}, "text, image, document, search_result, tool_result"),
        ({"messages": [user({"type": "document"})]}, "messages[0].content[0].source: Field req"),
        ({"messages": [user(document("a", source=AUDIO))]}, "content[0].source: type is 'audio'"),
        ({"messages": [user(document("a", source=5))]}, "content[0].source: type is None"),
        ({"messages": [user(document("a", title=5))]}, "content[0].title: should be"),
        ({"messages": [user(document("a", page=5))]}, "content[0].page: Extra"),
        ({"messages": [user(document("a", source={"type": "text"}))]}, "[0].source.data: Field"),
        ({"messages": [user({"type": "search_result"})]}, "content[0].source: Field required"),
        ({"messages": [user(reference("f"))]}, "content[0]: type is 'tool_reference'"),
        (
            {"messages": [*HI, assistant(use("f")), user(result("f", [text("a"), REFERENCE]))]},
            "messages[2].content[0].content[1].tool_name is 'x', but tools has no such tool",
        ),
        ({"tools": [DEFERRED]}, "all tools have defer_loading"),
        ({"tools": [DEFERRED, TOOL | {"name": "a b"}]}, "tools[1].name is 'a b'"),
        ({"tools": [DEFERRED | {"name": "a b"}, TOOL]}, "tools[0].name is 'a b'"),
        (
            {"tools": [DEFERRED | {"strict": True, "input_schema": UNSOLVABLE}, TOOL]},
            "tools[0].input_schema are strict, but cannot be held to",
        ),
        ({"messages": [*HI, user(text("a"), thought("b"))]}, "messages[1].content[1]: type"),
        ({"messages": [user({"type": "text"})]}, "messages[0].content[0].text: Field required"),
        ({"messages": [user(text("a", foo=1))]}, "messages[0].content[0].foo: Extra"),
        ({"messages": [user(text("a"), {"type": "text", "text": 5})]}, "[1].text: should be"),
        ({"messages": [*HI, assistant(use("f") | {"input": "x"})]}, "[1].content[0].input: "),
        ({"messages": [*HI, assistant(use("f"))]}, "messages[1].content[0]: the tool_use 'id-f'"),
        ({"messages": [*HI, assistant(text("a"), use("f")), *HI]}, "messages[1].content[1]: "),
        ({"messages": [*HI, user(text("a"), result("f"))]}, "messages[1].content[1].tool_use_id"),
        (
            {"messages": [*HI, assistant(use("f")), user(result("f"), result("f"))]},
            "messages[2].content[1].tool_use_id is 'id-f', but that call has its result already, "
            "in messages[2].content[0]",
        ),
        (
            {"messages": [*HI, assistant(use("f")), user(result("f"), result("g"))]},
            "messages[2].content[1].tool_use_id is 'id-g', but the assistant's message before it",
        ),
        (
            {"messages": [*HI, assistant(use("f")), assistant(use("g"), use("f"))]},
            "messages[2].content[1].id is 'id-f', but so is that of messages[1].content[0]",
        ),
        (
            {"messages": [*HI, assistant(use("f")), user(result("f", [text("a"), AUDIO]))]},
            "messages[2].content[0].content[1]: type is 'audio', but only these are served: text, ",
        ),
        (
            {
                "system": "x",
                "messages": [*HI, assistant(text("a"), use("f", a=DEEP)), user(result("f"))],
            },
            "messages[1].content[1].input is nested more than",
        ),
        ({"messages": [*HI, assistant(text("a "))]}, "cannot end with trailing whitespace"),
        (BEGUN | {"output_format": FORMAT}, "output_format does not go with a final"),
        (BEGUN | {"output_config": {"format": FORMAT}}, "output_config.format does not go"),
        ({"system": [IMAGE]}, "system[0]: type is 'image'"),
        ({"system": 5}, "system: should be"),
        ({"tools": [{"type": "web_search_20250305", "name": "s"}]}, "tools[0]: type is 'web_sea"),
        ({"tools": [TOOL, {"type": "bash_20250124", "name": "bash"}]}, "tools[1]: type is 'bash"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema: Field required"),
        ({"tools": [TOOL | {"name": "a b"}]}, "tools[0].name is 'a b'"),
        ({"tools": [TOOL | {"name": "function.name "}]}, "tools[0].name is 'function.name '"),
        ({"tools": [TOOL, TOOL]}, "tools has 'ping' more than once"),
        ({"tools": [TOOL | {"allowed_callers": ["code_execution_20250825"]}]}, "allowed_callers"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name is missing"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "names 'x'"),
        ({"tool_choice": {"type": "any"}}, "there is none"),
        ({"tool_choice": "auto"}, "tool_choice: "),
        ({"thinking": {"type": "on"}}, "thinking.type: should be 'enabled'"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens is -1"),
        ({"thinking": {"type": "enabled", "budget_tokens": 8}}, "below max_tokens, which is 8"),
        ({"max_tokens": 0}, "max_tokens is 0, but must be 1 or more"),
        ({"max_tokens": None}, "max_tokens: "),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": -2}, "top_k is -2"),
        ({"stop_sequences": "a"}, "stop_sequences: should be a valid list"),
        ({"stop_sequences": ["a", "b\ud83d"]}, "stop_sequences[1] is not valid Unicode"),
        ({"stop_sequences": ["a", ""]}, "stop_sequences holds an empty string"),
        ({"output_format": FORMAT, "output_config": {"format": FORMAT}}, "leave one out"),
        ({"output_format": {"type": "json_schema"}}, "output_format.schema: Field required"),
        ({"output_format": FORMAT | {"schema": {"type": 5}}}, "output_format must be"),
        ({"output_config": {"format": FORMAT | {"schema": {"type": 5}}}}, "output_config.format"),
        ({"output_config": {"effort": "lots"}}, "output_config.effort: should be 'low'"),
        ({"output_config": {"task_budget": {"total": 9}}}, "output_config.task_budget: Extra"),
        ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "edits[0]: type is"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers is not served yet"),
        ({"fallback_credit_token": "x"}, "fallback_credit_token is not served yet"),
        ({"speed": "fast"}, "speed is not served yet"),
        ({"max_tokn": 5}, "max_tokn"),
        ({"messages": [user(text("\ud800"))]}, "Unicode"),
    ],
)
def test_bad_requests(server: Live, body: dict, words: str):
    status, error = post(server, PATHS[0], BASE | body)
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert words in error["message"]


REFUSING = ChatTemplate(
    "{% for message in messages %}{% if 'bad' in message.content %}"
    "{{ raise_exception('it is bad') }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("bad", "where"),
    [
        ({"system": "bad"}, "system"),
        ({"messages": [*HI, assistant(text("bad")), *HI]}, "messages[1]"),
        ({"messages": [*HI, assistant(use("f")), user(text("bad"), result("f"))]}, "messages[2]"),
        (
            {"messages": [*HI, assistant(use("f")), user(text("a"), result("f", "bad"))]},
            "messages[2].content[1]",
        ),
    ],
)
def test_what_the_template_refuses(served: ServedModel, bad: dict, where: str):
    with live(replace(served, template=REFUSING)) as server:
        for path in PATHS:
            body = {"system": "x"} | (PROMPT if "count" in path else BASE) | bad
            status, error = post(server, path, body)
            assert status == 400
            assert error["message"] == f"{where}: the chat template refused it: it is bad"


@pytest.mark.parametrize("path", PATHS)
def test_what_is_required(server: Live, path: str):
    sound = PROMPT if "count" in path else BASE
    for name in sound:
        status, error = post(server, path, {k: v for k, v in sound.items() if k != name})
        assert (status, error["message"]) == (400, f"{name}: Field required")


def test_counting_takes_no_sampling(server: Live):
    status, error = post(server, PATHS[1], BASE | {"max_tokens": 5, "stream": True})
    assert (status, "unknown field" in error["message"]) == (400, True)


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", PATHS[0], 405, "invalid_request_error"),
        ("GET", "/v1/messages/nothing", 404, "not_found_error"),
        ("POST", "/v1/messages/batches", 404, "not_found_error"),
    ],
)
def test_no_such_place(server: Live, method: str, path: str, status: int, kind: str):
    with server.http as client:
        response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == kind


def test_other_paths_keep_the_other_shape(server: Live):
    with server.http as client:
        for path in ("/v1/messagesx", "/v1/chat/completions"):
            assert set(client.get(path).json()) == {"error"}


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b'"x"', b"\xff", b"[" * 5000])
def test_bodies_that_are_no_json_object(server: Live, data: bytes):
    with server.http as client:
        for path in PATHS:
            response = client.post(path, content=data, headers=JSON)
            assert response.status_code == 400
            assert response.json()["error"]["type"] == "invalid_request_error"


# What the client makes of errors


def client_of(server: Live) -> anthropic.Anthropic:
    http = anthropic.DefaultHttpxClient(verify=False)
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, http_client=http)


def test_the_clients_errors(server: Live):
    with client_of(server) as client:
        with pytest.raises(anthropic.NotFoundError) as found:
            client.messages.create(**BASE | {"model": "claude"})
        assert found.value.type == "not_found_error"
        assert "'claude' is not served here" in str(found.value)
        assert (found.value.request_id or "").startswith("req_")
        with pytest.raises(anthropic.NotFoundError):
            client.messages.count_tokens(model="claude", messages=HI)
        with pytest.raises(anthropic.BadRequestError, match="max_tokens is 0"):
            client.messages.create(**BASE | {"max_tokens": 0})


def test_the_id_of_an_error_is_in_the_log(server: Live, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "glmjax")
    with server.http as http:
        for data in (b"{", b"{}", json.dumps(BASE | {"max_tokens": 0})):
            told = http.post(PATHS[0], content=data, headers=JSON).json()
            line = next(line for line in caplog.messages if told["request_id"] in line)
            assert line.count("POST /v1/messages: ") == 1
            assert line.endswith(told["error"]["message"].removeprefix("POST /v1/messages: "))


def test_threads_are_refused_so_that_the_client_sends_all(server: Live):
    with client_of(server) as client, pytest.raises(anthropic.BadRequestError) as found:
        client.beta.messages.create(**BASE, thread={"type": "create"})
    assert found.value.error_code == "thread_unsupported_request"


@pytest.fixture
def busy(served: ServedModel) -> Iterator[Live]:
    """A server that answers one at a time, slowly, and on and on."""
    script = served.tokenizer.encode("on ")
    with live(served, slots=1, queue=1, step_s=0.002, script=script) as server:
        yield server


def test_too_many_requests(busy: Live):
    long = BASE | {"max_tokens": 4000}
    with client_of(busy) as client:
        first = client.messages.create(**long, stream=True)
        wait_until(lambda: busy.frontend.engine.load().running == 1)
        second = client.messages.create(**long, stream=True)
        wait_until(lambda: busy.frontend.engine.load().waiting == 1)
        with pytest.raises(anthropic.RateLimitError) as found:
            client.messages.create(**long)
        assert found.value.type == "rate_limit_error"
        assert found.value.response.headers["retry-after"] == "1"
        first.close()
        second.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_step_that_fails(busy: Live, stream: bool, caplog: pytest.LogCaptureFixture):
    def fail() -> None:
        wait_until(lambda: busy.frontend.engine.load().running == 1)
        busy.runner.broken = True

    thread = threading.Thread(target=fail)
    thread.start()
    caplog.set_level("INFO", "glmjax")
    with client_of(busy) as client:
        with pytest.raises(anthropic.APIStatusError, match="the device is on fire") as found:
            list(client.messages.create(**BASE | {"max_tokens": 4000}, stream=stream))
        thread.join()
        assert found.value.type == "api_error"
        told: Any = found.value.body
        assert "the device is on fire" in logged(caplog, f"{told['request_id']}: ")
        assert found.value.status_code == (200 if stream else 500)
        busy.runner.broken = False
        assert client.messages.create(**BASE).stop_reason == "max_tokens", "it serves others on"


def test_a_server_that_stops(served: ServedModel):
    with live(served) as server:
        assert server.drain()
        with client_of(server) as client, pytest.raises(anthropic.InternalServerError) as found:
            client.messages.create(**BASE)
        assert (found.value.status_code, found.value.type) == (503, "overloaded_error")


def test_a_client_that_leaves(busy: Live):
    with client_of(busy) as client:
        events = client.messages.create(**BASE | {"max_tokens": 4000}, stream=True)
        next(iter(events))
        events.close()
    busy.wait_idle()


# Junk


@pytest.fixture(scope="module")
def http(server: Live) -> Iterator[httpx.Client]:
    with server.http as made:
        yield made


def fields(path: str) -> list[str]:
    model = PromptRequest if "count" in path else MessagesRequest
    return [*model.model_fields, "metadata", "mcp_servers", "speed", "junk"]


FOUND = {"type": "search_result", "source": "x", "title": "y", "content": [text("z")]}
PICTURED = {"type": "document", "source": {"type": "content", "content": [text("d"), IMAGE]}}
CLEAR = {"type": "clear_tool_uses_20250919", "keep": {"type": "tool_uses", "value": 0}}
CLEAR |= {"trigger": {"type": "input_tokens", "value": 1}, "exclude_tools": ["x"]}
CLEAR |= {"clear_at_least": {"type": "input_tokens", "value": 1}, "clear_tool_inputs": True}
# Where junk is put in a sound conversation, as the keys and indices that lead there.
SOUND: dict[str, Any] = {
    "system": [text("be"), text("brief")],
    "messages": [
        user(text("hi")),
        assistant(thought("hm"), text("a"), use("f", a=1)),
        user(result("f", [text("4"), reference("later"), FOUND]), text("and?")),
        user(document("b", title="a", context="c"), PICTURED, IMAGE),
    ],
    "tools": [TOOL | {"type": "custom", "strict": True, "input_examples": [{}]}, DEFERRED],
    "tool_choice": {"type": "auto"},
    "thinking": {"type": "enabled", "budget_tokens": 1},
    "output_config": {"effort": "low", "format": FORMAT},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}, CLEAR]},
}


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Every place in a body."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in inner:
        yield (*at, key)
        if isinstance(child, dict | list):
            yield from places(child, (*at, key))


def changed(value: Any, at: tuple, junk: Any) -> Any:
    """A copy of a body with junk at a place."""
    if not at:
        return junk
    copy = value.copy()
    copy[at[0]] = changed(value[at[0]], at[1:], junk)
    return copy


def check(http: httpx.Client, path: str, body: Any) -> None:
    response = http.post(path, content=json.dumps(body), headers=JSON)
    assert response.status_code in {200, 400, 404}, response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_junk(http: httpx.Client, path: str, data: st.DataObject):
    sound = PROMPT if "count" in path else BASE
    check(http, path, sound | data.draw(st.dictionaries(st.sampled_from(fields(path)), JUNK)))


@settings(max_examples=150, deadline=None)
@given(at=st.sampled_from([*places(SOUND)]), junk=JUNK)
def test_junk_deep_inside(http: httpx.Client, at: tuple, junk: Any):
    check(http, PATHS[0], BASE | changed(SOUND, at, junk))


def test_what_the_junk_is_put_in_is_sound(http: httpx.Client):
    response = http.post(PATHS[0], json=BASE | SOUND)
    assert response.status_code == 200, response.text
