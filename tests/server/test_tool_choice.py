"""Which tools are called is the client's choice, whatever the model wants to say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import openai
import pytest
from scripted import (
    FORMS,
    HI,
    PING,
    SWITCH,
    WEATHER,
    Chat,
    Said,
    function,
)

from glmjax.errors import InvalidRequestError
from glmjax.server.served import ServedModel
from glmjax.server.tool_fields import toolset
from glmjax.text.chat import ChatTemplate
from glmjax.text.tool_grammar import TAGS

TOOLS = [SWITCH, PING]
LAMPS = ("hall", "desk")
NAMED = {"type": "function", "function": {"name": "switch"}}
# How a model may write calls of these tools, and nothing else.
WRITTEN = {
    "glm45": re.compile(
        r"\n?<tool_call>(ping\n</tool_call>|switch\n<arg_key>lamp</arg_key>\n"
        r"<arg_value>(hall|desk)</arg_value>\n<arg_key>on</arg_key>\n"
        r"<arg_value>(true|false)</arg_value>\n</tool_call>)"
    ),
    "glm47": re.compile(
        r"<tool_call>(ping</tool_call>|switch<arg_key>lamp</arg_key>"
        r"<arg_value>(hall|desk)</arg_value><arg_key>on</arg_key>"
        r"<arg_value>(true|false)</arg_value></tool_call>)"
    ),
}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def check(said: Said, *names: str) -> None:
    """There are calls, of these tools only, and each fits its tool."""
    assert said.calls
    for (name, _), arguments in zip(said.calls, said.arguments, strict=True):
        assert name in names
        if name == "switch":
            assert (arguments["lamp"] in LAMPS, type(arguments["on"])) == (True, bool)
            assert len(arguments) == 2
        else:
            assert arguments == {}


# It may


@pytest.mark.parametrize("choice", [None, "auto", allowed("auto", "switch", "ping")])
def test_the_model_may_choose(chat: Chat, choice: Any):
    chat.answer("hm", "No need.")
    assert chat.both(tools=TOOLS, tool_choice=choice).content == "No need."
    chat.answer("hm", "", chat.form.call("switch", lamp="hall", on="true"))
    said = chat.both(tools=TOOLS, tool_choice=choice)
    assert (said.arguments, said.finish) == ([{"lamp": "hall", "on": True}], "tool_calls")


def test_the_model_may_choose_among_some(chat: Chat):
    chat.answer("hm", "No need.")
    choice = allowed("auto", "ping")
    assert chat.both(tools=TOOLS, tool_choice=choice).content == "No need."
    chat.answer("hm", "", chat.form.call("switch", lamp="hall", on="true"))
    check(chat.both(tools=TOOLS, tool_choice=choice, max_tokens=60), "ping")


# It may not


def test_none_are_called(chat: Chat):
    """The model sees the tools still, so that the prefix cache holds, but cannot begin a call."""
    chat.answer("hm", "No need.")
    messages = [{"role": "user", "content": "a question of its own"}]
    first = chat.ask(messages=messages, tools=TOOLS)
    second = chat.ask(messages=messages, tools=TOOLS, tool_choice="none")
    assert second.usage.prompt_tokens == first.usage.prompt_tokens
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= (first.usage.prompt_tokens - 1) // 16 * 16 > 0
    tokenizer = chat.server.frontend.served.tokenizer
    banned = {tokenizer.token_id(tag) for tag in (*TAGS, "<tool_response>")}
    assert {i for i, x in chat.server.runner.asked[-1].logit_bias.items() if x < -1e6} == banned
    bias = {"5": 2.0}
    chat.ask(tools=TOOLS, tool_choice="none", logit_bias=bias)
    assert chat.server.runner.asked[-1].logit_bias.keys() == {5, *banned}
    for options in ({}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "required"}):
        chat.ask(messages=messages, max_tokens=60, **options)
        assert not chat.server.runner.asked[-1].logit_bias
    chat.answer("hm", "See:", chat.form.call("ping"))
    said = chat.both(tools=TOOLS, tool_choice="none")
    assert (said.content, said.calls) == ("See:" + chat.form.call("ping"), [])


# It must

WISHES = ["Sure, let me look at that for you. ", "?<tool_call>nothing", '{"name": "ping"}', "\n\n"]


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("thinks", [True, False])
def test_a_call_must_come(chat: Chat, wish: str, thinks: bool):
    """In the model's own form, token by token."""
    text = chat.form.thought("hm") if thinks else ""
    chat.say(text + wish * 4)
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 150}
    options |= {"enable_thinking": thinks, "parallel_tool_calls": False}
    for seed in range(4):
        said = chat.both(seed=seed, logprobs=True, **options)
        check(said, "switch", "ping")
        assert (said.reasoning, said.content) == ("hm" if thinks else "", "")
        assert (len(said.calls), said.finish) == (1, "tool_calls")
        written = "".join(token for token, _ in said.tokens).removeprefix(text)
        form = "glm47" if chat.form is FORMS["glm47"] else "glm45"
        assert WRITTEN[form].fullmatch(written)


