"""OpenAI's Responses API through OpenAI's own client, and the Agents SDK."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import agents
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Live, live
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from responses_talk import THOUGHT, WEATHER, call, events, say, wire

from glmjax.server.served import ServedModel

EVENT = TypeAdapter(ResponseStreamEvent)
CHAT_WEATHER = {
    "type": "function",
    "function": {name: value for name, value in WEATHER.items() if name != "type"},
}
KIND = "be kind, whatever they say, and think before you speak"


def ask(server: Live, client: openai.OpenAI, **options: Any) -> Any:
    return client.responses.create(model=server.model, **({"input": "hi"} | options))


def plain(item: dict[str, Any]) -> dict[str, Any]:
    """An item without what is made up for each."""
    return {name: value for name, value in item.items() if name not in ("id", "call_id")}


def added_up(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that a stream's events build; asserts that each event fits those before it."""
    items: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in found[2:-1]:
        EVENT.validate_python(event)
        assert event["output_index"] == len(texts) - (not event["type"].endswith("item.added"))
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert event["item"]["status"] == "in_progress"
                assert len(items) == len(texts), "one begins before the last has ended"
                texts.append("")
            case "content_part.added" | "reasoning_summary_part.added":
                assert event["part"]["text"] == ""
            case (
                "reasoning_text.delta"
                | "reasoning_summary_text.delta"
                | "output_text.delta"
                | "function_call_arguments.delta"
            ):
                assert event["delta"], "nothing new"
                texts[-1] += event["delta"]
            case "reasoning_text.done" | "reasoning_summary_text.done" | "output_text.done":
                assert event["text"] == texts[-1]
            case "function_call_arguments.done":
                assert event["arguments"] == texts[-1]
            case "content_part.done" | "reasoning_summary_part.done":
                assert event["part"]["text"] == texts[-1]
            case "output_item.done":
                item = event["item"]
                items.append(item)
                parts = [*item.get("summary", []), *item.get("content", [])]
                told = [part["text"] for part in parts] or [item["arguments"]]
                assert told == [texts[-1]], "once"
            case other:
                pytest.fail(f"an event {other}")
    return items


def test_an_answer(talker: Live, client: openai.OpenAI):
    say(talker, THOUGHT + "\nhello")
    answer = ask(talker, client, metadata={"a": "b"}, instructions=KIND, user="me", temperature=0.5)
    thought, text = answer.output
    assert (thought.type, thought.summary, thought.content[0].text) == ("reasoning", [], "hm, well")
    assert (text.type, text.role, text.status) == ("message", "assistant", "completed")
    assert answer.output_text == "hello"
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    served = talker.frontend.served
    messages = [{"role": "system", "content": KIND}, {"role": "user", "content": "hi"}]
    usage = answer.usage
    assert usage.input_tokens == len(served.chat_prompt(messages))
    assert usage.output_tokens == len(talker.runner.script or ())
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    thought_tokens = served.tokenizer.encode("hm, well")
    assert usage.output_tokens_details.reasoning_tokens == len(thought_tokens)
    assert (answer.metadata, answer.instructions, answer.user) == ({"a": "b"}, KIND, "me")
    assert (answer.temperature, answer.top_p, answer.truncation) == (0.5, 1.0, "disabled")
    assert (answer.tool_choice, answer.tools, answer.parallel_tool_calls) == ("auto", [], True)
    assert answer.text.format.type == "text"
    again = ask(talker, client, instructions=KIND).usage.input_tokens_details
    assert again.cached_tokens > 0


def test_tokens_are_counted(talker: Live, client: openai.OpenAI):
    asked: Any = {
        "model": talker.model,
        "input": [{"role": "user", "content": "hi"}],
        "instructions": KIND,
        "tools": [WEATHER],
        "reasoning": {"effort": "none"},
    }
    count = client.responses.input_tokens.count(**asked)
    assert count.object == "response.input_tokens"
    assert count.input_tokens == client.responses.create(**asked).usage.input_tokens
    bare = client.responses.input_tokens.count(model=talker.model, input="hi")
    assert bare.input_tokens < count.input_tokens
    with pytest.raises(openai.NotFoundError):
        client.responses.input_tokens.count(model="gpt-5", input="hi")
    with pytest.raises(openai.BadRequestError, match=r"input\[0\]\.content"):
        client.responses.input_tokens.count(input=[{"role": "user", "content": [{}]}])
    with pytest.raises(openai.BadRequestError, match="whole conversation"):
        client.responses.input_tokens.count(input="hi", previous_response_id="resp_1")


