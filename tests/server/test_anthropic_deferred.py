"""Anthropic's API: tools that the model is told of only where a result refers to them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import anthropic
import pytest
from anthropic_bodies import (
    BASE,
    HELLO,
    PATHS,
    TOOL,
    answer,
    assistant,
    call,
    reference,
    result,
    text,
    use,
    user,
)
from hypothesis import given
from hypothesis import strategies as st
from live import Live, live

from glmjax.errors import InvalidRequestError
from glmjax.server.anthropic.messages import in_places
from glmjax.server.anthropic.requests import PromptRequest
from glmjax.server.served import ServedModel
from glmjax.text.chat import ChatTemplate

SEARCH = {"name": "search", "input_schema": {"type": "object", "properties": {}}}
# A string that looks like a number, so that whoever reads a call of it has to know its schema.
LATER = {
    "name": "later",
    "description": "Does it later: 'é' & <b>",
    "input_schema": {
        "type": "object",
        "properties": {"day": {"type": "string"}},
        "required": ["day"],
        "additionalProperties": False,
    },
    "defer_loading": True,
}
TOOLS: list[Any] = [LATER, SEARCH, TOOL | {"defer_loading": True}]
FUNCTION = {
    "name": "later",
    "description": LATER["description"],
    "parameters": LATER["input_schema"],
}
SHOWN = {"type": "function", "function": FUNCTION}
PING = {
    "type": "function",
    "function": {"name": "ping", "parameters": TOOL["input_schema"]},
}
CALLED = "\n<tool_call>later\n<arg_key>day</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"


def ids(served: ServedModel, **body: Any) -> list[int]:
    chat, _ = PromptRequest.model_validate(BASE | {"tools": TOOLS} | body).chat()
    return chat.prompt(served)


def prompt(served: ServedModel, **body: Any) -> str:
    return served.tokenizer.decode(ids(served, **body))


def found(*content: Any) -> dict[str, Any]:
    """A conversation in which a tool was looked for."""
    return {"messages": [HELLO, assistant(use("search")), user(result("search", [*content]))]}


def test_a_deferred_tool_is_not_in_the_prompt(served: ServedModel):
    only = prompt(served, tools=[SEARCH])
    assert prompt(served) == only
    assert "search" in only
    assert "later" not in only


def test_a_reference_is_told_as_the_template_shows_tools(served: ServedModel):
    chat, _ = PromptRequest.model_validate(
        BASE
        | {"tools": TOOLS}
        | found(
            text("See:"), reference("later"), reference("ping"), text("Done."), reference("ping")
        )
    ).chat()
    lines = [json.dumps(tool, ensure_ascii=False) for tool in (SHOWN, PING)]
    told = "See:\n<tools>\n{}\n{}\n</tools>\nDone.\n[tool ping: shown above]".format(*lines)
    assert chat.messages[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [call("search")]},
        answer("search", told),
    ]
    shown = served.tokenizer.decode(served.chat_prompt([HELLO], tools=[SHOWN, PING]))
    assert "<tools>\n{}\n{}\n</tools>".format(*lines) in shown


def test_what_came_before_a_reference_stays_in_the_cache(served: ServedModel):
    before = ids(served, messages=[HELLO])
    later = ids(served, **found(reference("later")))
    kept = before.index(served.tokenizer.encode("<|assistant|>")[0])
    assert later[:kept] == before[:kept]
    assert "later" not in served.tokenizer.decode(later[:kept])
    assert "later" in served.tokenizer.decode(later[kept:])


def test_tools_that_are_shown_may_be_referred_to(served: ServedModel):
    assert prompt(served, **found(reference("search"))).count('"search"') == 2


def test_a_tool_is_shown_once_in_a_conversation(served: ServedModel):
    again = [reference("later"), reference("ping"), reference("later")]
    once = found(reference("later"))["messages"]
    chat, _ = PromptRequest.model_validate(
        BASE | {"tools": TOOLS, "messages": once + found(*again)["messages"]}
    ).chat()
    first, second = (m["content"] for m in chat.messages if m["role"] == "tool")
    later, ping = (json.dumps(tool, ensure_ascii=False) for tool in (SHOWN, PING))
    assert first == f"<tools>\n{later}\n</tools>"
    named = "[tool later: shown above]"
    assert second == f"<tools>\n{ping}\n</tools>\n{named}\n{named}"
    assert prompt(served, messages=once).count('"later"') == 1


def test_what_is_said_beside_a_tool_that_was_found_begins_no_turn():
    messages: list[Any] = found(reference("later"))["messages"]
    messages[-1]["content"].append(text("Tool loaded."))
    chat, _ = PromptRequest.model_validate(BASE | {"tools": TOOLS, "messages": messages}).chat()
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool"]
    assert chat.messages[-1]["content"].endswith("</tools>\nTool loaded.")
    messages.append(user(text("And now?")))
    chat, _ = PromptRequest.model_validate(BASE | {"tools": TOOLS, "messages": messages}).chat()
    assert chat.messages[-1] == {"role": "user", "content": "And now?"}


REFUSING = ChatTemplate(
    "{% for tool in tools %}{% if tool.function.name == 'bad' %}{{ raise_exception('bad') }}"
    "{% endif %}{% endfor %}{{ messages[0].content }}<tool_call>{{ tools | tojson }}"
)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=8))
def test_any_tools(served: ServedModel, made: list[tuple[bool, bool]]):
    """Whichever are deferred: the others are shown, in order, and errors name the client's."""
    tools = [
        TOOL | {"name": f"tool{i}"} | ({"defer_loading": True} if deferred else {})
        for i, (deferred, _) in enumerate(made)
    ]
    body = PromptRequest.model_validate(BASE | {"tools": tools})
    if all(deferred for deferred, _ in made):
        with pytest.raises(InvalidRequestError, match="all tools have defer_loading"):
            body.chat()
        return
    chat, origins = body.chat()
    shown = [tool for tool, (deferred, _) in zip(tools, made, strict=True) if not deferred]
    assert served.tokenizer.decode(chat.prompt(served)) == prompt(served, tools=shown)
    known = chat.toolset(served)
    assert set(known.schemas or ()) == {tool["name"] for tool in tools}
    assert {tool["function"]["name"] for tool in known.callable} == set(known.schemas or ())
    for i, tool in enumerate(chat.tools or ()):
        assert tools[int(origins[f"tools[{i}]"][6:-1])]["name"] == tool["function"]["name"]


