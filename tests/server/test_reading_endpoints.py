"""Texts taken apart over HTTP, as served answers are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Live, live

import glmjax.bench
from glmjax.server.served import ServedModel
from glmjax.text.chat import ChatTemplate

TEMPLATE_47 = Path(glmjax.bench.__file__).parent / "chat_template_47.jinja"
PARSE, SEPARATE = "/parse_function_call", "/separate_reasoning"


def tool(name: str, **properties: str) -> dict[str, Any]:
    schema = {"properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [tool("search", query="string"), tool("add", a="integer", b="integer")]


def call(name: str, line_break: str = "\n", **values: str) -> str:
    pairs = [
        f"<arg_key>{key}</arg_key>{line_break}<arg_value>{value}</arg_value>"
        for key, value in values.items()
    ]
    return f"<tool_call>{line_break.join([name, *pairs])}{line_break}</tool_call>"


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[httpx.Client]:
    with server.http as made:
        yield made


@pytest.fixture(scope="module")
def client_47(served: ServedModel) -> Iterator[httpx.Client]:
    template = ChatTemplate(TEMPLATE_47.read_text("utf-8"))
    with live(replace(served, template=template)) as server, server.http as made:
        yield made


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def calls(client: httpx.Client, text: str, tools: list[Any] = TOOLS) -> tuple[str, list[Any]]:
    """The rest of the text, and index, name and parsed arguments of each call."""
    found = post(client, PARSE, text=text, tools=tools)
    assert set(found) == {"normal_text", "calls"}
    words = [(c["tool_index"], c["name"], json.loads(c["parameters"])) for c in found["calls"]]
    return found["normal_text"], words


@pytest.mark.parametrize("line_break", ["\n", ""])
def test_calls(client: httpx.Client, client_47: httpx.Client, line_break: str):
    text = "Let me see.\n" + call("add", line_break, a="1", b="2")
    text += line_break + call("search", line_break, query="12")
    expected = ("Let me see.", [(1, "add", {"a": 1, "b": 2}), (0, "search", {"query": "12"})])
    assert calls(client, text) == expected
    assert calls(client_47, text) == expected


def test_a_tool_that_is_not_there(client: httpx.Client):
    text = call("fly", to="Rome", n="2")
    assert calls(client, text) == ("", [(-1, "fly", {"to": "Rome", "n": 2})])
    assert calls(client, text, []) == ("", [(-1, "fly", {"to": "Rome", "n": 2})])


def test_no_call(client: httpx.Client):
    for text in ("", "hello", " <tool_call>", "a < b </tool_call>", "<|user|> é 🎉"):
        assert calls(client, text) == (text.rstrip(), [])


def test_a_tool_choice(client: httpx.Client):
    said = call("add", a="1", b="2")
    body = {"text": said, "tools": TOOLS}
    named = {"type": "function", "function": {"name": "add"}}
    for choice in ("auto", "required", named, None):
        found = post(client, PARSE, **body, tool_choice=choice)
        assert [each["name"] for each in found["calls"]] == ["add"]
    assert post(client, PARSE, **body, tool_choice="none") == {"normal_text": said, "calls": []}
    refused = client.post(PARSE, json=body | {"tool_choice": "sometimes"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice")


def test_a_thought_stays_in_the_text_and_its_calls_too(
    client: httpx.Client, client_47: httpx.Client
):
    thought = f"<think>{call('add', a='1')}</think>\n"
    both = thought + call("search", query="x")
    assert calls(client, both) == (thought.rstrip(), [(0, "search", {"query": "x"})])
    begun = both.removeprefix("<think>")
    expected = (thought.removeprefix("<think>").rstrip(), [(0, "search", {"query": "x"})])
    assert calls(client_47, begun) == expected, "its template opens the thought"
    assert calls(client_47, call("add", a="1")) == ("", [(1, "add", {"a": 1})])


@pytest.mark.parametrize("parser", [None, "glm", "glm45", "glm47", "glm45_moe", "glm47_moe"])
def test_thoughts(client: httpx.Client, client_47: httpx.Client, parser: str | None):
    body = {"text": "\n<think>Rome?\n</think>\nRome, I think."} | (
        {} if parser is None else {"reasoning_parser": parser}
    )
    expected = {"reasoning_text": "Rome?", "text": "Rome, I think."}
    assert post(client, SEPARATE, **body) == expected
    assert post(client_47, SEPARATE, **body) == expected


def test_texts_without_the_tag_that_begins_a_thought(client: httpx.Client, client_47: httpx.Client):
    """The prompt of GLM-4.7 has it."""
    ended, bare = "Rome?</think>Rome.", "Rome."
    assert post(client, SEPARATE, text=bare) == {"reasoning_text": "", "text": bare}
    assert post(client_47, SEPARATE, text=bare) == {"reasoning_text": bare, "text": ""}
    assert post(client, SEPARATE, text=ended) == {"reasoning_text": "", "text": ended}
    assert post(client_47, SEPARATE, text=ended) == {"reasoning_text": "Rome?", "text": bare}


def test_a_model_without_a_template(served: ServedModel):
    with live(replace(served, template=None)) as server, server.http as client:
        assert calls(client, call("add", a="1"), [])[1] == [(-1, "add", {"a": 1})]
        assert post(client, SEPARATE, text="<think>a</think>b")["reasoning_text"] == "a"


def test_what_is_served_is_what_is_read(served: ServedModel):
    """The endpoints give what the chat gives for the same text."""
    text = "\n<think>hm</think>\nOne moment." + call("add", a="1", b="2")
    script = served.tokenizer.encode(text) + list(served.eos_token_ids[:1])
    with live(served, script=script) as server, server.http as client:
        chat = {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
        said = post(client, "/v1/chat/completions", **chat)["choices"][0]["message"]
        apart = post(client, SEPARATE, text=text)
        found = post(client, PARSE, text=apart["text"], tools=TOOLS)
    assert said["reasoning_content"] == apart["reasoning_text"] == "hm"
    assert said["content"] == found["normal_text"] == "One moment."
    one, other = said["tool_calls"][0]["function"], found["calls"][0]
    assert (one["name"], one["arguments"]) == (other["name"], other["parameters"])


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (PARSE, {"tools": []}, "text", "required"),
        (PARSE, {"text": "a", "tool_call_parser": "llama3"}, "tool_call_parser", "glm45 or glm47"),
        (PARSE, {"text": "a", "tools": [5]}, "tools", "tools[0]"),
        (PARSE, {"text": "a", "tools": [TOOLS[0], TOOLS[0]]}, "tools", "more than once"),
        (PARSE, {"text": "a", "parser": "glm"}, "parser", "not permitted"),
        (SEPARATE, {"text": "a", "reasoning_parser": "qwen3"}, "reasoning_parser", "'qwen3'"),
        (SEPARATE, {"text": "a", "reasoning_parser": "none"}, "reasoning_parser", "glm"),
        (SEPARATE, {"text": ["a"]}, "text", "string"),
        (SEPARATE, {"text": "\ud800"}, None, "Unicode"),
    ],
)
def test_refusals(client: httpx.Client, path: str, body: Any, param: str | None, words: str):
    headers = {"content-type": "application/json"}
    response = client.post(path, content=json.dumps(body), headers=headers)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


PIECES = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>"]
PIECES += [
    "<arg_value>",
    "</arg_value>",
    "add",
    "\n",
    " ",
    "a",
    "1",
    "{",
    "é",
    "🎉",
    "<|user|>",
    "<",
]


@settings(max_examples=60, deadline=None)
@given(text=st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_any_text_is_read(client: httpx.Client, client_47: httpx.Client, text: str):
    for each in (client, client_47):
        apart = post(each, SEPARATE, text=text)
        assert set(apart) == {"reasoning_text", "text"}
        for _, _, arguments in calls(each, text)[1]:
            assert isinstance(arguments, dict)