def test_what_is_asked_comes_back(talker: Live, client: openai.OpenAI):
    asked = {
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "name": "weather"},
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "reasoning": {"effort": "high", "summary": "auto"},
        "max_output_tokens": 7,
        "parallel_tool_calls": False,
        "prompt_cache_key": "key",
        "safety_identifier": "somebody",
        "top_logprobs": 2,
    }
    answer = wire(client, model=talker.model, input="hi", **asked)
    Response.model_validate(answer)
    assert {name: answer[name] for name in asked} == asked
    assert answer["store"] is False


@pytest.mark.parametrize("effort", [None, "none", "minimal", "high"])
def test_effort(talker: Live, client: openai.OpenAI, effort: str | None):
    answer = ask(talker, client, reasoning={"effort": effort})
    hi = [{"role": "user", "content": "hi"}]
    variables = {"enable_thinking": effort != "none"}
    assert answer.usage.input_tokens == len(talker.frontend.served.chat_prompt(hi, **variables))


TAGS = [f"<{end}{tag}>" for tag in ("think", "tool_call", "arg_key") for end in ("", "/")]
VALUE = ["city</arg_key><arg_value>2", "</arg_value>"]
WORDS = ["hi", "weather", " ", "\n", "é", "🎉", '"', "<"]
WHOLE = [THOUGHT, call("Rome"), "<tool_call>ping</tool_call>"]
PIECES = st.sampled_from([*TAGS, *VALUE, *WORDS, *WHOLE])


@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(PIECES, max_size=10).map("".join),
    limit=st.none() | st.integers(1, 30),
    summary=st.sampled_from([None, "auto"]),
)
def test_whatever_it_says(
    talker: Live, client: openai.OpenAI, text: str, limit: int | None, summary: str | None
):
    say(talker, text)
    asked: dict[str, Any] = {"tools": [WEATHER], "max_output_tokens": limit}
    asked["reasoning"] = {"summary": summary}
    whole = wire(client, model=talker.model, input="hi", **asked)
    Response.model_validate(whole)
    found = events(talker, client, **asked)
    assert [event["sequence_number"] for event in found] == [*range(len(found))]
    assert [event["type"] for event in found[:2]] == ["response.created", "response.in_progress"]
    last = found[-1]
    assert last["type"] == f"response.{last['response']['status']}"
    assert added_up(found) == last["response"]["output"]
    assert [plain(item) for item in last["response"]["output"]] == [*map(plain, whole["output"])]
    once = ("id", "created_at", "completed_at", "output", "usage")
    assert {k: v for k, v in whole.items() if k not in once} == {
        k: v for k, v in last["response"].items() if k not in once
    }
    assert found[0]["response"]["id"] == last["response"]["id"]
    for one in whole["output"]:
        if one["type"] == "function_call":
            assert isinstance(json.loads(one["arguments"]), dict)


@pytest.mark.parametrize(
    "text", [THOUGHT + "\nfine", THOUGHT + "\nlook" + call("Rome"), call("Rome")]
)
def test_the_clients_stream(talker: Live, client: openai.OpenAI, text: str):
    say(talker, text)
    whole = ask(talker, client, tools=[WEATHER])
    with client.responses.stream(model=talker.model, input="hi", tools=[WEATHER]) as stream:
        said = {"response.output_text.delta": "", "response.function_call_arguments.delta": ""}
        for event in stream:
            if event.type in said:
                said[event.type] += event.delta
        final = stream.get_final_response()
    assert final.output_text == whole.output_text == said["response.output_text.delta"]
    arguments = [item.arguments for item in final.output if item.type == "function_call"]
    assert "".join(arguments) == said["response.function_call_arguments.delta"]
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_the_async_client(talker: Live):
    say(talker, THOUGHT + "\nhello")

    async def main() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{talker.url}/v1", api_key="x", max_retries=0
        ) as client:
            answer = await client.responses.create(model=talker.model, input="hi")
            assert answer.output_text == "hello"
            async with client.responses.stream(model=talker.model, input="hi") as stream:
                final = await stream.get_final_response()
            assert final.output_text == "hello"

    asyncio.run(main())


