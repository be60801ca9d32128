"""Anthropic's API: old results of tools that are left out of a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import anthropic
import pytest
from anthropic_bodies import (
    BASE,
    HELLO,
    PATHS,
    PROMPT,
    TOOL,
    assistant,
    reference,
    result,
    text,
    use,
    user,
)
from hypothesis import given
from hypothesis import strategies as st
from live import Live, live

from glmjax.server.anthropic.edits import CLEARED, cleared
from glmjax.server.anthropic.requests import PromptRequest
from glmjax.server.served import ServedModel

KIND = "clear_tool_uses_20250919"
LONG = "a long result. " * 9
DUE = {"type": "tool_uses", "value": 0}
READ: list[Any] = [{"role": "assistant", "content": "I see."}, HELLO]
TOOLS = [TOOL | {"name": name} for name in ("f", "g")]


def turns(*names: str, words: Any = LONG) -> list[Any]:
    """A conversation in which tools were used one after another, with ids that come again.

    The model has read all results.
    """
    pairs = [(assistant(use(name, a="x")), user(result(name, words))) for name in names]
    return [HELLO, *(message for pair in pairs for message in pair), *READ]


def number(n: int) -> dict[str, Any]:
    return {"type": "input_tokens", "value": n}


def kept(n: int) -> dict[str, Any]:
    return {"keep": {"type": "tool_uses", "value": n}}


def parsed(messages: list[Any], **edit: Any) -> tuple[PromptRequest, Any]:
    management = {"edits": [{"type": KIND} | edit]}
    body = PromptRequest.model_validate(
        PROMPT | {"messages": messages, "context_management": management, "tools": TOOLS}
    )
    assert body.context_management
    return body, body.context_management.clear_tool_uses[0]


def after(messages: list[Any], **edit: Any) -> tuple[list[Any], int]:
    """The results that are left, in words, and how many are said to have been cleared."""
    body, asked = parsed(messages, **edit)
    made, count = cleared(body.messages, asked, len)
    chat, _ = body.with_messages(made).chat()
    return [m["content"] for m in chat.messages if m["role"] == "tool"], count


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ({}, ["", "", *[LONG] * 3]),
        (kept(1), ["", "", "", "", LONG]),
        (kept(0), [""] * 5),
        (kept(5), [LONG] * 5),
        (kept(9), [LONG] * 5),
        (kept(1) | {"exclude_tools": ["g", "h"]}, ["", LONG, "", LONG, LONG]),
        (kept(1) | {"exclude_tools": ["f", "g"]}, [LONG] * 5),
    ],
)
def test_which_results_are_left_out(edit: Any, expected: list[str]):
    results, count = after(turns("f", "g", "f", "g", "f"), **edit)
    assert results == [text or CLEARED for text in expected]
    assert count == expected.count("")


def test_results_of_one_turn_are_told_apart():
    results = user(result("g", LONG + "2"), result("f", LONG + "1"))
    messages = [HELLO, assistant(use("f"), use("g")), results, *READ]
    assert after(messages, **kept(1)) == ([CLEARED, LONG + "2"], 1)


@pytest.mark.parametrize("begun", [[], [assistant(text("So"))]])
def test_what_the_model_has_not_read_stays(begun: list[Any]):
    uses = [use(name, a="x") for name in ("f", "g", "h")]
    fresh = [assistant(*uses), user(*(result(name, LONG) for name in ("h", "f"))), HELLO]
    messages = turns("f", "g") + fresh + [user(result("g", LONG))] + begun
    everything = kept(0) | {"clear_tool_inputs": True}
    assert after(messages, **everything) == ([CLEARED] * 2 + [LONG] * 3, 2)
    body, edit = parsed(messages, **everything)
    chat, _ = body.with_messages(cleared(body.messages, edit, len)[0]).chat()
    calls = [call["function"] for m in chat.messages for call in m.get("tool_calls", ())]
    assert [bool(call["arguments"]) for call in calls] == [False] * 2 + [True] * 3


def test_what_would_become_longer_is_passed_over():
    messages = turns("f", words="4")[:-2] + turns("g")
    assert after(messages, **kept(0)) == (["4", CLEARED], 1)


@given(
    st.lists(st.integers(0, 200), max_size=12),
    st.integers(0, 500),
    st.integers(0, 3),
    st.booleans(),
)
def test_results_are_left_out_in_whole_batches(
    lengths: list[int], least: int, keep: int, inputs: bool
):
    """As a conversation goes on, what was left out stays so, and enough more at a time is."""
    edit = kept(keep) | {"clear_at_least": number(least), "clear_tool_inputs": inputs}
    sizes: list[int] = []
    before: list[str] = []
    for n in range(len(lengths) + 1):
        some = [turns("f", words="x" * length)[1:-2] for length in lengths[:n]]
        messages = [HELLO, *(message for turn in some for message in turn), *READ]
        results, _ = after(messages, **edit)
        gone = [i for i, text in enumerate(before) if text == CLEARED]
        assert all(results[i] == CLEARED for i in gone)
        body, asked = parsed(messages, **edit)
        made, _ = cleared(body.messages, asked, len)
        sizes.append(written(body.messages) - written(made))
        before = results
    assert all(now == then or now - then >= max(1, least) for then, now in pairwise(sizes))
    assert sizes[-1] <= sum(max(0, length - len(CLEARED)) + 8 for length in lengths)


def written(messages: Any) -> int:
    """Characters of all results and inputs."""
    blocks = [it for m in messages if isinstance(m.content, list) for it in m.content]
    uses = [json.dumps(it.input) for it in blocks if it.type == "tool_use"]
    return len("".join([*uses, *(it.content for it in blocks if it.type == "tool_result")]))


def test_batches_follow_the_order_of_use():
    """Whichever of several calls are kept, and in whatever order they and their results come."""
    long = "x" * 100
    uses = assistant(use("f", a=long), use("g", a=long))
    one = [uses, user(result("g", "x" * len(CLEARED)), result("f", long))]
    least = number(150)
    edit = kept(1) | {"clear_tool_inputs": True, "clear_at_least": least}
    for more in ([], turns("f")[1:-2]):
        results, _ = after([HELLO, *one, *more, *READ], **edit)
        assert results[0] == CLEARED


def test_a_batch_that_is_not_full_stays():
    least = {"clear_at_least": number(2 * (len(LONG) - len(CLEARED)))}
    for n, gone in ((1, 0), (2, 2), (3, 2), (4, 4), (5, 4)):
        results, count = after(turns(*"f" * n), **kept(0), **least)
        assert results == [CLEARED] * gone + [LONG] * (n - gone)
        assert count == gone


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (None, [True, True]),
        (False, [True, True]),
        (True, [False, False]),
        (["g"], [True, False]),
    ],
)
def test_what_tools_were_called_with(inputs: Any, expected: list[bool]):
    body, edit = parsed(turns("f", "g", "f"), **kept(1), clear_tool_inputs=inputs)
    chat, _ = body.with_messages(cleared(body.messages, edit, len)[0]).chat()
    calls = [m["tool_calls"][0]["function"] for m in chat.messages if "tool_calls" in m]
    assert [bool(call["arguments"]) for call in calls] == [*expected, True]
    assert [call["name"] for call in calls] == ["f", "g", "f"]


def test_tools_that_were_found_are_not_forgotten():
    messages = turns("f", "f", words=[reference("g")])
    results, count = after(messages, **kept(0))
    assert count == 0
    assert '"g"' in results[0]
    assert results[1] == "[tool g: shown above]"


@given(
    st.lists(st.sampled_from("fgh"), max_size=9),
    st.integers(0, 10),
    st.sets(st.sampled_from("fgh")),
)
def test_any_conversation(names: list[str], keep: int, spared: set[str]):
    results, count = after(turns(*names), **kept(keep), exclude_tools=sorted(spared))
    old = names[: max(0, len(names) - keep)]
    gone = [i for i, name in enumerate(old) if name not in spared]
    assert [i for i, text in enumerate(results) if text == CLEARED] == gone
    assert count == len(gone)
    assert {text for i, text in enumerate(results) if i not in gone} <= {LONG}


# What is answered


@pytest.fixture(scope="module")
def scripted(served: ServedModel) -> Iterator[Live]:
    script = [*served.tokenizer.encode("yes"), served.eos_token_ids[0]]
    with live(served, script=script) as server:
        yield server


@pytest.fixture(scope="module")
def client(scripted: Live) -> Iterator[anthropic.Anthropic]:
    http = anthropic.DefaultHttpxClient(verify=False)
    with anthropic.Anthropic(
        base_url=scripted.url, api_key="none", max_retries=0, http_client=http
    ) as made:
        yield made


def sizes(client: anthropic.Anthropic, messages: list[Any], *edits: Any) -> tuple[int, int | None]:
    """Tokens of a prompt, and what it had before edits."""
    options: Any = {"context_management": {"edits": [*edits]}} if edits else {}
    count = client.beta.messages.count_tokens(model="tiny-glm", messages=messages, **options)
    management = count.context_management
    return count.input_tokens, management and management.original_input_tokens


def applied(client: anthropic.Anthropic, messages: list[Any], *edits: Any) -> Any:
    """The edits that an answer tells of, which it also does when it is streamed."""
    options: Any = BASE | {"messages": messages, "context_management": {"edits": [*edits]}}
    whole = client.beta.messages.create(**options)
    with client.beta.messages.stream(**options) as events:
        streamed = events.get_final_message()
    told = [
        message.context_management and message.context_management.to_dict()["applied_edits"]
        for message in (whole, streamed)
    ]
    assert told[0] == told[1]
    used = whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    assert used == sizes(client, messages, *edits)[0]
    return told[0]


def test_answers_tell_of_it(client: anthropic.Anthropic):
    messages = turns("f", "g", "f")
    edit = {"type": KIND, "trigger": DUE} | kept(1)
    shorter = turns("f", "g", words=CLEARED)[:-2] + turns("f")[1:]
    size, original = sizes(client, messages, edit)
    assert (size, original) == (sizes(client, shorter)[0], sizes(client, messages)[0])
    freed = (original or 0) - size
    told = {"type": KIND, "cleared_tool_uses": 2, "cleared_input_tokens": freed}
    assert freed > 0
    assert applied(client, messages, edit) == [told]
    rest = edit | kept(0)
    more = size - sizes(client, messages, edit, rest)[0]
    last = {"type": KIND, "cleared_tool_uses": 1, "cleared_input_tokens": more}
    assert applied(client, messages, edit, rest) == [told, last]


def test_when_it_is_due(client: anthropic.Anthropic):
    messages, edit = turns("f", "g", "f"), {"type": KIND} | kept(1)
    size, _ = sizes(client, messages)
    freed = size - sizes(client, messages, edit | {"trigger": DUE})[0]
    for trigger, least, due in (
        (None, None, False),  # far from 100,000 tokens
        (("tool_uses", 3), None, False),
        (("tool_uses", 2), None, True),
        (("input_tokens", size), None, False),
        (("input_tokens", size - 1), None, True),
        (("tool_uses", 2), freed, True),
        (("tool_uses", 2), freed + 1, False),
    ):
        more: dict[str, Any] = {}
        if trigger:
            more["trigger"] = {"type": trigger[0], "value": trigger[1]}
        if least:
            more["clear_at_least"] = {"type": "input_tokens", "value": least}
        assert bool(applied(client, messages, edit | more)) == due, (trigger, least)
        expected = (size - freed if due else size, size)
        assert sizes(client, messages, edit | more) == expected


def test_what_would_become_longer_stays(client: anthropic.Anthropic):
    edit = {"type": KIND, "trigger": DUE} | kept(0)
    assert applied(client, turns("f", words="4"), edit) == []
    assert applied(client, turns("f"), edit | {"exclude_tools": ["f"]}) == []
    assert applied(client, [HELLO], edit) == []


def test_who_asks_for_nothing_is_told_nothing(client: anthropic.Anthropic):
    thinking = {"type": "clear_thinking_20251015", "keep": "all"}
    assert applied(client, turns("f"), thinking) is None
    assert sizes(client, turns("f"), thinking)[1] is None
    assert applied(client, turns("f"), thinking, {"type": KIND}) == []


def test_a_conversation_beyond_the_context_is_cut_to_fit(
    scripted: Live, client: anthropic.Anthropic
):
    words = "🎉" * (scripted.frontend.served.max_seq_len // 6)
    messages = turns("f", "g", "f", words=words)
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(**BASE | {"messages": messages})
    edit = {"type": KIND, "trigger": DUE} | kept(1)
    assert applied(client, messages, edit)[0]["cleared_tool_uses"] == 2


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"keep": {"type": "tool_uses", "value": -1}}, "keep.value: "),
        ({"keep": {"type": "input_tokens", "value": 1}}, "keep.type: should be 'tool_uses'"),
        ({"trigger": {"type": "tool_uses"}}, "trigger.value: Field required"),
        ({"exclude": ["f"]}, "exclude: Extra"),
        ({"clear_tool_inputs": 5}, "clear_tool_inputs"),
    ],
)
def test_bad_edits(scripted: Live, edit: Any, words: str):
    management = {"context_management": {"edits": [{"type": KIND} | edit]}}
    with scripted.http as http:
        response = http.post(PATHS[0], json=BASE | management)
    assert response.status_code == 400
    assert f"context_management.edits[0].{words}" in response.json()["error"]["message"]


def test_errors_name_the_clients_places(scripted: Live):
    management = {"edits": [{"type": KIND, "trigger": DUE} | kept(0)]}
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]
    messages = [HELLO, assistant(use("f", a=deep)), user(result("f", LONG))]
    body = BASE | {"system": "x", "messages": messages, "context_management": management}
    with scripted.http as http:
        for path in PATHS:
            asked = {name: value for name, value in body.items() if name != "max_tokens"}
            response = http.post(path, json=asked if "count" in path else body)
            assert response.status_code == 400
            told = response.json()["error"]["message"]
            assert told.startswith("messages[1].content[0].input is nested")