def test_a_tool_that_the_template_refuses_is_named(served: ServedModel):
    tools = [LATER, SEARCH, LATER | {"name": "last"}, TOOL | {"name": "bad"}]
    chat, origins = PromptRequest.model_validate(BASE | {"tools": tools}).chat()
    refusing = replace(served, template=REFUSING, tool_call_parser="glm45")
    refused = pytest.raises(InvalidRequestError, match=r"tools\[3\]: the chat template")
    with refused, in_places(origins):
        chat.prompt(refusing)


def test_a_tool_that_cannot_be_written():
    deep: Any = {}
    for _ in range(5000):
        deep = {"properties": deep}
    tools = [LATER | {"input_schema": deep}, SEARCH]
    body = PromptRequest.model_validate(BASE | {"tools": tools} | found(reference("later")))
    with pytest.raises(InvalidRequestError, match="'later' is nested too deep"):
        body.chat()


# Calls of them


def say(server: Live, words: str) -> None:
    served = server.frontend.served
    server.runner.script = [*served.tokenizer.encode(words), served.eos_token_ids[0]]


def ask(server: Live, **body: Any) -> list[tuple[str, Any]]:
    """The blocks of an answer, which are the same when it is streamed."""
    http = anthropic.DefaultHttpxClient(verify=False)
    options: Any = BASE | {"max_tokens": 200, "tools": TOOLS, "extra_body": {"temperature": 0}}
    options |= body
    with anthropic.Anthropic(
        base_url=server.url, api_key="none", max_retries=0, http_client=http
    ) as client:
        whole = client.beta.messages.create(**options)
        with client.beta.messages.stream(**options) as events:
            streamed = events.get_final_message()
    told = [
        [(block.type, getattr(block, "input", None) or block.text) for block in message.content]
        for message in (whole, streamed)
    ]
    assert told[0] == told[1]
    return told[0]


@pytest.fixture
def scripted(served: ServedModel):
    with live(served) as server:
        yield server


def test_a_call_is_read_by_the_schema(scripted: Live):
    say(scripted, CALLED)
    for body in ({}, found(reference("later"))):
        assert ask(scripted, **body) == [("tool_use", {"day": "3"})]


def test_a_deferred_tool_may_be_chosen_and_strict(scripted: Live):
    say(scripted, "No." + CALLED)
    chosen = ask(scripted, tool_choice={"type": "tool", "name": "later"})
    assert [(kind, set(value)) for kind, value in chosen] == [("tool_use", {"day"})]
    say(scripted, CALLED.replace("day", "week"))
    assert ask(scripted) == [("tool_use", {"week": 3})]
    strict = ask(scripted, tools=[LATER | {"strict": True}, SEARCH])
    assert "week" not in str(strict)


def test_counting(scripted: Live, served: ServedModel):
    body = {"model": served.name, "tools": TOOLS} | found(reference("later"))
    with scripted.http as http:
        counted = http.post(PATHS[1], json=body).json()["input_tokens"]
    chat, _ = PromptRequest.model_validate(body).chat()
    assert counted == len(chat.prompt(served))
