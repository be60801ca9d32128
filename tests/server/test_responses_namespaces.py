"""Tools in namespaces, as agents send those of MCP servers."""

from __future__ import annotations

import json
from typing import Any

import agents
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import Live
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from responses_talk import PARAMETERS, THOUGHT, WEATHER, call, events, run_agent, say, wire

from glmjax.errors import InvalidRequestError
from glmjax.server.openai.requests import ChatRequest
from glmjax.server.responses.chat import chat_request, conversation
from glmjax.server.responses.requests import ResponsesRequest
from glmjax.server.responses.tools import flat_tools
from glmjax.text.tool_calls import MAX_NAME

EVENT = TypeAdapter(ResponseStreamEvent)
PATCH = {"type": "custom", "name": "patch"}
ABOUT = "About all tools whose names begin with mcp__sky__: Tells of the sky."


def group(name: Any, *tools: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "namespace", "name": name, "tools": [*tools]} | fields


def function(name: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "name": name, "parameters": {"type": "object"}} | fields


SKY = group("mcp__sky", WEATHER, PATCH, description="Tells of the sky.")
RENAMED = [WEATHER | {"name": "mcp__sky__weather"}, PATCH | {"name": "mcp__sky__patch"}]


def chat(**body: Any) -> ChatRequest:
    request = ResponsesRequest.model_validate({"input": "hi"} | body)
    return chat_request(request, conversation(request), flat_tools(request.tools))


def names(request: ChatRequest) -> list[str]:
    return [tool["function"]["name"] for tool in request.tools or ()]


def test_the_model_sees_functions():
    request = chat(tools=[function("a"), SKY, group("b", function("a")), function("b")])
    assert names(request) == ["a", "mcp__sky__weather", "mcp__sky__patch", "b__a", "b"]
    assert request.tools is not None
    _, weather, patch, *_ = request.tools
    told = f"{WEATHER['description']}\n\n{ABOUT}"
    own = {field: value for field, value in WEATHER.items() if field != "type"}
    renamed = {"name": "mcp__sky__weather", "description": told}
    assert weather == {"type": "function", "function": own | renamed}
    assert [*weather["function"]] == [*own]
    assert patch["function"]["parameters"]["required"] == ["input"]


@pytest.mark.parametrize("about", [None, ""])
def test_what_a_namespace_says_of_itself(about: str | None):
    bare = group("mcp__sky", function("a"), function("b"))
    (first, second) = chat(tools=[bare | {"description": "Tells of the sky."}]).tools or ()
    assert first["function"]["description"] == ABOUT
    assert "description" not in second["function"], "it is told once"
    for tool in chat(tools=[bare | {"description": about}]).tools or ():
        assert "description" not in tool["function"]
    assert chat(tools=[group("mcp__sky", description="Empty.")]).tools == []


@pytest.mark.parametrize(
    ("named", "name"),
    [
        ({"type": "function", "name": "weather", "namespace": "mcp__sky"}, "mcp__sky__weather"),
        ({"type": "function", "name": "mcp__sky__weather"}, "mcp__sky__weather"),
        ({"type": "function", "name": "mcp__sky__weather", "namespace": None}, "mcp__sky__weather"),
        ({"type": "custom", "name": "patch", "namespace": "mcp__sky"}, "mcp__sky__patch"),
        ({"type": "custom", "name": "patch"}, "mcp__sky__patch"),  # as the AI SDK says it
        ({"type": "function", "name": "ping"}, "ping"),
        ({"type": "function", "name": "pong"}, "pong"),
    ],
)
def test_choices(named: dict[str, Any], name: str):
    nested = {"type": "function", "function": {"name": name}}
    tools = [SKY, group("a", function("ping"), function("pong")), group("b", function("pong"))]
    tools += [function("ping"), group("c", function("mcp__sky__weather"))]
    assert chat(tools=tools, tool_choice=named).tool_choice == nested
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [named]}
    found = chat(tools=tools, tool_choice=allowed).tool_choice
    assert found["allowed_tools"] == {"mode": "auto", "tools": [nested]}


