"""Tools of the Responses API, those among them that take any text."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import Live
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from responses_talk import THOUGHT, WEATHER, call, events, say, wire

from glmjax.server.openai.requests import ChatRequest
from glmjax.server.responses.chat import chat_request
from glmjax.server.responses.requests import ResponsesRequest
from glmjax.server.responses.tools import custom_arguments, custom_input, flat_tools

EVENT = TypeAdapter(ResponseStreamEvent)
PING = {"type": "function", "name": "ping", "parameters": {"type": "object"}}
PATCH: Any = {"type": "custom", "name": "patch", "description": "Edits files."}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": 'start: "a"'}
EDIT = '*** Begin Patch\n+print("é\\n")\n*** End Patch'


def chat(**body: Any) -> ChatRequest:
    request = ResponsesRequest.model_validate({"input": "hi"} | body)
    return chat_request(request, [], flat_tools(request.tools))


def test_tools_are_as_they_were_given():
    tool = {"strict": True, "type": "function", "parameters": {"b": 1, "a": 2}, "name": "ping"}
    named = {"type": "function", "name": "ping"}
    request = chat(
        tools=[tool | {"defer_loading": False, "output_schema": {}}],
        tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [named]},
    )
    assert request.tools == [
        {
            "type": "function",
            "function": {"strict": True, "parameters": {"b": 1, "a": 2}, "name": "ping"},
        }
    ]
    assert request.tools is not None
    function = request.tools[0]["function"]
    assert [*function] == ["strict", "parameters", "name"]
    nested = {"type": "function", "function": {"name": "ping"}}
    allowed = {"mode": "auto", "tools": [nested]}
    assert request.tool_choice == {"type": "allowed_tools", "allowed_tools": allowed}
    assert chat(tools=[tool], tool_choice=named).tool_choice == nested


def test_custom_tools_are_functions_of_a_text():
    choice = {"type": "custom", "name": "patch"}
    request = chat(tools=[PATCH, PING], tool_choice=choice)
    parameters = {
        "type": "object",
        "properties": {"input": {"type": "string"}},
        "required": ["input"],
    }
    function = {"name": "patch", "description": "Edits files.", "parameters": parameters}
    assert request.tools is not None
    assert request.tools[0] == {"type": "function", "function": function}
    assert request.tool_choice == {"type": "function", "function": {"name": "patch"}}
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [choice]}
    assert chat(tools=[PATCH], tool_choice=allowed).tool_choice["allowed_tools"]["tools"] == [
        {"type": "function", "function": {"name": "patch"}}
    ]


@pytest.mark.parametrize(
    ("fields", "description"),
    [
        ({}, "Edits files."),
        ({"format": {"type": "text"}}, "Edits files."),
        (
            {"format": GRAMMAR},
            'Edits files.\n\nThe input follows this lark grammar:\nstart: "a"',
        ),
        (
            {"description": None, "format": GRAMMAR | {"syntax": "regex", "definition": "a+"}},
            "The input follows this regex grammar:\na+",
        ),
    ],
)
def test_formats_of_custom_tools_are_told(fields: dict[str, Any], description: str):
    tools = chat(tools=[PATCH | fields]).tools
    assert tools is not None
    assert tools[0]["function"]["description"] == description
    assert "format" not in tools[0]["function"]


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_goes_both_ways(text: str):
    arguments = custom_arguments(text)
    assert custom_input(arguments) == text
    for end in range(len(arguments)):
        assert text.startswith(custom_input(arguments[:end])), "cut off"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("", ""),
        ("{}", ""),
        ('{"a": 1, "input": "x"}', "x"),
        ('{"input": "x\\', "x"),  # cut off
        ('{"patch": "x"}', '{"patch": "x"}'),  # nothing that it said is lost
        ('{"input": 5}', '{"input": 5}'),
        ("no JSON", "no JSON"),
    ],
)
def test_other_arguments(arguments: str, text: str):
    assert custom_input(arguments) == text


def patch_call(text: str) -> str:
    return (
        f"\n<tool_call>patch\n<arg_key>input</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>"
    )


def test_a_custom_call(talker: Live, client: openai.OpenAI):
    say(talker, THOUGHT + "\nI will edit." + patch_call(EDIT) + call("Rome"))
    asked: dict[str, Any] = {"tools": [WEATHER, PATCH | {"format": GRAMMAR}]}
    whole = wire(client, model=talker.model, input="hi", **asked)
    Response.model_validate(whole)
    assert whole["tools"] == asked["tools"]
    *_, custom, function = whole["output"]
    assert (custom["type"], custom["name"], custom["input"]) == ("custom_tool_call", "patch", EDIT)
    assert custom["id"].startswith("ctc_")
    assert custom["call_id"].startswith("call_")
    assert (function["type"], function["name"]) == ("function_call", "weather")


def test_events_of_a_custom_call(talker: Live, client: openai.OpenAI):
    say(talker, patch_call(EDIT) + patch_call("b"))
    found = events(talker, client, tools=[PATCH])
    for event in found:
        EVENT.validate_python(event)
    names = [event["type"].removeprefix("response.") for event in found]
    one = [
        "output_item.added",
        "custom_tool_call_input.delta",
        "custom_tool_call_input.done",
        "output_item.done",
    ]
    assert names == ["created", "in_progress", *one, *one, "completed"]
    added, delta, done, end = found[2:6]
    assert (added["item"]["input"], added["item"]["status"]) == ("", "in_progress")
    assert delta["delta"] == done["input"] == end["item"]["input"] == EDIT
    assert delta["item_id"] == done["item_id"] == end["item"]["id"]
    assert [item["input"] for item in found[-1]["response"]["output"]] == [EDIT, "b"]


def test_the_clients_stream(talker: Live, client: openai.OpenAI):
    say(talker, THOUGHT + patch_call(EDIT))
    with client.responses.stream(model=talker.model, input="hi", tools=[PATCH]) as stream:
        said = [e.delta for e in stream if e.type == "response.custom_tool_call_input.delta"]
        final = stream.get_final_response()
    assert final.output[-1].type == "custom_tool_call"
    assert [final.output[-1].input] == said == [EDIT]


def test_a_custom_call_that_is_cut_off(talker: Live, client: openai.OpenAI):
    say(talker, patch_call(EDIT))
    found = events(talker, client, tools=[PATCH], max_output_tokens=20)
    (item,) = found[-1]["response"]["output"]
    assert item["status"] == "incomplete"
    assert EDIT.startswith(item["input"])
    assert 0 < len(item["input"]) < len(EDIT)


def test_a_custom_call_over_two_turns(talker: Live, client: openai.OpenAI):
    say(talker, THOUGHT + patch_call(EDIT))
    first: Any = client.responses.create(model=talker.model, input="hi", tools=[PATCH])
    output = {"type": "custom_tool_call_output", "call_id": first.output[-1].call_id}
    result: Any = output | {"output": [{"type": "input_text", "text": "done"}]}
    say(talker, "\n<think></think>\nDone.")
    asked: Any = [{"role": "user", "content": "hi"}, *first.output, result]
    second: Any = client.responses.create(model=talker.model, input=asked, tools=[PATCH])
    assert second.output_text == "Done."
    assert second.usage.input_tokens_details.cached_tokens > first.usage.input_tokens
    messages = [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "reasoning_content": "hm, well",
            "tool_calls": [{"function": {"name": "patch", "arguments": {"input": EDIT}}}],
        },
        {"role": "tool", "content": "done"},
    ]
    tools = chat(tools=[PATCH]).tools
    prompt = talker.frontend.served.chat_prompt(messages, tools=tools)
    assert second.usage.input_tokens == len(prompt)


def test_a_custom_tool_is_chosen(talker: Live, client: openai.OpenAI):
    say(talker, "\n<think></think>\nno")
    choice: Any = {"type": "custom", "name": "patch"}
    answer: Any = client.responses.create(
        input="hi",
        tools=[WEATHER, PATCH],
        tool_choice=choice,
        temperature=0,
        max_output_tokens=200,
    )
    assert answer.tool_choice.model_dump() == choice
    assert {item.type for item in answer.output} - {"reasoning"} == {"custom_tool_call"}
    assert {item.name for item in answer.output if item.type != "reasoning"} == {"patch"}
