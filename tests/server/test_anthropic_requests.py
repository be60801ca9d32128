"""Anthropic's API: what a request means."""

from __future__ import annotations

from typing import Any

import pytest
from anthropic_bodies import (
    BASE,
    CACHED,
    HELLO,
    HI,
    IMAGE,
    PATHS,
    PDF,
    PROMPT,
    TOOL,
    UNREAD,
    UNSEEN,
    answer,
    assistant,
    call,
    document,
    result,
    text,
    thought,
    use,
    user,
)
from live import Live, oracle

from glmjax.errors import InvalidRequestError
from glmjax.server.anthropic.messages import in_places
from glmjax.server.anthropic.requests import MessagesRequest, PromptRequest
from glmjax.server.served import ServedModel

NOTE = "<system-reminder>"
FOUND = {"type": "search_result", "source": "http://x", "title": "X"}
FOUND |= {"content": [text("one"), text("two")], "citations": {"enabled": True}}
FOUND_TEXT = "<search_result>\nX\nhttp://x\none\ntwo\n</search_result>"
CONVERSATIONS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "text": ({}, [HELLO]),
    "blocks": (
        {"messages": [user(text("one", **CACHED), text("two", citations=None))]},
        [{"role": "user", "content": "one\ntwo"}],
    ),
    "system": ({"system": "Be brief."}, [{"role": "system", "content": "Be brief."}, HELLO]),
    "system blocks": (
        {"system": [text("x-anthropic-billing-header: cch=1;"), text("A", **CACHED), text("B")]},
        [{"role": "system", "content": "A\nB"}, HELLO],
    ),
    "an empty system prompt": ({"system": ""}, [HELLO]),
    "a system prompt of no blocks": ({"system": []}, [HELLO]),
    "a system prompt for who bills": (
        {"system": [text("x-anthropic-billing-header: cch=1;")]},
        [HELLO],
    ),
    "system in the middle": (
        {"messages": [HELLO, {"role": "system", "content": "Stop."}, HELLO]},
        [HELLO, {"role": "system", "content": "Stop."}, HELLO],
    ),
    "users in a row": ({"messages": [HELLO, user(text("b"))]}, [HELLO, HELLO | {"content": "b"}]),
    "an assistant's turn": (
        {
            "messages": [
                HELLO,
                assistant(
                    thought("I think"),
                    {"type": "redacted_thinking", "data": "xyz"},
                    text("See: ", citations=[{"type": "char_location"}]),
                    text("this", **CACHED),
                ),
                HELLO,
            ]
        },
        [
            HELLO,
            {"role": "assistant", "content": "See: this", "reasoning_content": "I think"},
            HELLO,
        ],
    ),
    "texts around a call": (
        {
            "messages": [
                HELLO,
                assistant(text(""), thought("hm"), text("Lo"), text("ok"), use("f"), text("and")),
                user(result("f", "4")),
            ]
        },
        [
            HELLO,
            {
                "role": "assistant",
                "content": "Look\nand",
                "reasoning_content": "hm",
                "tool_calls": [call("f")],
            },
            answer("f", "4"),
        ],
    ),
    "a turn in several messages": (
        {
            "messages": [
                HELLO,
                assistant(thought("I think")),
                {"role": "assistant", "content": "Look."},
                assistant(use("f", a=1) | {"caller": {"type": "direct"}} | CACHED),
                user(result("f", "4")),
            ]
        },
        [
            HELLO,
            {
                "role": "assistant",
                "content": "Look.",
                "reasoning_content": "I think",
                "tool_calls": [call("f", a=1)],
            },
            answer("f", "4"),
        ],
    ),
    "results": (
        {
            "messages": [
                HELLO,
                assistant(use("f"), use("g", x=[1, {"y": None}]), use("h"), use("i")),
                user(
                    text("first"),
                    result("i", is_error=True),
                    result("h", [text("3"), text("4", **CACHED)], is_error=False, **CACHED),
                    result("f"),
                    text("last"),
                ),
                user(result("g", "no such file", is_error=True), text("next")),
            ]
        },
        [
            HELLO,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [call("f"), call("g", x=[1, {"y": None}]), call("h"), call("i")],
            },
            answer("f", ""),
            answer("g", "Error: no such file"),
            answer("h", "3\n4"),
            answer("i", "Error: "),
            {"role": "user", "content": "first\nlast"},
            {"role": "user", "content": "next"},
        ],
    ),
    "reminders beside results": (
        {
            "messages": [
                HELLO,
                assistant(use("f"), use("g"), use("h")),
                user(
                    result("g"),
                    text(f"{NOTE}one"),
                    text("What now?"),
                    result("f", "4", is_error=True),
                    text(f"{NOTE}two"),
                ),
                user(text(f"{NOTE}three"), result("h", "5")),
                user(text(f"\n{NOTE}alone")),
            ]
        },
        [
            HELLO,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [call("f"), call("g"), call("h")],
            },
            answer("f", "Error: 4"),
            answer("g", f"\n{NOTE}one\n{NOTE}two"),
            answer("h", f"5\n{NOTE}three\n\n{NOTE}alone"),
            {"role": "user", "content": "What now?"},
        ],
    ),
    "reminders where nothing was answered": (
        {"messages": [user(text(f"{NOTE}one"), text("")), user(text(f"{NOTE}two"))]},
        [
            {"role": "user", "content": f"{NOTE}one\n"},
            {"role": "user", "content": f"{NOTE}two"},
        ],
    ),
    "blank texts beside results": (
        {
            "messages": [
                HELLO,
                assistant(use("f")),
                user(text(""), result("f", "4"), text("\n ")),
                user(text(" ")),
            ]
        },
        [
            HELLO,
            {"role": "assistant", "content": "", "tool_calls": [call("f")]},
            answer("f", "4"),
        ],
    ),
    "a file behind a result": (
        {
            "messages": [
                HELLO,
                assistant(use("f")),
                user(result("f", "read")),
                user({"type": "document", "source": PDF}),
            ]
        },
        [
            HELLO,
            {"role": "assistant", "content": "", "tool_calls": [call("f")]},
            answer("f", f"read\n{UNREAD}"),
        ],
    ),
    "thoughts that were not shown": (
        {
            "messages": [
                HELLO,
                assistant(
                    thought("") | {"signature": "thought:I see"},
                    thought("shown") | {"signature": "thought:not this"},
                    thought(""),
                    thought("") | {"signature": None},
                    use("f"),
                ),
                user(result("f", "4")),
            ]
        },
        [
            HELLO,
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "I see\nshown\n\n",
                "tool_calls": [call("f")],
            },
            answer("f", "4"),
        ],
    ),
    "results that cannot be read": (
        {
            "messages": [
                HELLO,
                assistant(use("f")),
                user(result("f", [IMAGE | CACHED, text("a"), {"type": "document", "source": PDF}])),
            ]
        },
        [
            HELLO,
            {"role": "assistant", "content": "", "tool_calls": [call("f")]},
            answer("f", f"{UNSEEN}\na\n{UNREAD}"),
        ],
    ),
    "results in files": (
        {
            "messages": [
                HELLO,
                assistant(use("f")),
                user(result("f", [document("b", title="a"), FOUND], is_error=True)),
            ]
        },
        [
            HELLO,
            {"role": "assistant", "content": "", "tool_calls": [call("f")]},
            answer("f", f"Error: <document>\na\nb\n</document>\n{FOUND_TEXT}"),
        ],
    ),
    "files": (
        {
            "messages": [
                user(
                    text("Compare"),
                    document("b", title="a.txt", context="old", citations={"enabled": True}),
                    document("c", title=None, **CACHED),
                    {
                        "type": "document",
                        "source": {"type": "content", "content": [text("d"), IMAGE, text("e")]},
                    },
                    {"type": "document", "source": {"type": "content", "content": "f"}},
                ),
                user(FOUND | CACHED),
            ]
        },
        [
            {
                "role": "user",
                "content": "Compare\n<document>\na.txt\nold\nb\n</document>\n"
                f"<document>\nc\n</document>\n<document>\nd\n{UNSEEN}\ne\n</document>\n"
                "<document>\nf\n</document>",
            },
            {"role": "user", "content": FOUND_TEXT},
        ],
    ),
    "files that cannot be read": (
        {
            "messages": [
                user(
                    IMAGE | CACHED | {"more": 1},
                    {"type": "document", "source": PDF, "context": "old"} | CACHED,
                    {"type": "document", "source": {"type": "url", "url": "x"}, "title": "a.pdf"},
                    {"type": "document", "source": {"type": "file", "file_id": "x"}},
                    text("See?"),
                )
            ]
        },
        [
            {
                "role": "user",
                "content": f"{UNSEEN}\n{UNREAD}\n"
                f"[document 'a.pdf' not shown: this model reads text only]\n{UNREAD}\nSee?",
            }
        ],
    ),
    "files beside results": (
        {
            "messages": [
                HELLO,
                assistant(use("f"), use("g")),
                user(result("g", "read"), {"type": "document", "source": PDF}, text(f"{NOTE}one")),
                user(result("f", "4"), text("See?"), IMAGE, text(f"{NOTE}two")),
            ]
        },
        [
            HELLO,
            {"role": "assistant", "content": "", "tool_calls": [call("f"), call("g")]},
            answer("f", f"4\n{NOTE}two"),
            answer("g", f"read\n{NOTE}one"),
            {"role": "user", "content": UNREAD},
            {"role": "user", "content": f"See?\n{UNSEEN}"},
        ],
    ),
    "an empty beginning of the answer": ({"messages": [HELLO, assistant()]}, [HELLO]),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(name: str):
    body, expected = CONVERSATIONS[name]
    chat, _ = PromptRequest.model_validate(BASE | body).chat()
    assert chat.messages == expected


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_prompt_is_that_of_the_same_chat(served: ServedModel, name: str):
    body, expected = CONVERSATIONS[name]
    for asked, thinks in (({"thinking": {"type": "adaptive"}}, True), ({}, False)):
        chat, _ = PromptRequest.model_validate(BASE | body | asked).chat()
        assert chat.prompt(served) == served.chat_prompt(expected, enable_thinking=thinks)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("messages[2] has messages[2], function.name", "system has messages[2], function.name"),
        ("messages[1].tool_calls[0].function.name is stop", "messages[0].content[3].name is stop"),
        ("messages[9].tool_calls[0].function.arguments x", "messages[9].tool_calls[0].input x"),
        ("tools[0].function.parameters is tools[1]", "tools[0].input_schema is tools[1]"),
        ("tools has function.name more than once", "tools has function.name more than once"),
        ("messages holds messages[2]", "messages holds messages[2]"),
    ],
)
def test_errors_name_the_clients_places(words: str, expected: str):
    origins = {"messages[2]": "system", "messages[1].tool_calls[0]": "messages[0].content[3]"}
    with pytest.raises(InvalidRequestError) as found, in_places(origins):
        raise InvalidRequestError(words, words.split("[")[0].split()[0])
    assert str(found.value) == expected