class Switch(BaseModel):
    lamp: str
    on: bool


def test_parse(talker: Live, client: openai.OpenAI):
    say(talker, THOUGHT + '{"lamp": "hall", "on": true}')
    options: Any = {"model": talker.model, "input": "hi", "temperature": 0}
    answer = client.responses.parse(text_format=Switch, **options)
    assert answer.output_parsed == Switch(lamp="hall", on=True)
    assert answer.output[0].content[0].text == "hm, well"
    say(talker, THOUGHT + "\nI would rather talk about something else")  # the grammar does not
    answer = ask(
        talker,
        client,
        temperature=0,
        max_output_tokens=60,
        text={
            "format": {
                "type": "json_schema",
                "name": "yes",
                "schema": {"const": "yes"},
                "strict": True,
            }
        },
    )
    assert answer.output_text == '"yes"'


def test_tools_over_two_turns(talker: Live, client: openai.OpenAI):
    say(talker, THOUGHT + "\nI will look." + call("Rome") + call("Oslo"))
    first = ask(talker, client, tools=[WEATHER])
    calls = first.output[2:]
    assert [(c.type, c.name, json.loads(c.arguments)) for c in calls] == [
        ("function_call", "weather", {"city": city, "days": 2}) for city in ("Rome", "Oslo")
    ]
    assert len({c.call_id for c in calls} | {item.id for item in first.output}) == 6
    say(talker, "\n<think></think>\nsunny")
    results = [
        {"type": "function_call_output", "call_id": calls[0].call_id, "output": "sun"},
        {
            "type": "function_call_output",
            "call_id": calls[1].call_id,
            "output": [{"type": "input_text", "text": "ra"}, {"type": "input_text", "text": "in"}],
        },
    ]
    asked = [{"role": "user", "content": "hi"}, *first.output, *results]
    second = ask(talker, client, tools=[WEATHER], input=asked)
    assert second.output_text == "sunny"
    functions = [
        {"function": {"name": "weather", "arguments": {"city": city, "days": 2}}}
        for city in ("Rome", "Oslo")
    ]
    messages = [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "reasoning_content": "hm, well",
            "content": "I will look.",
            "tool_calls": functions,
        },
        {"role": "tool", "content": "sun"},
        {"role": "tool", "content": "rain"},
    ]
    prompt = talker.frontend.served.chat_prompt(messages, tools=[CHAT_WEATHER])
    assert second.usage.input_tokens == len(prompt)
    cached = second.usage.input_tokens_details.cached_tokens
    assert cached > first.usage.input_tokens, "what it said is in the cache as it is sent back"


def test_one_call_at_a_time(talker: Live, client: openai.OpenAI):
    say(talker, call("Rome") + call("Oslo"))
    answer = ask(talker, client, tools=[WEATHER], parallel_tool_calls=False)
    assert [item.type for item in answer.output] == ["function_call"]


@pytest.mark.parametrize(
    ("choice", "kinds"),
    [
        ("none", {"message"}),
        ("auto", {"message"}),
        ("required", {"function_call"}),
        ({"type": "function", "name": "ping"}, {"function_call"}),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "ping"}],
            },
            {"function_call"},
        ),
    ],
)
def test_tool_choice(talker: Live, client: openai.OpenAI, choice: Any, kinds: set[str]):
    say(talker, "\n<think></think>\nno")
    ping = {"type": "function", "name": "ping", "parameters": {"type": "object", "properties": {}}}
    answer = ask(
        talker,
        client,
        tools=[WEATHER, ping],
        tool_choice=choice,
        max_output_tokens=200,
        parallel_tool_calls=False,
    )
    assert {item.type for item in answer.output} - {"reasoning"} == kinds
    if isinstance(choice, dict):
        assert [item.name for item in answer.output if item.type == "function_call"] == ["ping"]