def test_calls_come_back():
    called = {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}"}
    custom = {"type": "custom_tool_call", "call_id": "2", "name": "patch", "input": "x"}
    space = {"namespace": "mcp__sky"}
    results = [
        {"type": "function_call_output", "call_id": "1", "output": "sun", "name": "weather"} | space
    ]
    (turn, _) = chat(input=[called | space, custom | space, *results], tools=[SKY]).messages
    found = [one["function"]["name"] for one in turn["tool_calls"]]
    assert found == ["mcp__sky__weather", "mcp__sky__patch"]
    (turn,) = chat(input=[called, custom | {"namespace": None}]).messages
    assert [one["function"]["name"] for one in turn["tool_calls"]] == ["weather", "patch"]


LETTERS = st.text("ab_", min_size=1, max_size=4)


@given(st.lists(st.tuples(st.none() | LETTERS, LETTERS), min_size=1, max_size=6, unique=True))
def test_names_go_both_ways_or_are_refused(pairs: list[tuple[str | None, str]]):
    """Whatever the names are, a call is of one tool alone."""
    tools = [
        function(name) if space is None else group(space, function(name)) for space, name in pairs
    ]
    joined = [f"{space}__{name}" if space else name for space, name in pairs]
    if twice := [name for name in joined if joined.count(name) > 1]:
        with pytest.raises(InvalidRequestError) as caught:
            flat_tools(tools)
        assert any(repr(name) in str(caught.value) for name in twice)
        return
    flat = flat_tools(tools)
    assert [tool.function["name"] for tool in flat] == joined
    found = {tool.function["name"]: (tool.namespace, tool.name) for tool in flat}
    assert [*found.values()] == pairs


def sky_call(name: str, key: str, value: str) -> str:
    return (
        f"\n<tool_call>mcp__sky__{name}\n<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>"
        "\n</tool_call>"
    )


SAID = THOUGHT + sky_call("weather", "city", "Rome") + sky_call("patch", "input", "+a") + call("x")
CALLS = [
    ("function_call", "mcp__sky", "weather", '{"city": "Rome"}'),
    ("custom_tool_call", "mcp__sky", "patch", "+a"),
    ("function_call", None, "weather", '{"city": "x", "days": 2}'),
]


def told(item: dict[str, Any]) -> tuple[Any, ...]:
    """A call; what is in no namespace has no such field."""
    assert ("namespace" in item) == (item.get("namespace") is not None)
    said = item["input"] if item["type"] == "custom_tool_call" else item["arguments"]
    return item["type"], item.get("namespace"), item["name"], said


def test_calls_name_their_namespaces(talker: Live, client: openai.OpenAI):
    say(talker, SAID)
    asked: dict[str, Any] = {"tools": [SKY, WEATHER]}
    whole = wire(client, model=talker.model, input="hi", **asked)
    Response.model_validate(whole)
    assert whole["tools"] == asked["tools"]
    assert [told(item) for item in whole["output"][1:]] == CALLS
    found = events(talker, client, **asked)
    for event in found:
        EVENT.validate_python(event)
    added = [e["item"] for e in found if e["type"] == "response.output_item.added"]
    done = [e["item"] for e in found if e["type"] == "response.output_item.done"]
    assert [told(item)[:3] for item in added[1:]] == [told[:3] for told in CALLS]
    assert [told(item) for item in done[1:]] == CALLS
    assert found[-1]["response"]["output"] == done


def test_two_turns(talker: Live, client: openai.OpenAI):
    say(talker, THOUGHT + sky_call("weather", "city", "Rome"))
    first: Any = client.responses.create(model=talker.model, input="hi", tools=[SKY])
    output = {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "sun"}
    say(talker, "\n<think></think>\nDone.")
    asked: Any = [{"role": "user", "content": "hi"}, *first.output, output]
    second: Any = client.responses.create(model=talker.model, input=asked, tools=[SKY])
    assert second.output_text == "Done."
    cached = second.usage.input_tokens_details.cached_tokens
    assert cached > first.usage.input_tokens, "it is sent back as the model wrote it"


@pytest.mark.parametrize("listed", [False, True])
def test_a_tool_of_a_namespace_is_chosen(talker: Live, client: openai.OpenAI, listed: bool):
    say(talker, "\n<think></think>\nno")
    ping = {"type": "function", "name": "ping", "namespace": "b"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [ping]}
    choice: Any = allowed if listed else ping
    empty = {"parameters": {"type": "object", "properties": {}}}
    tools: Any = [function("ping"), group("b", function("ping", **empty), function("pong"))]
    answer = wire(
        client,
        model=talker.model,
        input="hi",
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=False,
        temperature=0,
        max_output_tokens=200,
    )
    assert answer["tool_choice"] == choice
    (called,) = [item for item in answer["output"] if item["type"] != "reasoning"]
    assert told(called)[:3] == ("function_call", "b", "ping")


