"""Requests of the Responses API: what they come down to, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Live

from glmjax.server.openai.requests import ChatRequest
from glmjax.server.responses.chat import SHARED, chat_request, conversation
from glmjax.server.responses.requests import KINDS, NEUTRAL, ResponsesRequest
from glmjax.server.responses.tools import flat_tools

USER = {"role": "user", "content": "hi"}
PING = {"type": "function", "name": "ping", "parameters": {"type": "object"}}
PATCH = {"type": "custom", "name": "patch", "description": "Edits files."}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": 'start: "a"'}
JSON = {"content-type": "application/json"}


def said(text: str) -> dict[str, Any]:
    return {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": text}],
    }


def thought(text: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "id": "rs_1", "summary": [], "content": content}


def called(name: str, call_id: str = "call_1") -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": "{}"}


def custom_called(text: str, name: str = "patch") -> dict[str, Any]:
    return {"type": "custom_tool_call", "call_id": "call_1", "name": name, "input": text}


def result(output: Any, call_id: str = "call_1") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def chat(**body: Any) -> ChatRequest:
    request = ResponsesRequest.model_validate({"input": "hi"} | body)
    return chat_request(request, conversation(request), flat_tools(request.tools))


def turns(*items: dict[str, Any]) -> list[Any]:
    """The messages that items come down to, as short as they can be told."""
    told = []
    for message in chat(input=list(items)).messages:
        content = message.get("content", "")
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
        told.append((message["role"], message.get("reasoning_content"), text, *calls))
    return told


def test_one_turn_is_a_thought_a_text_and_calls():
    items = [USER, thought("hm"), said("look"), called("a"), called("b"), result("1"), result("2")]
    assert turns(*items) == [
        ("user", None, "hi"),
        ("assistant", "hm", "look", "a", "b"),
        ("tool", None, "1"),
        ("tool", None, "2"),
    ]


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([thought("x"), called("a")], [("assistant", "x", "", "a")]),
        ([thought("x"), thought("y"), said("z")], [("assistant", "x\ny", "z")]),
        ([said("x"), said("y")], [("assistant", None, "x"), ("assistant", None, "y")]),
        ([said("x"), thought("y")], [("assistant", None, "x"), ("assistant", "y", "")]),
        ([called("a"), thought("y")], [("assistant", None, "", "a"), ("assistant", "y", "")]),
        ([said("x"), called("a"), said("y")], [("assistant", None, "xy", "a")]),
        (
            [called("a"), result("1"), called("b")],
            [("assistant", None, "", "a"), ("tool", None, "1"), ("assistant", None, "", "b")],
        ),
        (
            [thought("x"), USER, said("y")],
            [("assistant", "x", ""), ("user", None, "hi"), ("assistant", None, "y")],
        ),
    ],
)
def test_where_turns_begin(items: list[Any], expected: list[Any]):
    assert turns(*items) == expected


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"summary": [{"type": "summary_text", "text": "short"}]}, ("assistant", "short", "x")),
        (
            {
                "summary": [{"type": "summary_text", "text": "short"}],
                "content": [{"type": "text", "text": "long"}],
            },
            ("assistant", "long", "x"),
        ),
        ({"summary": [], "content": None, "encrypted_content": "gAAA"}, ("assistant", None, "x")),
        ({"summary": [], "encrypted_content": "thought:all"}, ("assistant", "all", "x")),
        (
            {"summary": [{"text": "short"}], "encrypted_content": "thought:all"},
            ("assistant", "all", "x"),
        ),
        (
            {"content": [{"text": "long"}], "encrypted_content": "thought:all"},
            ("assistant", "long", "x"),
        ),
    ],
)
def test_thoughts(item: dict[str, Any], expected: Any):
    assert turns({"type": "reasoning", **item}, said("x")) == [expected]


def test_instructions_and_roles():
    items = [
        {"role": "developer", "content": "be brief"},
        USER,
        {"role": "assistant", "content": "x"},
    ]
    messages = chat(instructions="be kind", input=items).messages
    assert [m["role"] for m in messages] == ["system", "developer", "user", "assistant"]
    assert messages[0]["content"] == "be kind"
    assert chat(input="hi").messages == [USER]


def test_custom_calls_come_back():
    items = [USER, said("look"), custom_called('a "b"\n'), result("done")]
    output = result("done") | {"type": "custom_tool_call_output"}
    messages = chat(input=[*items[:-1], output]).messages
    assert messages == chat(input=items).messages
    (call,) = messages[1]["tool_calls"]
    assert (call["id"], call["function"]["name"]) == ("call_1", "patch")
    assert json.loads(call["function"]["arguments"]) == {"input": 'a "b"\n'}
    assert messages[2] == {"role": "tool", "tool_call_id": "call_1", "content": "done"}


@pytest.mark.parametrize("kind", ["function_call_output", "custom_tool_call_output"])
def test_a_result_that_no_model_here_can_read(server: Live, kind: str):
    """It cannot be taken back, as it stays in the conversation: the model is told of it."""
    image = "[image not shown: this model reads text only]"
    parts = [{"type": "input_text", "text": "Seen: "}, *IMAGE, {"type": "input_file"}]
    output = result(parts) | {"type": kind}
    text = f"Seen: {image}{image.replace('image', 'file')}"

    def tokens(last: dict[str, Any]) -> int:
        body = {"input": [USER, called("view_image"), last], "max_output_tokens": 1}
        return post(server, body).json()["usage"]["input_tokens"]

    assert tokens(output) == tokens(result(text)) > tokens(result("Seen: "))


def test_long_turns_are_put_together_once():
    """The parts of a turn are kept as they came until the last of them is there."""
    body = ResponsesRequest.model_validate({"input": [thought(str(i)) for i in range(3)]})
    (turn,) = conversation(body)
    assert (turn.thoughts, turn.message["reasoning_content"]) == (["0", "1", "2"], "0\n1\n2")
    body = ResponsesRequest.model_validate({"input": [called("a"), said("x"), said("y")]})
    first = conversation(body)[0].message["content"]
    assert [part["text"] for part in first] == ["x", "y"]
    assert isinstance(body.input, list)
    assert [len(item.content) for item in body.input[1:]] == [1, 1], "the request is as it was"  # type: ignore[union-attr]


def test_fields_of_chat_completions():
    values: dict[str, Any] = {
        "top_k": 3,
        "min_p": 0.1,
        "seed": 5,
        "stop": ["x"],
        "max_thinking_tokens": 4,
        "separate_reasoning": False,
        "chat_template_kwargs": {"clear_thinking": False},
        "thinking": {"type": "disabled"},
        "regex": "a+",
    }
    assert values.keys() <= SHARED
    request = chat(**values, max_output_tokens=9, reasoning={"effort": "low"})
    assert {name: getattr(request, name) for name in values if name != "thinking"} == {
        name: value for name, value in values.items() if name != "thinking"
    }
    assert request.thinking is not None
    assert request.thinking.type == "disabled"
    assert (request.max_completion_tokens, request.reasoning_effort) == (9, "low")


def test_formats():
    assert chat().response_format is None
    assert chat(text={"format": {"type": "json_object"}}).response_format == {"type": "json_object"}
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    assert chat(text={"format": form}).response_format == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
    }


# What is refused


def post(server: Live, body: dict[str, Any]) -> httpx.Response:
    with server.http as client:
        return client.post("/v1/responses", content=json.dumps(body), headers=JSON)


BAD_CALL = called("a") | {"arguments": "[1]"}
IMAGE = [{"type": "input_image", "image_url": "data:"}]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "required"),
        ({"input": 5}, "input", "string or should be a valid list"),
        ({"input": []}, "input", "input is empty"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role", "'assistant'"),
        ({"input": [{"role": "user"}]}, "input.0.content", "required"),
        ({"input": [USER, {"type": "web_search_call"}]}, "input.1", "'web_search_call'"),
        ({"input": [{"type": "item_reference"}]}, "input.0.id", "required"),
        ({"input": [{"type": None, "id": 5}]}, "input.0.id", "string"),
        ({"input": [USER, {"id": "\ud800"}]}, "input", "input[1] refers to '\\ud800'"),
        (
            {"input": [{"type": "function_call", "name": "a", "arguments": ""}]},
            "input.0.call_id",
            "required",
        ),
        ({"input": [USER, thought("x"), BAD_CALL]}, "input", "input[2].arguments"),
        ({"input": [USER, called("a"), BAD_CALL]}, "input", "input[2].arguments"),
        ({"input": [{"role": "user", "content": IMAGE}]}, "input", "input[0].content[0]"),
        ({"input": [USER, called("a"), result([{"type": "x"}])]}, "input", "input[2].output[0]"),
        (
            {"input": [USER, thought("a"), said("b") | {"content": IMAGE}]},
            "input",
            "input[2].content[0]",
        ),
        ({"instructions": 5, "input": "hi"}, "instructions", "string"),
        ({"input": [1]}, "input.0", "object"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens is 0"),
        ({"max_output_tokens": 99_999}, "max_output_tokens", "max_output_tokens 99999"),
        ({"input": "long " * 9000}, "input", "tokens"),
        ({"max_tokens": 5}, "max_tokens", "unknown field"),
        ({"messages": [USER]}, "messages", "unknown field"),
        ({"temperature": -1}, "temperature", "0 or more"),
        ({"top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
        ({"n": 2}, "n", "one answer"),
        ({"truncation": "last"}, "truncation", "disabled"),
        ({"store": "yes"}, "store", "store is not served"),
        ({"background": True}, "background", "keeps no responses"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "whole conversation in input"),
        ({"conversation": "conv_1"}, "conversation", "whole conversation in input"),
        ({"prompt": {"id": "p"}}, "prompt", "instructions"),
        ({"moderation": {}}, "moderation", "not served"),
        ({"include": ["everything"]}, "include.0", "should be"),
        ({"stream_options": {"include_usage": True}}, "stream_options.include_usage", "permitted"),
        ({"tools": [{"type": "web_search"}]}, "tools", "tools[0].type is 'web_search'"),
        ({"tools": [{"type": "web_search"}]}, "tools", "runs no tools itself; leave it out"),
        ({"tools": [{"type": "web_search_preview"}]}, "tools", "runs no tools itself"),
        *(
            ({"tools": [PING, {"type": kind}]}, "tools", f"tools of type {kind} are not served")
            for kind in ("local_shell", "shell", "apply_patch")
        ),
        ({"tools": [{"name": "x"}]}, "tools", 'must be "function" or "custom"'),
        ({"tools": [{"type": "custom"}]}, "tools", "tools[0].name is None"),
        ({"tools": [PATCH, PING | {"name": "patch"}]}, "tools", "'patch' more than once"),
        ({"tools": [PATCH | {"format": {"type": "x"}}]}, "tools", "tools[0].format is"),
        ({"tools": [PATCH | {"format": GRAMMAR | {"syntax": 5}}]}, "tools", "tools[0].format is"),
        ({"tools": [PATCH | {"description": 5}]}, "tools", "tools[0].description must be"),
        ({"tools": [PATCH | {"defer_loading": True}]}, "tools", "tools[0].defer_loading"),
        ({"tools": [PATCH], "tool_choice": {"type": "custom"}}, "tool_choice", "expected"),
        ({"tools": [PATCH], "tool_choice": {"type": "custom", "name": "x"}}, "tool_choice", "'x'"),
        (
            {"tools": [PATCH], "tool_choice": {"type": "allowed_tools", "mode": "auto"}},
            "tool_choice",
            "expected",
        ),
        ({"input": [USER, custom_called("a") | {"input": 5}]}, "input.1.input", "string"),
        ({"tools": [{"type": "function"}]}, "tools", "tools[0].name is None"),
        ({"tools": [PING | {"parameters": 5}]}, "tools", "tools[0].parameters must be"),
        ({"tools": [PING | {"defer_loading": True}]}, "tools", "tools[0].defer_loading"),
        ({"tools": [PING | {"parameters": {"a": 10**30}}]}, "tools", "cannot be repeated"),
        ({"user": "\ud800"}, "user", "cannot be repeated"),
        ({"metadata": {"a": "\ud800"}}, "metadata", "cannot be repeated"),
        ({"tool_choice": "maybe"}, "tool_choice", "expected"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice", "expected"),
        ({"tool_choice": "required"}, "tool_choice", "there is none"),
        ({"tools": [PING], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "'x'"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "json_schema"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format", "no schema"),
        (
            {"text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}},
            "text.format",
            "text.format",
        ),
        ({"text": {"format": {"type": "text", "x": 1}}}, "text.format.x", "permitted"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode", "not served"),
        ({"reasoning": {"effort": "bogus"}}, "reasoning.effort", "'xhigh'"),
        ({"reasoning": {"effrt": "low"}}, "reasoning.effrt", "unknown field"),
    ],
)
def test_refusals(server: Live, body: dict[str, Any], param: str, words: str):
    response = post(server, ({"input": "hi"} if body and "input" not in body else {}) | body)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert words in error["message"]
    assert "messages[" not in error["message"]
    assert "function.name" not in error["message"]


def test_words_of_the_client_are_left_alone(server: Live):
    choice = {"type": "function", "name": "messages[0].content tools[0].function"}
    error = post(server, {"input": "hi", "tools": [PING], "tool_choice": choice}).json()["error"]
    assert choice["name"] in error["message"]


def test_another_model(server: Live):
    with server.openai as client, pytest.raises(openai.NotFoundError):
        client.responses.create(model="gpt-5", input="hi")


def test_responses_are_not_kept(server: Live):
    with server.openai as client:
        for look in (
            client.responses.retrieve,
            client.responses.delete,
            client.responses.cancel,
            client.responses.input_items.list,
        ):
            with pytest.raises(openai.NotFoundError, match="keeps no responses"):
                look("resp_1")
        with pytest.raises(openai.NotFoundError, match="compacts no conversations; send the whole"):
            client.responses.compact(model="x", input="hi")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {name: None for name in (*ResponsesRequest.model_fields, *NEUTRAL) if name != "input"},
        {
            # as coding agents send it
            "instructions": "You write code.",
            "input": [
                {
                    "type": "message",
                    "role": "developer",
                    "content": [{"type": "input_text", "text": "here is a sandbox"}],
                },
                {
                    "type": "message",
                    "role": "user",
                    "content": [{"type": "input_text", "text": "hi"}],
                },
                {"type": "reasoning", "summary": [], "encrypted_content": None},
                called("shell") | {"id": None, "status": "completed"},
                result("Exit code: 0"),
                custom_called("*** Begin Patch") | {"id": "ctc_1", "status": "completed"},
                result("Success") | {"type": "custom_tool_call_output"},
            ],
            "tools": [
                PING | {"strict": False, "description": "runs"},
                PATCH | {"format": GRAMMAR},
            ],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "reasoning": {"effort": "medium", "summary": "auto"},
            "store": False,
            "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "0199",
            "text": {"verbosity": "low"},
            "client_metadata": {"session": "1"},
            "service_tier": "auto",
        },
    ],
)
def test_what_is_taken(server: Live, fields: dict[str, Any]):
    response = post(server, {"input": "hi"} | fields | {"max_output_tokens": 3, "ignore_eos": True})
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["output_tokens"] == 3


FIELDS = [
    "id",
    "namespace",
    "role",
    "content",
    "type",
    "text",
    "name",
    "arguments",
    "output",
    "call_id",
    "summary",
]
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 600)
    | st.sampled_from([10**30, -(10**30)])
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([*KINDS, "user", "assistant", "hi", "input_text", "\ud800", "required"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [*FIELDS, "format", "schema", "effort", "tools", "parameters", "strict", "5"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=6,
)
GOOD_ITEMS = st.sampled_from(
    [USER, thought("x"), said("y"), called("a"), custom_called("b"), result("z")]
)
ITEMS = st.lists(
    GOOD_ITEMS
    | JUNK
    | st.builds(
        lambda item, junk: item | junk,
        GOOD_ITEMS,
        st.dictionaries(
            st.sampled_from(
                ["role", "content", "text", "arguments", "input", "output", "summary", "name"]
            ),
            JUNK,
            max_size=2,
        ),
    ),
    max_size=4,
)
FIELD = st.sampled_from([*PING, *PATCH, "format"])
TOOLS = st.lists(
    st.just(PING)
    | st.dictionaries(FIELD, JUNK)
    | st.builds(lambda junk: PATCH | junk, st.dictionaries(FIELD, JUNK, max_size=2)),
    max_size=2,
)
GROUP = {"type": "namespace", "name": "g"}
TOOLS |= st.builds(
    lambda tools, junk: [PING, GROUP | {"tools": tools} | junk],
    TOOLS,
    st.dictionaries(
        st.sampled_from(["name", "description", "tools", "type", "x"]), JUNK, max_size=1
    ),
)
SPECIAL = {"input": ITEMS, "tools": TOOLS}


@pytest.fixture(scope="module")
def http(server: Live) -> Iterator[httpx.Client]:
    with server.http as made:
        yield made


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_junk(http: httpx.Client, data: st.DataObject):
    names = data.draw(
        st.lists(st.sampled_from([*ResponsesRequest.model_fields, *NEUTRAL]), max_size=3)
    )
    changes = {name: data.draw(JUNK | SPECIAL.get(name, JUNK), name) for name in names}
    body = {"input": "hi", "max_output_tokens": 2} | changes
    response = http.post("/v1/responses", content=json.dumps(body), headers=JSON)
    late = {504} if "timeout" in changes else set()
    assert response.status_code in {200, 400, 404} | late, response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]
    elif not response.headers["content-type"].startswith("text/event-stream"):
        assert response.json()["object"] == "response"