def test_the_model_is_asked_just_that(server: Live):
    served = server.frontend.served
    body = BASE | {"max_tokens": 24, "temperature": 0, "system": [text("Be brief.")]}
    prompt = [{"role": "system", "content": "Be brief."}, *HI]
    ids = oracle(served.chat_prompt(prompt, enable_thinking=False), 24, ends=served.eos_token_ids)
    with server.http as client:
        message = client.post(PATHS[0], json=body).json()
    said = "".join(block["text"] for block in message["content"])
    end = len(ids) - (ids[-1] in served.eos_token_ids)
    assert said.strip() == served.tokenizer.decode(ids[:end]).strip() != ""
    assert message["usage"]["output_tokens"] == len(ids)


def test_sampling(server: Live):
    asked = {"temperature": 0.5, "top_p": 0.9, "top_k": 7}
    with server.http as client:
        assert client.post(PATHS[0], json=BASE | asked | {"max_tokens": 3}).status_code == 200
    sampling = server.runner.asked[-1]
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert sampling.max_new_tokens == 3


def test_tools():
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    full = {
        "type": "custom",
        "name": "f",
        "description": "does it",
        "input_schema": schema,
        "strict": True,
        "input_examples": [{"a": "x"}],
        "allowed_callers": ["direct"],
        "defer_loading": False,
        "eager_input_streaming": True,
    }
    chat, _ = MessagesRequest.model_validate(BASE | {"tools": [full | CACHED, TOOL]}).chat()
    parameters = schema | {"examples": [{"a": "x"}]}
    function = {"name": "f", "description": "does it", "parameters": parameters, "strict": True}
    plain = {"name": "ping", "parameters": TOOL["input_schema"]}
    assert chat.tools == [
        {"type": "function", "function": function},
        {"type": "function", "function": plain},
    ]


