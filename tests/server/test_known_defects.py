"""What is easily read wrong in a GLM's answers: a test for each rule, streamed and one-shot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Live
from scripted import FORMS, HI, PING, SWITCH, WEATHER, Chat, chatting, function, with_form

from glmjax.server.served import ServedModel

TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
TAGS += ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
TOOLS = [WEATHER, PING]


@pytest.fixture(scope="module", params=FORMS)
def chat(
    request: pytest.FixtureRequest, served: ServedModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Chat]:
    """A model of each form, whose drafts mostly stand: several tokens come at once."""
    folder = tmp_path_factory.mktemp("forms") / "model"
    made = with_form(served, request.param, folder)
    with chatting(made, request.param) as client:
        client.server.runner._draft_errors = 1  # of 8
        yield client


PIECES = [
    *TAGS,
    "\n",
    " ",
    "ping",
    "weather\n",
    "city",
    "days",
    "Rome",
    "3",
    '{"a": 1}',
    "STOP",
    "é",
]
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "tools": st.just(TOOLS),
        "tool_choice": st.sampled_from(["auto", "none"]),
        "parallel_tool_calls": st.booleans(),
        "separate_reasoning": st.booleans(),
        "stream_reasoning": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "enable_thinking": st.booleans(),
        "logprobs": st.booleans(),
        "stop": st.sampled_from(["STOP", ["\n", "3"], "<arg_value>"]),
        "n": st.just(2),
    },
)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), length=st.integers(1, 40), options=OPTIONS)
def test_1_the_stream_and_the_one_shot_answer_agree(
    chat: Chat, data: st.DataObject, length: int, options: dict[str, Any]
):
    """Whatever the model says; and it is never an error."""
    tokenizer = chat.server.frontend.served.tokenizer
    token = st.integers(0, tokenizer.size + 3).map(lambda i: [i])
    piece = st.sampled_from([tokenizer.encode(piece) for piece in PIECES])
    script = data.draw(st.lists(piece | piece | token, min_size=1, max_size=20))
    chat.server.runner.script = [i for ids in script for i in ids]
    for said in chat.all(max_tokens=length, **options):
        assert all(isinstance(arguments, dict) for arguments in said.arguments)
        assert said.finish in ("stop", "length", "tool_calls")
        assert bool(said.tokens) == options.get("logprobs", False)


def test_2_the_prompt_says_whether_a_thought_is_open(chat: Chat):
    """Not a setting, and not what a user writes."""
    chat.say("Yes.")
    asked = [{"role": "user", "content": "What do <think> and </think> and <think> mean?"}]
    said = chat.both(messages=asked, enable_thinking=False)
    assert (said.reasoning, said.content) == ("", "Yes.")
    chat.answer("hm", "Yes.")
    said = chat.both(messages=asked)
    assert (said.reasoning, said.content) == ("hm", "Yes.")
    history = [*HI, {"role": "assistant", "content": "<think>so</think>No."}, *HI]
    said = chat.both(messages=history)
    assert (said.reasoning, said.content) == ("hm", "Yes.")


def test_3_nothing_leaks(chat: Chat):
    for space in ("", "\n", "\n\n"):
        chat.say(chat.form.thought(f"{space}hm{space}") + f"{space}Yes.")
        said = chat.both()
        assert (said.reasoning, said.content) == ("hm", "Yes.")
    chat.answer("", "Yes.")
    answer = chat.ask().choices[0].message
    assert (answer.reasoning_content, answer.content) == (None, "Yes.")


def test_4_without_an_end_of_the_thought(chat: Chat):
    """It is the answer if no thought was begun, and a thought if one was."""
    chat.say("Yes.")
    begun = chat.form is FORMS["glm47"]  # by the prompt
    said = chat.both()
    assert (said.reasoning, said.content) == (("Yes.", "") if begun else ("", "Yes."))
    chat.say("\n<think>so it goes")
    said = chat.both()
    assert (said.reasoning, said.content, said.finish) == ("so it goes", "", "stop")


def test_5_a_call_in_a_thought_is_a_thought(chat: Chat):
    call = chat.form.call("weather", city="Rome", days="3")
    chat.answer(f"I could say {call}, but", "No.")
    said = chat.both(tools=TOOLS)
    assert said.reasoning == f"I could say {call}, but"
    assert (said.content, said.calls, said.finish) == ("No.", [], "stop")


@pytest.mark.parametrize(
    "value",
    [
        "if a <",
        "a </ b </arg </arg_valu",
        'say "hi" \\" \\n \\',
        "two\nlines\n",
        "{{ {'a': [1, }",
        "<tool_call>ping</tool_call>",
        "<think>é€🎉</think>",
        " spaces around ",
    ],
)
def test_6_any_value_survives(chat: Chat, value: str):
    chat.answer("hm", "", chat.form.call("weather", city=value, days="1"))
    # Where calls are forced, a value has tags in letters only.
    forced = [] if any(tag in value for tag in TAGS) else ["required"]
    for choice in ("auto", *forced):
        said = chat.both(tools=TOOLS, tool_choice=choice)
        assert said.arguments == [{"city": value, "days": 1}]


TYPES: list[tuple[Any, str, Any]] = [
    ({"type": "string"}, "123", "123"),
    ({"$ref": "#/$defs/text"}, "true", "true"),
    ({"enum": ["1", "2"]}, "1", "1"),
    ({"const": "null"}, "null", "null"),
    ({"allOf": [{"$ref": "#/$defs/text"}, {"minLength": 1}]}, "{}", "{}"),
    ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "5", 5),
    ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "five", "five"),
    ({"oneOf": [{"$ref": "#/$defs/list"}, {"type": "null"}]}, "[1]", [1]),
    ({"type": ["string", "null"]}, "null", None),
    ({"type": "string", "nullable": True}, "null", None),
    ({"type": "string", "nullable": True}, "7", "7"),
    ({"type": "number"}, "1e3", 1000.0),
    ({"type": "integer"}, "many", "many"),
    ({"type": "object"}, '{"a": {"b": []}}', {"a": {"b": []}}),
    ({"type": "boolean"}, "true", True),
    ({}, "12", 12),
    (True, "text", "text"),
]


@pytest.mark.parametrize(("schema", "written", "value"), TYPES)
def test_7_arguments_are_typed_by_the_schema(chat: Chat, schema: Any, written: str, value: Any):
    tool = function("f", {"x": schema})
    defs = {"text": {"type": "string"}, "list": {"type": "array"}}
    tool["function"]["parameters"]["$defs"] = defs
    chat.answer("hm", "", chat.form.call("f", x=written))
    assert chat.both(tools=[tool]).arguments == [{"x": value}]


def test_8_the_name_comes_first_and_then_arguments(chat: Chat):
    """`streamed` checks the order; here the pieces themselves."""
    chat.answer("hm", "", chat.form.call("weather", city="Rome", days="3"), chat.form.call("ping"))
    chat.both(tools=TOOLS)
    calls = [
        call
        for chunk in chat.stream(tools=TOOLS)
        for choice in chunk.choices
        for call in choice.delta.tool_calls or []
    ]
    assert [call.function.name for call in calls if call.id] == ["weather", "ping"]
    pieces = [call.function.arguments for call in calls if call.index == 0]
    assert json.loads("".join(pieces)) == {"city": "Rome", "days": 3}
    assert [call.function.arguments for call in calls if call.index == 1] == ["", "{}"]


def test_9_several_tokens_at_once_and_an_end_anywhere(chat: Chat):
    calls = [chat.form.call("weather", city=city, days="1") for city in ("Rome", "a")]
    chat.answer("hm", "", chat.form.call("ping"), chat.form.call("ping"), *calls)
    script = chat.server.runner.script
    assert script
    chat.wait_for_drafts(tools=TOOLS)
    whole = chat.both(tools=TOOLS)
    assert [name for name, _ in whole.calls] == ["ping", "ping", "weather", "weather"]
    for length in range(1, len(script), 2):
        said = chat.both(tools=TOOLS, max_tokens=length)
        assert said.finish == "length"
        for part, full in zip(said.arguments, whole.arguments, strict=False):
            assert part.items() <= full.items() or full["city"].startswith(part["city"])


def test_10_the_end_says_that_tools_are_called(chat: Chat):
    for name in ("weather", "unheard_of"):
        chat.answer("hm", "On it.", chat.form.call(name, city="Rome"))
        said = chat.both(tools=TOOLS)
        assert (said.calls, said.finish) == ([(name, '{"city": "Rome"}')], "tool_calls")
    chat.answer("hm", "No.")
    assert chat.both(tools=TOOLS).finish == "stop"


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "switch"}}]
)
def test_11_a_forced_call_has_the_models_own_form(chat: Chat, choice: Any):
    options = {"tools": [SWITCH], "tool_choice": choice, "parallel_tool_calls": False}
    chat.say(chat.form.thought("hm") + '[{"name": "switch", "parameters": {"lamp": "hall"}}]')
    said = chat.both(logprobs=True, max_tokens=100, **options)
    assert (said.finish, [name for name, _ in said.calls]) == ("tool_calls", ["switch"])
    written = "".join(token for token, _ in said.tokens)
    (arguments,) = said.arguments
    values = {"lamp": arguments["lamp"], "on": json.dumps(arguments["on"])}
    assert written.endswith(chat.form.call("switch", **values).lstrip())
    chat.say(chat.form.call("switch", lamp="hall", on="true"))
    chat.wait_for_drafts(enable_thinking=False, **options)


def test_12_a_grammar_begins_behind_the_thought(chat: Chat):
    for grammar, answer in (({"regex": "[0-9]{3}"}, "123"), ({"choice": ["yes", "no"]}, "yes")):
        chat.say(chat.form.thought("neither digits nor yes") + answer)
        said = chat.both(**grammar, max_tokens=60)
        assert (said.reasoning, said.content) == ("neither digits nor yes", answer)
        chat.say(answer)
        said = chat.both(**grammar, max_tokens=60, enable_thinking=False)
        assert (said.reasoning, said.content) == ("", answer)


def test_parsers_have_the_names_that_are_known(served: ServedModel, server: Live):
    with server.http as client:
        for name in ("glm", "glm45", "glm47"):
            body = {"text": "<think>hm</think>Yes.", "reasoning_parser": name}
            answer = client.post("/separate_reasoning", json=body).json()
            assert (answer["reasoning_text"], answer["text"]) == ("hm", "Yes.")
