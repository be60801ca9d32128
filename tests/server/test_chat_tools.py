"""Tool calls, as OpenAI's client sees them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel
from scripted import HI, PING, WEATHER, Chat, chatting, function, streamed, with_form

from glmjax.server.served import ServedModel

TOOLS = [WEATHER, PING]


def test_a_call(chat: Chat):
    chat.answer("hm", "", chat.form.call("weather", city="Rome", days="3"))
    said = chat.both(tools=TOOLS)
    assert said.calls == [("weather", '{"city": "Rome", "days": 3}')]
    assert (said.reasoning, said.content, said.finish) == ("hm", "", "tool_calls")
    choice = chat.ask(tools=TOOLS).choices[0]
    assert choice.message.content is None
    assert choice.message.tool_calls[0].type == "function"


def test_text_beside_calls(chat: Chat):
    chat.answer("hm", "On it.", chat.form.call("ping"))
    said = chat.both(tools=TOOLS)
    assert (said.content, said.calls) == ("On it.", [("ping", "{}")])
    assert chat.ask(tools=TOOLS).choices[0].message.content == "On it."


def test_calls_side_by_side(chat: Chat):
    calls = [chat.form.call("weather", city=city, days="1") for city in ("Rome", "Oslo")]
    chat.answer("hm", "", *calls, chat.form.call("ping"))
    said = chat.both(tools=TOOLS)
    assert [name for name, _ in said.calls] == ["weather", "weather", "ping"]
    assert said.arguments == [{"city": "Rome", "days": 1}, {"city": "Oslo", "days": 1}, {}]
    (first,) = chat.all(tools=TOOLS, parallel_tool_calls=False)
    assert (first.calls, first.finish) == (said.calls[:1], "tool_calls")
    assert chat.both(tools=TOOLS, parallel_tool_calls=True) == said


def test_arguments_arrive_bit_by_bit(chat: Chat):
    chat.answer("hm", "", chat.form.call("weather", city="a long name " * 4, days="3"))
    calls = [
        call
        for chunk in chat.stream(tools=TOOLS)
        for choice in chunk.choices
        for call in choice.delta.tool_calls or []
    ]
    begin, *rest = (call.model_dump(exclude_unset=True) for call in calls)
    assert begin.pop("id").startswith("call_")
    function = {"name": "weather", "arguments": ""}
    assert begin == {"index": 0, "type": "function", "function": function}
    assert len(rest) > 5
    for call in rest:
        assert set(call) == {"index", "function"}
        assert set(call["function"]) == {"arguments"}


def test_types_are_those_of_the_schema(chat: Chat):
    kinds = {
        "text": {"type": "string"},
        "number": {"type": "number"},
        "flag": {"type": "boolean"},
        "list": {"type": "array", "items": {"type": "integer"}},
        "more": {"type": "object"},
        "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "any": {},
    }
    written = {"text": "123", "number": "1.50", "flag": "true", "list": "[1, 2]"}
    written |= {"more": '{"a": [null]}', "maybe": "null", "any": "7", "unknown": "[8]"}
    chat.answer("hm", "", chat.form.call("store", **written))
    (arguments,) = chat.both(tools=[function("store", kinds)]).arguments
    assert arguments == {
        "text": "123",
        "number": 1.5,
        "flag": True,
        "list": [1, 2],
        "more": {"a": [None]},
        "maybe": None,
        "any": 7,
        "unknown": [8],
    }


def test_a_name_that_is_no_tools(chat: Chat):
    chat.answer("hm", "", chat.form.call("thunder", volume="11"))
    said = chat.both(tools=TOOLS)
    assert (said.calls, said.finish) == ([("thunder", '{"volume": 11}')], "tool_calls")


def test_cut_off_anywhere(chat: Chat):
    calls = chat.form.call("weather", city="Rome", days="3"), chat.form.call("ping")
    chat.answer("hm", "On it.", *calls)
    script = chat.server.runner.script
    assert script
    whole = chat.both(tools=TOOLS)
    begun = 0
    for length in range(1, len(script)):
        said = chat.both(tools=TOOLS, max_tokens=length)
        assert said.finish == "length"
        assert all(isinstance(arguments, dict) for arguments in said.arguments)
        assert [name for name, _ in said.calls] == ["weather", "ping"][: len(said.calls)]
        assert len(said.calls) >= begun
        begun = len(said.calls)
    assert begun == len(whole.calls)


def test_choices_call_by_themselves(chat: Chat):
    chat.answer("hm", "", chat.form.call("ping"), chat.form.call("ping"))
    choices = chat.all(tools=TOOLS, n=3)
    assert [c.calls for c in choices] == [[("ping", "{}")] * 2] * 3
    answer = chat.ask(tools=TOOLS, n=3)
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls]
    assert len(set(ids)) == 6


def test_without_tools_tags_are_text(chat: Chat):
    call = chat.form.call("ping")
    chat.answer("hm", "On it.", call)
    for options in ({}, {"tools": []}, {"tools": None}):
        said = chat.both(**options)
        assert (said.content, said.calls, said.finish) == ("On it." + call, [], "stop")


# Turns


@pytest.mark.parametrize("as_json", [False, True])
def test_a_conversation(chat: Chat, as_json: bool):
    """What the server said goes back as it came, and is found in the cache."""
    calls = [chat.form.call("weather", city=city, days="1") for city in ("Rome", "Oslo")]
    chat.answer(f"Two cities; {as_json}.", "On it.", *calls)
    first = chat.ask(tools=TOOLS)
    message = first.choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"rain in {call.function.name}"}
        for call in message.tool_calls
    ]
    messages = [*HI, message.model_dump() if as_json else message, *results]
    chat.answer("Rain, then.", "It rains.")
    second = chat.ask(messages=messages, tools=TOOLS)
    assert second.choices[0].message.content == "It rains."
    known = first.usage.total_tokens - 1  # the end token
    assert second.usage.prompt_tokens > known
    assert second.usage.prompt_tokens_details.cached_tokens == known // 16 * 16

    messages += [second.choices[0].message, {"role": "user", "content": "And tomorrow?"}]
    chat.answer("Again.", "", chat.form.call("weather", city="Rome", days="2"))
    assert chat.both(messages=messages, tools=TOOLS).arguments == [{"city": "Rome", "days": 2}]


def test_a_streamed_answer_goes_back(chat: Chat):
    chat.answer("hm", "On it.", chat.form.call("weather", city="Rome", days="3"))
    options: dict[str, Any] = {"model": chat.server.model, "tools": TOOLS}
    with chat.client.chat.completions.stream(messages=HI, **options) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    chat.answer("hm", "Rain.")
    for sent in (message, message.model_dump()):
        assert chat.both(messages=[*HI, sent, result], tools=TOOLS).content == "Rain."


# The client's own helpers


class Weather(BaseModel):
    """Foresee the weather."""

    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2, 3]
    exact: bool


def test_tools_made_by_pydantic(chat: Chat):
    tool = openai.pydantic_function_tool(Weather, name="weather")
    chat.answer("hm", "", chat.form.call("weather", city="Rome", days="3", exact="true"))
    options: dict[str, Any] = {"model": chat.server.model, "messages": HI, "tools": [tool]}
    answer: Any = chat.client.chat.completions.parse(**options)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.parsed_arguments == Weather(city="Rome", days=3, exact=True)
    with chat.client.chat.completions.stream(**options) as stream:
        events = {event.type: event for event in stream}
        message: Any = stream.get_final_completion().choices[0].message
    done: Any = events["tool_calls.function.arguments.done"]
    assert done.parsed_arguments == Weather(city="Rome", days=3, exact=True)
    assert done.arguments == call.function.arguments
    (streamed_call,) = message.tool_calls
    assert streamed_call.function.parsed_arguments == done.parsed_arguments


def test_strict_tools_are_called_as_their_schema_says(chat: Chat):
    """A model that is lost for words behind the tag."""
    tool: Any = openai.pydantic_function_tool(Weather, name="weather")
    chat.answer("hm", "", "<tool_call>" + "?" * 40)
    for seed in range(5):
        said = chat.both(tools=[tool], seed=seed, parallel_tool_calls=False, max_tokens=100)
        ((name, _),) = said.calls
        assert (name, said.finish) == ("weather", "tool_calls")
        jsonschema.validate(said.arguments[0], tool["function"]["parameters"])
    chat.answer("hm", "No need.")
    assert chat.both(tools=[tool]).content == "No need."


def test_the_asynchronous_client(chat: Chat):
    chat.answer("hm", "", chat.form.call("weather", city="Rome", days="3"))

    async def main() -> None:
        url = f"{chat.server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
            options: dict[str, Any] = {"model": chat.server.model, "messages": HI, "tools": TOOLS}
            whole: Any = await client.chat.completions.create(**options)
            (call,) = whole.choices[0].message.tool_calls
            stream: Any = await client.chat.completions.create(stream=True, **options)
            (said,) = streamed([chunk async for chunk in stream])
            assert said.calls == [(call.function.name, call.function.arguments)]

    asyncio.run(main())


# Refusals


def broken(**fields: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "f"} | fields}]


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"tools": [5]}, "tools", "tools[0].type is None"),
        ({"tools": [WEATHER, {"type": "custom"}]}, "tools", "tools[1].type is 'custom'"),
        ({"tools": [{"type": "function"}]}, "tools", "tools[0].function must be an object"),
        ({"tools": broken(name="two words")}, "tools", "without spaces"),
        ({"tools": broken(name=None)}, "tools", "tools[0].function.name is None"),
        ({"tools": broken(parameters=[])}, "tools", "must be a JSON schema"),
        ({"tools": [PING, PING]}, "tools", "'ping' more than once"),
        ({"tools": "ping"}, "tools", "list"),
        ({"functions": [{"name": "f"}]}, "functions", "send them as tools"),
        ({"function_call": {"name": "f"}}, "function_call", "tool_choice"),
        ({"parallel_tool_calls": "no way"}, "parallel_tool_calls", "boolean"),
    ],
)
def test_refusals(chat: Chat, options: dict[str, Any], param: str, words: str):
    with pytest.raises(openai.BadRequestError) as caught:
        chat.ask(**options)
    assert caught.value.param == param
    assert words in caught.value.message


@pytest.mark.parametrize("options", [{"functions": []}, {"function_call": "none"}])
def test_what_asks_for_nothing(chat: Chat, options: dict[str, Any]):
    chat.answer("hm", "Yes.")
    assert chat.both(**options).content == "Yes."


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ([{"function": {"name": "f", "arguments": "{"}}], "tool_calls[0].function.arguments"),
        ([{"function": {"name": "f", "arguments": "[1]"}}], "tool_calls[0].function.arguments"),
        ([{"function": {"arguments": "{}"}}], "tool_calls[0].function.name"),
    ],
)
def test_calls_that_cannot_be_sent_back(chat: Chat, calls: list[Any], words: str):
    with pytest.raises(openai.BadRequestError) as caught:
        chat.ask(messages=[*HI, {"role": "assistant", "tool_calls": calls}], tools=TOOLS)
    assert caught.value.param == "messages"
    assert f"messages[1].{words}" in caught.value.message


def test_models_that_call_no_tools(served: ServedModel, tmp_path: Path):
    """Their template shows none, or the server was told to read none."""
    made = with_form(served, "glm45", tmp_path / "model")
    source = "{% for m in messages %}{{ m.content }}{% endfor %}<|assistant|>"
    (made.folder / "chat_template.jinja").write_text(source, "utf-8")
    for model in (ServedModel.load(made.folder), replace(served, tool_call_parser="none")):
        with chatting(model) as chat:
            chat.say("\n<think>hm</think>\n<tool_call>ping\n</tool_call>")
            assert chat.both().content == "<tool_call>ping\n</tool_call>"
            with pytest.raises(openai.BadRequestError, match="calls no tools"):
                chat.ask(tools=TOOLS)