def test_an_agent_of_the_sdk(talker: Live):
    """Its namespaces are of tools that it is told of at once, and it knows whose a call is."""
    asked = []

    def look(city: str) -> str:
        asked.append(city)
        say(talker, "\n<think></think>\nIt is sunny.")
        return "sun"

    tool = agents.function_tool(look, name_override="weather", strict_mode=False)
    tools = agents.tool_namespace(name="mcp__sky", description="The sky.", tools=[tool])
    say(talker, THOUGHT + sky_call("weather", "city", "Rome"))
    done = run_agent(talker, tools=tools)
    assert (done.final_output, asked) == ("It is sunny.", ["Rome"])


LONG = "n" * MAX_NAME


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ([group("a", function("b__c")), group("a__b", function("c"))], "'a__b__c'"),
        (
            [function("x"), group("a", function("b")), function("a__b")],
            "tools[1].tools[0] and tools[2] are both 'a__b' to the model",
        ),
        ([group("a", function("b"), function("b"))], "tools[0].tools[0] and tools[0].tools[1] are"),
        ([function("x"), function("x")], "tools has 'x' more than once"),
        ([group("a", function(LONG))], f"with its namespace its name is 'a__{LONG[:9]}"),
        (
            [group("a", function("b c"))],
            "tools[0].tools[0]: with its namespace its name is 'a__b c'",
        ),
        ([group("a", function(""))], "tools[0].tools[0].name is ''"),
        ([function("x"), group("a", function(None))], "tools[1].tools[0].name is None"),
        ([group("a b", function("c"))], "tools[0].name is 'a b'"),
        ([group(None, function("c"))], "tools[0].name is None"),
        ([group("", function("c"))], "tools[0].name is ''"),
        ([group("a", tools=None)], "tools[0].tools must be a list of tools"),
        ([group("a", 5)], "tools[0].tools must be a list of tools"),
        ([group("a", function("b"), description=5)], "tools[0].description must be a string"),
        ([group("a", function("b"), strict=True)], "tools[0].strict is unknown"),
        ([group("a", function("b"), defer_loading=True)], "tools[0].defer_loading is not served"),
        ([group("a", function("b", defer_loading=True))], "tools[0].tools[0].defer_loading"),
        ([group("a", group("b"))], "tools[0].tools[0].type is 'namespace'"),
        ([group("a", {"type": "web_search"})], "tools[0].tools[0].type is 'web_search'"),
        (
            [function("x"), group("a", function("b"), function("c", parameters=5))],
            "tools[1].tools[1].parameters must be a JSON schema",
        ),
        (
            [group("a", function("b"), function("c", strict=True, parameters={"not": {}}))],
            "tools[0].tools[1].parameters are strict, but",
        ),
    ],
)
def test_refusals(talker: Live, client: openai.OpenAI, tools: Any, words: str):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(input="hi", tools=tools)
    assert caught.value.param == "tools"
    assert words in json.loads(caught.value.response.text)["error"]["message"]


def test_choices_that_there_are_not(client: openai.OpenAI):
    unclear: Any = ({"name": "weather"}, [SKY, group("b", function("weather"))])
    for named, tools in (unclear, ({"name": "weather", "namespace": "sky"}, [SKY])):
        choice: Any = {"type": "function"} | named
        with pytest.raises(openai.BadRequestError, match="the tools are mcp__sky__weather"):
            client.responses.create(input="hi", tools=tools, tool_choice=choice)
    choice = {"type": "function", "name": "weather", "namespace": 5}
    with pytest.raises(openai.BadRequestError, match="expected"):
        client.responses.create(input="hi", tools=[SKY], tool_choice=choice)


def test_neutral_fields_of_a_namespace():
    neutral = {"defer_loading": False, "strict": None}
    assert names(chat(tools=[SKY | neutral])) == [tool["name"] for tool in RENAMED]
    assert WEATHER["parameters"] == PARAMETERS, "nothing that was given is changed"
    assert "mcp__sky__weather" not in json.dumps(SKY)