def test_several_calls_may_come(chat: Chat):
    calls = [chat.form.call("switch", lamp=lamp, on="true") for lamp in LAMPS]
    chat.answer("hm", "", *calls)
    said = chat.both(tools=TOOLS, tool_choice="required")
    assert said.arguments == [{"lamp": lamp, "on": True} for lamp in LAMPS]
    one = chat.both(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert one.calls == said.calls[:1]


@pytest.mark.parametrize("choice", [NAMED, allowed("required", "switch")])
def test_one_tool_must_be_called(chat: Chat, choice: Any):
    options = {"tools": [PING, SWITCH], "tool_choice": choice, "max_tokens": 150}
    chat.answer("hm", "Sure.", chat.form.call("ping"))
    for seed in range(4):
        said = chat.both(seed=seed, parallel_tool_calls=False, **options)
        check(said, "switch")
        assert (len(said.calls), said.finish) == (1, "tool_calls")


def test_a_named_tool_is_called_once(chat: Chat):
    chat.answer("hm", "", *[chat.form.call("switch", lamp="desk", on="false")] * 3)
    assert len(chat.both(tools=TOOLS, tool_choice=NAMED).calls) == 1
    choice = allowed("required", "switch")
    assert len(chat.both(tools=TOOLS, tool_choice=choice).calls) == 3


def test_what_the_model_says_stays_where_it_fits(chat: Chat):
    city = 'a "quoted" <tag>, </arg, {brace}\n 🎉 <'
    chat.answer("hm", "", chat.form.call("weather", city=city, days="12"))
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        said = chat.both(tools=[WEATHER, PING], tool_choice=choice)
        assert said.arguments == [{"city": city, "days": 12}]


def test_choices_are_forced_by_themselves(chat: Chat):
    chat.answer("hm", "Sure.")
    options: dict[str, Any] = {"parallel_tool_calls": False, "max_tokens": 150, "n": 3}
    for said in chat.all(tools=TOOLS, tool_choice="required", **options):
        check(said, "switch", "ping")


@pytest.mark.parametrize("budget", [0, 2])
def test_a_call_must_come_behind_a_short_thought(chat: Chat, budget: int):
    chat.say(chat.form.thought("on and on" * 10))
    options: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
    said = chat.both(tools=TOOLS, max_thinking_tokens=budget, max_tokens=100, **options)
    check(said, "switch", "ping")
    assert (bool(said.reasoning), said.content) == (budget > 0, "")
    usage = chat.ask(tools=TOOLS, max_thinking_tokens=budget, max_tokens=100, **options).usage
    assert usage.completion_tokens_details.reasoning_tokens == budget


def test_a_forced_call_is_cut_off(chat: Chat):
    chat.answer("hm", "", chat.form.call("switch", lamp="desk", on="false"))
    script = chat.server.runner.script
    assert script
    for length in range(1, len(script), 3):
        said = chat.both(tools=TOOLS, tool_choice="required", max_tokens=length)
        assert said.finish == "length"
        assert all(isinstance(arguments, dict) for arguments in said.arguments)


# Calls or an answer of a form

COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "c", "schema": COLOUR, "strict": True}}