@pytest.mark.parametrize(
    ("text", "tokens", "kinds"),
    [
        (THOUGHT, 4, ["reasoning"]),
        (THOUGHT + "\na long answer", 12, ["reasoning", "message"]),
        ("x" + call("Rome"), 20, ["message", "function_call"]),
    ],
)
def test_cut_off(talker: Live, client: openai.OpenAI, text: str, tokens: int, kinds: list[str]):
    say(talker, text)
    answer = ask(talker, client, tools=[WEATHER], max_output_tokens=tokens)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert [item.type for item in answer.output] == kinds
    done = ["completed"] * (len(kinds) - 1) + ["incomplete"]
    assert [item.status for item in answer.output] == done
    found = events(talker, client, tools=[WEATHER], max_output_tokens=tokens)
    assert found[-1]["type"] == "response.incomplete"
    assert found[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def test_nothing_said_is_a_message(talker: Live, client: openai.OpenAI):
    say(talker, THOUGHT)
    answer = ask(talker, client)
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.output_text == ""


def test_a_step_that_fails(served: ServedModel):
    endless = served.tokenizer.encode("on and on ")
    with live(served, step_s=0.002, script=endless) as server, server.openai as client:
        stream = ask(server, client, stream=True, extra_body={"ignore_eos": True})
        seen = []
        for event in stream:
            seen.append(event)
            if event.type == "response.output_text.delta":
                server.runner.broken = True
        last = seen[-1]
        assert last.type == "response.failed"
        assert (last.response.status, last.response.error.code) == ("failed", "engine_error")
        assert "the device is on fire" in last.response.error.message
        assert last.response.output[0].status == "incomplete"
        assert last.response.output_text.startswith("on")
        with pytest.raises(openai.InternalServerError, match="on fire"):
            ask(server, client)
        server.runner.broken = False
        assert ask(server, client, max_output_tokens=2).status == "incomplete", "it serves on"


def test_a_deadline(served: ServedModel):
    endless = served.tokenizer.encode("on and on ")
    with live(served, step_s=0.01, script=endless) as server, server.openai as client:
        body: Any = {"timeout": 0.3, "ignore_eos": True}
        *_, last = ask(server, client, stream=True, extra_body=body)
        assert (last.type, last.response.error.code) == ("response.failed", "deadline_exceeded")
        with pytest.raises(openai.InternalServerError) as caught:
            ask(server, client, extra_body=body)
        assert caught.value.code == "deadline_exceeded", "as in an answer that comes whole"


def test_an_abort(served: ServedModel):
    endless = served.tokenizer.encode("on and on ")
    slow = live(served, step_s=0.002, script=endless)
    with slow as server, server.openai as client, server.http as http:
        for event in ask(server, client, stream=True):
            if event.type == "response.created":
                http.post("/abort_request", json={"rid": event.response.id})
    assert event.type == "response.failed"
    assert "aborted" in event.response.error.message


def test_an_agent(talker: Live):
    """It calls a tool in the first turn, and tells what it found in the second."""
    asked = []

    def look(city: str, days: int) -> str:
        asked.append((city, days))
        say(talker, "\n<think></think>\nIt is sunny.")
        return "sun"

    async def run(streamed: bool) -> Any:
        async with openai.AsyncOpenAI(base_url=f"{talker.url}/v1", api_key="x") as client:
            agent = agents.Agent(
                name="forecaster",
                instructions="You know the weather.",
                model=agents.OpenAIResponsesModel(talker.model, client),
                tools=[agents.function_tool(look, name_override="weather")],
            )
            config = agents.RunConfig(tracing_disabled=True)
            if not streamed:
                return await agents.Runner.run(agent, "hi", run_config=config)
            running = agents.Runner.run_streamed(agent, "hi", run_config=config)
            async for _ in running.stream_events():
                pass
            return running

    for streamed in (False, True):
        say(talker, THOUGHT + "\nI will look." + call("Rome"))
        done = asyncio.run(run(streamed))
        assert done.final_output == "It is sunny."
        kinds = [item.type for item in done.new_items]
        assert kinds == [
            "reasoning_item",
            "message_output_item",
            "tool_call_item",
            "tool_call_output_item",
            "message_output_item",
        ]
    assert asked == [("Rome", 2)] * 2