@pytest.mark.parametrize(
    ("asked", "choice", "parallel"),
    [
        ({"type": "auto"}, "auto", None),
        ({"type": "any", "disable_parallel_tool_use": False}, "required", None),
        ({"type": "none"}, "none", None),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}, None),
    ],
)
def test_tool_choice(asked: dict, choice: Any, parallel: bool | None):
    chat, _ = PromptRequest.model_validate(BASE | {"tool_choice": asked}).chat()
    assert (chat.tool_choice, chat.parallel_tool_calls) == (choice, parallel)


@pytest.mark.parametrize(
    ("keep", "clear"),
    [
        ("all", False),
        ({"type": "all"}, False),
        ({"type": "thinking_turns", "value": 3}, False),
        ({"type": "thinking_turns", "value": 1}, None),
        (None, None),
    ],
)
def test_how_long_thoughts_are_kept(keep: Any, clear: bool | None):
    edits = {"edits": [{"type": "clear_thinking_20251015", "keep": keep}]}
    chat, _ = PromptRequest.model_validate(BASE | {"context_management": edits}).chat()
    assert chat.template_variables().get("clear_thinking") is clear


def test_what_the_template_reads():
    asked = {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}
    chat, _ = PromptRequest.model_validate(BASE | asked).chat()
    assert chat.template_variables() == {"enable_thinking": True, "reasoning_effort": "low"}


@pytest.mark.parametrize("path", PATHS)
def test_what_changes_nothing_is_accepted(server: Live, path: str):
    neutral = {
        "metadata": {"user_id": "x"},
        "service_tier": "auto",
        "cache_control": {"type": "ephemeral"},
        "speed": "standard",
        "mcp_servers": [],
        "fallback_credit_token": None,
        "container": None,
        "system": None,
        "tools": [],
        "diagnostics": {"previous_message_id": None},
        "context_management": {"edits": []},
    }
    with server.http as client:
        body = PROMPT | neutral | ({} if "count" in path else {"max_tokens": 8})
        assert client.post(f"{path}?beta=true", json=body).status_code == 200