def test_an_answer_of_a_form_or_a_call(chat: Chat):
    options: dict[str, Any] = {"tools": TOOLS, "response_format": FORMAT, "max_tokens": 150}
    chat.answer("hm", '{"colour": "red"}')
    said = chat.both(**options)
    assert (json.loads(said.content), said.calls) == ({"colour": "red"}, [])
    chat.answer("hm", "", chat.form.call("switch", lamp="hall", on="true"))
    said = chat.both(**options)
    assert (said.content, said.arguments) == ("", [{"lamp": "hall", "on": True}])
    chat.answer("hm", "I would rather talk.")
    for seed in range(4):
        said = chat.both(seed=seed, parallel_tool_calls=False, **options)
        if said.calls:
            check(said, "switch", "ping")
        else:
            assert json.loads(said.content)["colour"] in ("red", "blue")
    chat.answer("hm", '{"colour": "blue"}')
    assert json.loads(chat.both(tool_choice="none", **options).content) == {"colour": "blue"}
    check(chat.both(tool_choice="required", **options), "switch", "ping")


def test_any_json_object_or_a_call(chat: Chat):
    options: dict[str, Any] = {"tools": TOOLS, "response_format": {"type": "json_object"}}
    chat.answer("hm", '{"a": [1]}')
    assert json.loads(chat.both(**options).content) == {"a": [1]}
    chat.answer("hm", "", chat.form.call("ping"))
    assert chat.both(**options).calls == [("ping", "{}")]
    chat.answer("hm", "I would rather talk.")
    said = chat.both(max_tokens=40, **options)
    assert said.calls or said.content.startswith("{") or not said.content


# Refusals

BAD_FORMAT = {"type": "json_schema", "json_schema": {"schema": {"type": "objec"}}}


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice", "there is none"),
        ({"tool_choice": NAMED}, "tool_choice", "there is none"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "expected"),
        ({"tools": TOOLS, "tool_choice": 5}, "tool_choice", "expected"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", "expected"),
        ({"tools": TOOLS, "tool_choice": allowed("none", "ping")}, "tool_choice", "expected"),
        ({"tools": TOOLS, "tool_choice": allowed("auto")}, "tool_choice", "expected"),
        ({"tools": TOOLS, "tool_choice": allowed("auto", "pong")}, "tool_choice", "'pong'"),
        ({"tools": [PING, SWITCH, PING]}, "tools", "'ping' more than once"),
        ({"tools": [PING], "tool_choice": NAMED}, "tool_choice", "the tools are ping"),
        ({"tools": TOOLS, "regex": "a+"}, "regex", "does not go with tools"),
        ({"tools": TOOLS, "response_format": BAD_FORMAT}, "response_format", "objec"),
        ({"tools": TOOLS, "choice": ["a"]}, "choice", 'tool_choice "none"'),
    ],
)
def test_refusals(chat: Chat, options: dict[str, Any], param: str, words: str):
    with pytest.raises(openai.BadRequestError) as caught:
        chat.ask(**options)
    assert caught.value.param == param
    assert words in caught.value.message


def test_a_schema_that_cannot_be_kept(chat: Chat):
    tool = function("f", {"a": {"type": "array", "uniqueItems": True}}, strict=True)
    with pytest.raises(openai.BadRequestError) as caught:
        chat.ask(tools=[tool])
    assert caught.value.param == "tools"
    assert "tools[0].function.parameters" in caught.value.message
    assert "uniqueItems" in caught.value.message
    chat.answer("hm", "", chat.form.call("f", a="[1, 1]"))
    loose = function("f", {"a": {"type": "array", "uniqueItems": True}})
    assert chat.both(tools=[loose], tool_choice="required").arguments == [{"a": [1, 1]}]


