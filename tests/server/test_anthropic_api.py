"""Anthropic's API through Anthropic's own client: what is answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import anthropic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Live, live, logged
from pydantic import BaseModel

from glmjax.server.anthropic import words
from glmjax.server.anthropic.requests import PromptRequest
from glmjax.server.served import ServedModel

HI: list[Any] = [{"role": "user", "content": "hi"}]
THINK: Any = {"type": "enabled", "budget_tokens": 300}
WEATHER = {
    "name": "weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
}
PING = {"name": "ping", "input_schema": {"type": "object", "properties": {}}}
TOOLS: list[Any] = [WEATHER, PING]
# Greedy: where a grammar forbids what the script says, the runner makes noise from the seed.
BODY: Any = {"model": "tiny-glm", "messages": HI, "max_tokens": 400}
DEFAULTS = BODY | {"extra_body": {"temperature": 0}}
BERN = (
    "\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Bern</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
)
PONG = "\n<tool_call>ping\n</tool_call>"
THOUGHT = "\n<think>hm, 🎉</think>"


@pytest.fixture(scope="module")
def scripted(served: ServedModel) -> Iterator[Live]:
    with live(served) as servers:
        yield servers


@pytest.fixture(scope="module")
def client(scripted: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=scripted.url,
        api_key="none",
        max_retries=0,
        http_client=anthropic.DefaultHttpxClient(verify=False),  # no TLS: quick to make
    ) as made:
        yield made


def say(server: Live, text: str) -> None:
    """Every answer is `text` from now on, and ends."""
    served = server.frontend.served
    server.runner.script = [*served.tokenizer.encode(text), served.eos_token_ids[0]]


def ask(client: anthropic.Anthropic, **options: Any) -> Any:
    return client.messages.create(**DEFAULTS | options)


def stream(client: anthropic.Anthropic, **options: Any) -> list[dict[str, Any]]:
    """The events as they are sent; of their order the client sees only a part."""
    with ask(client, stream=True, **options) as events:
        return [event.model_dump(exclude_unset=True) for event in events]


def told(message: Any) -> dict[str, Any]:
    """What a message says, without what is new each time."""
    words = message.model_dump(include={"content", "stop_reason", "stop_sequence", "model", "role"})
    ids = [block.pop("id") for block in words["content"] if block["type"] == "tool_use"]
    assert len(set(ids)) == len(ids)
    assert all(name.startswith("toolu_") for name in ids)
    return words | {"output_tokens": message.usage.output_tokens}


def both(client: anthropic.Anthropic, **options: Any) -> Any:
    """A message, which is the same when it is streamed."""
    whole = ask(client, **options)
    with client.messages.stream(**DEFAULTS | options) as events:
        assert told(events.get_final_message()) == told(whole)
    return whole


def blocks(message: Any) -> list[tuple[str, Any]]:
    fields = {"thinking": "thinking", "text": "text", "tool_use": "input"}
    return [(block.type, getattr(block, fields[block.type])) for block in message.content]


def test_thought_text_and_calls(scripted: Live, client: anthropic.Anthropic):
    say(scripted, THOUGHT + "\nLet me look." + BERN + PONG)
    message = both(client, thinking=THINK, tools=TOOLS)
    assert blocks(message) == [
        ("thinking", "hm, 🎉"),
        ("text", "Let me look."),
        ("tool_use", {"city": "Bern", "days": 3}),
        ("tool_use", {}),
    ]
    assert [block.name for block in message.content[2:]] == ["weather", "ping"]
    assert message.content[0].signature, "clients drop thoughts without one"
    assert (message.stop_reason, message.stop_sequence) == ("tool_use", None)
    assert (message.type, message.role, message.model) == ("message", "assistant", "tiny-glm")
    assert message.id.startswith("msg_")


def test_the_order_of_events(scripted: Live, client: anthropic.Anthropic):
    say(scripted, THOUGHT + "\nLet me look." + BERN + PONG)
    with scripted.http as http:
        body = BODY | {"stream": True, "thinking": THINK, "tools": TOOLS}
        response = http.post("/v1/messages", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *raw, rest = response.text.split("\n\n")
    assert rest == ""
    pairs = [[line.partition(": ") for line in event.split("\n")] for event in raw]
    assert all([name for name, _, _ in pair] == ["event", "data"] for pair in pairs)
    events = [json.loads(pair[1][2]) for pair in pairs]
    assert [event["type"] for event in events] == [pair[0][2] for pair in pairs]

    kinds = [kind for kind, _ in groupby(event["type"] for event in events)]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert kinds == ["message_start", "ping", *block * 4, "message_delta", "message_stop"]
    index = -1
    for event in events[2:-2]:
        index += event["type"] == "content_block_start"
        assert event["index"] == index, "a block ends before the next begins"
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert all(text for delta in deltas for text in delta.values())
    assert [kind for kind, _ in groupby(delta["type"] for delta in deltas)] == [
        "thinking_delta",
        "signature_delta",
        "text_delta",
        "input_json_delta",
    ]
    assert events[-3]["type"] == "content_block_stop"
    starts = [event["content_block"] for event in events if "content_block" in event]
    assert starts[0] == {"type": "thinking", "thinking": "", "signature": ""}
    assert starts[1] == {"type": "text", "text": ""}
    assert starts[2].items() >= {"type": "tool_use", "name": "weather", "input": {}}.items()


def test_usage(scripted: Live, client: anthropic.Anthropic):
    say(scripted, THOUGHT + "\nyes")
    asked: list[Any] = [{"role": "user", "content": "how many tokens, and how many again?"}]
    first, again = (ask(client, messages=asked, thinking=THINK).usage for _ in range(2))
    counted = client.messages.count_tokens(model="tiny-glm", messages=asked, thinking=THINK)
    for usage in (first, again):
        assert usage.input_tokens + usage.cache_read_input_tokens == counted.input_tokens
        assert usage.cache_creation_input_tokens == 0
        assert usage.output_tokens == len(scripted.runner.script or ())
        assert usage.output_tokens_details.thinking_tokens > 0
    assert (first.cache_read_input_tokens, again.cache_read_input_tokens > 0) == (0, True)

    start, *_, delta, _ = stream(client, messages=asked, thinking=THINK)
    begun, ended = start["message"]["usage"], delta["usage"]
    assert (begun["input_tokens"], begun["output_tokens"]) == (counted.input_tokens, 0)
    assert begun["cache_read_input_tokens"] == 0, "it is not known yet"
    assert ended["input_tokens"] == again.input_tokens
    assert ended["output_tokens"] == again.output_tokens
    with client.messages.stream(**DEFAULTS | {"messages": asked, "thinking": THINK}) as events:
        assert events.get_final_message().usage.to_dict() == again.to_dict()
    assert ended["output_tokens_details"]["thinking_tokens"] > 0


@pytest.mark.parametrize(
    ("options", "thought"),
    [
        ({}, None),
        ({"thinking": {"type": "disabled"}}, None),
        ({"thinking": {"type": "between_tools"}}, None),
        ({"thinking": {"type": "adaptive"}}, "hm, 🎉"),
        ({"thinking": {"type": "adaptive", "display": "updates"}}, "hm, 🎉"),
        ({"thinking": THINK}, "hm, 🎉"),
        ({"thinking": THINK | {"display": "omitted"}}, ""),
    ],
)
def test_thinking(scripted: Live, client: anthropic.Anthropic, options: Any, thought: str | None):
    say(scripted, (THOUGHT if thought is not None else "") + "\nyes")
    message = both(client, **options)
    thoughts = [] if thought is None else [("thinking", thought)]
    assert blocks(message) == [*thoughts, ("text", "yes")]
    kinds = [
        event["delta"]["type"]
        for event in stream(client, **options)
        if "index" in event and "delta" in event
    ]
    assert ("thinking_delta" in kinds) == bool(thought), "no empty ones"
    counted = client.messages.count_tokens(model="tiny-glm", messages=HI, **options)
    prompt = scripted.frontend.served.chat_prompt(HI, enable_thinking=thought is not None)
    assert counted.input_tokens == len(prompt)


def test_a_budget_ends_the_thought(scripted: Live, client: anthropic.Anthropic):
    say(scripted, "\n<think>" + "on and " * 50 + "</think>\nyes")
    message = both(client, thinking=THINK | {"budget_tokens": 9})
    assert message.usage.output_tokens_details.thinking_tokens == 9
    assert message.content[0].thinking.startswith("on and")
    assert message.content[1].type == "text"


def test_stop_sequences(scripted: Live, client: anthropic.Anthropic):
    say(scripted, THOUGHT + "\none, two, three")
    message = both(client, thinking=THINK, stop_sequences=["never", ", th", "hm"])
    assert blocks(message)[1] == ("text", "one, two")
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", ", th")


def test_how_an_answer_ends(scripted: Live, client: anthropic.Anthropic):
    say(scripted, "one, two, three")
    assert both(client).stop_reason == "end_turn"
    cut = both(client, max_tokens=2)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 2)
    say(scripted, "")
    empty = both(client)
    assert (empty.content, empty.stop_reason) == ([], "end_turn")


def test_an_answer_ends_with_the_context(scripted: Live, client: anthropic.Anthropic):
    served = scripted.frontend.served
    scripted.runner.script = served.tokenizer.encode("a")
    asked: list[Any] = [{"role": "user", "content": "🎉" * (served.max_seq_len // 4 - 10)}]
    size = client.messages.count_tokens(model="tiny-glm", messages=asked).input_tokens
    room = served.max_seq_len - size
    assert 0 < room < 40, "four tokens each"
    message = both(client, messages=asked, max_tokens=5000)
    assert message.stop_reason == "model_context_window_exceeded"
    assert message.usage.output_tokens == room
    assert both(client, messages=asked, max_tokens=room).stop_reason == "max_tokens"
    asked[0]["content"] += "🎉" * 10
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: .* maximum"):
        ask(client, messages=asked)


def test_arguments_that_are_cut_off(scripted: Live, client: anthropic.Anthropic):
    say(scripted, "Look." + BERN)
    size = len(scripted.runner.script or ())
    seen = set()
    for limit in range(1, size):
        message = both(client, tools=TOOLS, max_tokens=limit)
        assert message.stop_reason == "max_tokens"
        seen |= {json.dumps(block.input) for block in message.content if block.type == "tool_use"}
    assert "{}" in seen
    assert '{"city": "Bern"}' in seen


def test_tools_over_two_turns(scripted: Live, client: anthropic.Anthropic):
    say(scripted, THOUGHT + "\nLet me look." + BERN + PONG)
    first = ask(client, thinking=THINK, tools=TOOLS)
    weather, ping = first.content[2:]
    results = [
        {"type": "tool_result", "tool_use_id": ping.id},
        {
            "type": "tool_result",
            "tool_use_id": weather.id,
            "content": [{"type": "text", "text": "rain"}],
        },
    ]
    history: list[Any] = [
        *HI,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": results},
    ]
    say(scripted, "\nRain.")
    second = both(client, messages=history, thinking=THINK, tools=TOOLS)
    assert (blocks(second), second.stop_reason) == ([("text", "Rain.")], "end_turn")

    calls = [("weather", '{"city": "Bern", "days": 3}'), ("ping", "{}")]
    functions = [{"function": {"name": name, "arguments": words}} for name, words in calls]
    turn = {"role": "assistant", "content": "Let me look.", "reasoning_content": "hm, 🎉"}
    expected = scripted.frontend.served.chat_prompt(
        [
            *HI,
            turn | {"tool_calls": functions},
            {"role": "tool", "content": "rain"},
            {"role": "tool", "content": ""},
        ],
        tools=[
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "description": WEATHER["description"],
                    "parameters": WEATHER["input_schema"],
                },
            },
            {"type": "function", "function": {"name": "ping", "parameters": PING["input_schema"]}},
        ],
    )
    assert second.usage.input_tokens + second.usage.cache_read_input_tokens == len(expected)
    counted = client.messages.count_tokens(
        model="tiny-glm", messages=history, thinking=THINK, tools=TOOLS
    )
    assert counted.input_tokens == len(expected)


def test_which_tools_are_called(scripted: Live, client: anthropic.Anthropic):
    say(scripted, "\nNo.")
    message = both(client, tools=[PING], tool_choice={"type": "any"}, max_tokens=200)
    assert {block.name for block in message.content if block.type == "tool_use"} == {"ping"}
    named = both(client, tools=TOOLS, tool_choice={"type": "tool", "name": "ping"})
    assert [block.name for block in named.content] == ["ping"]
    assert blocks(both(client, tools=TOOLS, tool_choice={"type": "auto"})) == [("text", "No.")]
    say(scripted, BERN + PONG)
    once = {"type": "auto", "disable_parallel_tool_use": True}
    message = both(client, tools=TOOLS, tool_choice=once)
    assert blocks(message) == [("tool_use", {"city": "Bern", "days": 3})]
    assert message.stop_reason == "tool_use"
    none = both(client, tools=TOOLS, tool_choice={"type": "none"}, max_tokens=40)
    assert {kind for kind, _ in blocks(none)} <= {"text"}


def test_an_answer_is_gone_on_with(scripted: Live, client: anthropic.Anthropic):
    say(scripted, " blue")
    history: list[Any] = [*HI, {"role": "assistant", "content": "The sky is"}]
    message = both(client, messages=history)
    assert blocks(message) == [("text", " blue")]
    prompt = scripted.frontend.served.chat_prompt(
        history, continue_final_message=True, enable_thinking=False
    )
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == len(prompt)


class Place(BaseModel):
    """What `parse` makes of an answer."""

    city: str


def test_answers_of_a_schema(scripted: Live, client: anthropic.Anthropic):
    say(scripted, THOUGHT + '{"city": "Bern"}')
    options: Any = DEFAULTS | {"thinking": THINK, "output_format": Place}
    parsed = client.messages.parse(**options)
    assert parsed.parsed_output == Place(city="Bern")
    with client.messages.stream(**options) as events:
        final = events.get_final_message()
    assert final.parsed_output == Place(city="Bern")
    say(scripted, "no")
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    schema["additionalProperties"] = False
    told: Any = {"effort": "high", "format": {"type": "json_schema", "schema": schema}}
    message = ask(client, output_config=told)
    assert message.stop_reason == "max_tokens" or set(json.loads(blocks(message)[0][1])) == {"on"}
    assert blocks(message)[0][1].lstrip().startswith("{"), "the script would say no"


def test_beta_clients(scripted: Live, client: anthropic.Anthropic):
    say(scripted, THOUGHT + "\nyes")
    edits: Any = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    options: dict[str, Any] = {"messages": HI, "model": "tiny-glm", "context_management": edits}
    betas = ["context-management-2025-06-27", "interleaved-thinking-2025-05-14"]
    message = client.beta.messages.create(**options, max_tokens=400, thinking=THINK, betas=betas)
    assert [block.type for block in message.content] == ["thinking", "text"]
    with client.beta.messages.stream(**options, max_tokens=400, thinking=THINK) as events:
        assert "".join(events.text_stream) == "yes"
    assert client.beta.messages.count_tokens(**options, betas=betas).input_tokens > 0


def test_a_tool_runner(scripted: Live, client: anthropic.Anthropic):
    say(scripted, THOUGHT + "\nLet me look." + BERN)
    asked = []

    @anthropic.beta_tool
    def weather(city: str, days: int) -> str:
        """The weather of a city."""
        asked.append((city, days))
        return "rain"

    turns = client.beta.messages.tool_runner(
        **BODY, tools=[weather], thinking=THINK, max_iterations=3
    )
    assert [turn.stop_reason for turn in turns] == ["tool_use"] * 3
    assert asked[:2] == [("Bern", 3)] * 2


def sent(server: Live, **options: Any) -> list[str]:
    """Types of a stream's events, those too that the client does not show."""
    with server.http as http:
        told = http.post("/v1/messages", json=BODY | {"stream": True} | options).text
    return [line.partition(" ")[2] for line in told.split("\n") if line.startswith("event: ")]


