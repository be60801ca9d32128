"""Real clients against a real server process with glm-nano: what a user's programs do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import agents
import anthropic
import openai
import pytest
from pydantic import BaseModel

ASK = "Please check the weather in Bergen."
TWO = "Please set a timer for 12 minutes and check the weather in Bergen."
SUM = "What is 4821 + 397?"


def function(name: str, description: str, parameter: str, kind: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {parameter: {"type": kind}},
        "required": [parameter],
    }
    return {"name": name, "description": description, "parameters": parameters}


FUNCTIONS = [
    function("sky_report", "Get the weather", "city", "string"),
    function("velim", "Set a timer", "minutes", "integer"),
]
TOOLS: Any = [{"type": "function", "function": each} for each in FUNCTIONS]
CALLS = [("velim", {"minutes": 12}), ("sky_report", {"city": "Bergen"})]
RAIN = '{"weather": "rain"}'


@pytest.fixture
def url(nano) -> str:
    return nano.url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def chat(client: openai.OpenAI, messages: Any, **options: Any) -> Any:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    options = {"temperature": 0} | options
    return client.chat.completions.create(model="glm-nano", messages=messages, **options)


def called(message: Any) -> list[tuple[str, Any]]:
    calls = [call.function for call in message.tool_calls]
    return [(call.name, json.loads(call.arguments)) for call in calls]


# openai


def test_a_thought_and_an_answer(client: openai.OpenAI):
    message = chat(client, SUM).choices[0].message
    assert message.content == "5218"
    assert message.reasoning_content.startswith("1284+7930\n")
    silent = chat(client, SUM, extra_body={"enable_thinking": False}).choices[0].message
    assert silent.reasoning_content is None
    assert "think" not in silent.content


def test_tools_over_several_turns(client: openai.OpenAI):
    messages: list[Any] = [{"role": "user", "content": TWO}]
    first = chat(client, messages, tools=TOOLS).choices[0]
    assert first.finish_reason == "tool_calls"
    assert called(first.message) == CALLS
    messages.append(first.message.model_dump())  # as it came
    for call, result in zip(first.message.tool_calls, ('{"timer": "ok"}', RAIN), strict=True):
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    second = chat(client, messages, tools=TOOLS).choices[0]
    assert second.finish_reason == "stop"
    assert second.message.content


def test_a_stream_is_the_answer_piece_by_piece(client: openai.OpenAI):
    whole = chat(client, TWO, tools=TOOLS).choices[0]
    with client.chat.completions.stream(
        model="glm-nano",
        messages=[{"role": "user", "content": TWO}],
        tools=TOOLS,
        temperature=0,
    ) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert called(final.message) == called(whole.message) == CALLS
    assert final.finish_reason == whole.finish_reason
    assert events.count("tool_calls.function.arguments.done") == 2
    chunks = chat(client, TWO, tools=TOOLS, stream=True)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    thought = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    assert "".join(thought) == whole.message.reasoning_content


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"velim", "sky_report"}),
        ({"type": "function", "function": {"name": "velim"}}, {"velim"}),
    ],
)
def test_a_call_can_be_demanded(client: openai.OpenAI, choice: Any, names: set[str]):
    answer = chat(client, SUM, tools=TOOLS, tool_choice=choice, max_tokens=200).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert {name for name, _ in called(answer.message)} <= names
    for _, arguments in called(answer.message):
        assert isinstance(arguments.get("minutes", 0), int)


def test_no_call_comes_where_none_may(client: openai.OpenAI):
    answer = chat(client, TWO, tools=TOOLS, tool_choice="none", max_tokens=100).choices[0]
    assert answer.message.tool_calls is None
    assert "<tool_call>" not in answer.message.content


class Weather(BaseModel):
    city: Literal["Bergen", "Oslo"]
    degrees: int
    rain: bool


def test_structured_output_behind_a_thought(client: openai.OpenAI):
    parsed = client.chat.completions.parse(
        model="glm-nano",
        messages=[{"role": "user", "content": SUM}],
        response_format=Weather,
        temperature=0,
        max_tokens=400,
    ).choices[0]
    assert parsed.message.reasoning_content
    assert isinstance(parsed.message.parsed, Weather)


def test_many_at_once(url: str):
    sums = {f"What is {n} + {n}?": str(2 * n) for n in range(101, 113)}

    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            answers = [
                client.chat.completions.create(
                    model="glm-nano",
                    messages=[{"role": "user", "content": question}],
                    temperature=0,
                )
                for question in sums
            ]
            return [each.choices[0].message.content for each in await asyncio.gather(*answers)]

    right = [told == value for told, value in zip(asyncio.run(ask()), sums.values(), strict=True)]
    assert sum(right) >= 11


def test_responses(client: openai.OpenAI):
    tools: Any = [{"type": "function"} | each for each in FUNCTIONS]
    first = client.responses.create(model="glm-nano", input=TWO, tools=tools, temperature=0)
    calls = [item for item in first.output if item.type == "function_call"]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == CALLS
    told: Any = [
        {"role": "user", "content": TWO},
        *[item.model_dump() for item in first.output],
        *[
            {"type": "function_call_output", "call_id": call.call_id, "output": RAIN}
            for call in calls
        ],
    ]
    second = client.responses.create(model="glm-nano", input=told, tools=tools, temperature=0)
    assert second.status == "completed"
    assert second.output_text


# anthropic


def test_anthropic(url: str):
    tools: Any = [
        {"name": each["name"], "description": each["description"], "input_schema": parameters}
        for each in FUNCTIONS
        if (parameters := each["parameters"])
    ]
    options: Any = {
        "model": "glm-nano",
        "max_tokens": 2000,
        "tools": tools,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "extra_body": {"temperature": 0},
    }
    messages: Any = [{"role": "user", "content": ASK}]
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        first = client.messages.create(messages=messages, **options)
        with client.messages.stream(messages=messages, **options) as stream:
            streamed = stream.get_final_message()
        assert first.stop_reason == streamed.stop_reason == "tool_use"
        assert [block.type for block in streamed.content] == ["thinking", "tool_use"]
        thought, call = first.content
        assert (call.name, call.input) == CALLS[1]
        assert streamed.content[0].thinking == thought.thinking
        result = {"type": "tool_result", "tool_use_id": call.id, "content": RAIN}
        messages += [
            {"role": "assistant", "content": [block.model_dump() for block in first.content]},
            {"role": "user", "content": [result]},
        ]
        second = client.messages.create(messages=messages, **options)
    assert second.stop_reason == "end_turn"
    assert second.content[-1].text == "The weather is rain."


# An agent library


@pytest.mark.parametrize("kind", [agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel])
def test_an_agent_calls_its_tool_and_answers(url: str, kind: Any):
    agents.set_tracing_disabled(True)
    asked: list[str] = []

    def sky_report(city: str) -> str:
        """Get the weather"""
        asked.append(city)
        return RAIN

    async def run(streamed: bool) -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            agent = agents.Agent(
                name="glm-nano",
                model=kind(model="glm-nano", openai_client=client),
                model_settings=agents.ModelSettings(temperature=0),
                tools=[agents.function_tool(sky_report)],
            )
            if not streamed:
                return (await agents.Runner.run(agent, ASK, max_turns=3)).final_output
            result = agents.Runner.run_streamed(agent, ASK, max_turns=3)
            async for _ in result.stream_events():
                pass
            return result.final_output

    for streamed in (False, True):
        assert asyncio.run(run(streamed)) == "The weather is rain."
    assert asked == ["Bergen", "Bergen"]