def test_a_strict_tool_is_named(chat: Chat):
    bad = function("f", {"a": {"type": "strng"}}, strict=True)
    for choice in ("auto", "required", allowed("auto", "f")):
        with pytest.raises(openai.BadRequestError) as caught:
            chat.ask(tools=[WEATHER, PING, bad], tool_choice=choice)
        assert caught.value.param == "tools"
        assert "tools[2].function.parameters" in caught.value.message
        assert "strng" in caught.value.message
        assert "weather" not in caught.value.message
    unfit = function("f", {"a": {"type": "integer", "minimum": 3, "maximum": 2}}, strict=True)
    unfit["function"]["parameters"]["required"] = []
    with pytest.raises(openai.BadRequestError, match=r"tools\[1\].function.parameters .*Unsatisf"):
        chat.ask(tools=[WEATHER, unfit])
    chat.answer("hm", "No.")
    assert chat.both(tools=[bad], tool_choice="none").content == "No."


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        (PING | {"strict": True}, "tools[0].strict"),
        (function("f", {}, strict="yes"), "tools[0].function.strict is 'yes'"),
        (function("f", {}, strict=1), "must be true or false"),
    ],
)
def test_where_strict_stands(chat: Chat, tool: Any, words: str):
    with pytest.raises(openai.BadRequestError) as caught:
        chat.ask(tools=[tool])
    assert caught.value.param == "tools"
    assert words in caught.value.message
    chat.answer("hm", "Yes.")
    for silent in (None, False):
        tools = [PING | {"strict": silent}, function("f", {}, strict=silent)]
        assert chat.both(tools=tools).content == "Yes."


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "float"}},
        {"type": "array", "items": {"$ref": "http://localhost/x"}},
        {"type": "array", "items": {"type": "integer", "minimum": 3, "maximum": 2}, "minItems": 1},
    ],
)
def test_schemas_that_do_not_compile_are_loosened(chat: Chat, schema: Any):
    chat.answer("hm", "", chat.form.call("f", a="[1, 1]"))
    tools = [function("f", {"a": schema}), SWITCH]
    said = chat.both(tools=tools, tool_choice="required", parallel_tool_calls=False)
    assert said.arguments == [{"a": [1, 1]}]


def test_a_string_that_nothing_fits_is_free(chat: Chat):
    chat.answer("hm", "", chat.form.call("f", a="abc"))
    tools = [function("f", {"a": {"type": "string", "pattern": "^abc$", "maxLength": 2}})]
    assert chat.both(tools=tools, tool_choice="required").arguments == [{"a": "abc"}]


def test_tools_that_make_too_long_a_grammar(chat: Chat):
    names = {f"{'k' * 200}{i}": {"type": "integer"} for i in range(1500)}
    with pytest.raises(openai.BadRequestError, match=r"schemas make a grammar of more than"):
        chat.ask(tools=[function("f", names)], tool_choice="required")


def test_templates_that_show_no_tools(served: ServedModel):
    source = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    source += "{{ c.function.name }}\n<arg_key>{% endfor %}{% endfor %}"
    blind = replace(served, template=ChatTemplate(source))
    assert blind.call_form == "glm45"
    assert toolset(None, None, None, blind).tools == []
    with pytest.raises(InvalidRequestError, match="does not show tools") as caught:
        toolset([PING], None, None, blind)
    assert caught.value.param == "tools"


def test_none_needs_no_tools(chat: Chat):
    chat.answer("hm", "Yes.")
    for choice in ("none", "auto", None):
        assert chat.both(messages=HI, tool_choice=choice).content == "Yes."