def test_thoughts_that_are_not_shown_are_not_silent(
    scripted: Live, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(words, "PING_S", 0.01)
    monkeypatch.setattr(scripted.runner, "step_s", 0.01)
    say(scripted, "\n<think>" + "on and " * 50 + "</think>\nyes")
    *_, last = told = sent(scripted, thinking=THINK | {"display": "omitted"})
    thought = told[told.index("content_block_start") : told.index("content_block_stop")]
    assert thought.count("ping") > 2
    assert last == "message_stop"


def test_thoughts_that_are_not_shown_come_back(scripted: Live, client: anthropic.Anthropic):
    """The next prompt of a loop of tools begins with all that the model has said."""
    say(scripted, THOUGHT + BERN)
    served = scripted.frontend.served
    told: list[list[int]] = []
    for display in ("omitted", "summarized"):
        options: Any = {"thinking": THINK | {"display": display}, "tools": TOOLS}
        message = both(client, **options)
        (kind, words), (_, called) = blocks(message)
        assert (kind, bool(words)) == ("thinking", display == "summarized")
        assert message.content[0].signature == ("glmjax" if words else "thought:hm, 🎉")
        assert called
        *_, use = back = [block.to_dict() for block in message.content]
        result = {"type": "tool_result", "tool_use_id": use["id"], "content": "4"}
        messages = [*HI, {"role": "assistant", "content": back}]
        messages.append({"role": "user", "content": [result]})
        body = {"model": "tiny-glm", "messages": messages} | options
        chat, _ = PromptRequest.model_validate(body).chat()
        told.append(chat.prompt(served))
    assert told[0] == told[1]
    assert "hm, 🎉" in served.tokenizer.decode(told[0])


def test_one_that_waits_is_told_so(scripted: Live, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(words, "PING_S", 0.01)
    monkeypatch.setattr(scripted.runner, "step_s", 0.2)
    say(scripted, "yes")
    told = sent(scripted)
    assert told[:2] == ["message_start", "ping"]
    assert told[: told.index("content_block_start")].count("ping") > 2


def test_the_id_of_an_answer_is_in_the_log(
    scripted: Live, client: anthropic.Anthropic, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "glmjax")
    say(scripted, "yes")
    for streams in (False, True):
        raw = client.messages.with_raw_response.create(**DEFAULTS, stream=streams)
        found = raw.headers["request-id"]
        assert found in raw.text()
        logged(caplog, found)


def test_many_at_once(scripted: Live):
    say(scripted, THOUGHT + "\nLet me look." + BERN)

    async def main() -> list[Any]:
        http = anthropic.DefaultAsyncHttpxClient(verify=False)
        async with anthropic.AsyncAnthropic(
            base_url=scripted.url, api_key="x", max_retries=0, http_client=http
        ) as client:

            async def one(i: int) -> Any:
                messages: list[Any] = [{"role": "user", "content": f"number {i}"}]
                options: dict[str, Any] = {"model": "tiny-glm", "messages": messages}
                options |= {"max_tokens": 400, "thinking": THINK, "tools": TOOLS}
                if i % 2:
                    return await client.messages.create(**options)
                async with client.messages.stream(**options) as events:
                    return await events.get_final_message()

            return await asyncio.gather(*map(one, range(12)))

    first, *others = map(told, asyncio.run(main()))
    assert [block["type"] for block in first["content"]] == ["thinking", "text", "tool_use"]
    assert all(other == first for other in others)


SAYINGS = st.lists(
    st.sampled_from(
        (
            *("\n<think>", "<think>", "</think>", "\n", " a", "é🎉"),
            *("<tool_call>", "ping", "</tool_call>", PONG, BERN),
            *("<arg_key>", "days", "</arg_key>", "<arg_value>", "3", "</arg_value>"),
            *("1e999", '{"a": NaN}', "\\ud800", "9" * 400),
        )
    ),
    max_size=9,
)


@settings(max_examples=60, deadline=None)
@given(said=SAYINGS, thinks=st.booleans(), stops=st.sampled_from([[], ["a"], ["\n"]]))
def test_whatever_is_said_is_streamed_the_same(
    scripted: Live, client: anthropic.Anthropic, said: list[str], thinks: bool, stops: list[str]
):
    say(scripted, "".join(said))
    thinking = {"type": "adaptive" if thinks else "disabled"}
    message = both(client, thinking=thinking, tools=TOOLS, stop_sequences=stops, max_tokens=60)
    called = any(block.type == "tool_use" for block in message.content)
    assert called or message.stop_reason != "tool_use"
    assert (message.stop_reason == "stop_sequence") == (message.stop_sequence is not None)
