"""What tests of the Responses API say, and how they ask."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import agents
import openai
from live import Live

from glmjax.server.served import ServedModel

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "What it will be like.",
    "parameters": PARAMETERS,
    "strict": False,
}
THOUGHT = "\n<think>hm, well</think>"


def call(city: str) -> str:
    return (
        f"\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>{city}</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
    )


def script(served: ServedModel, text: str) -> list[int]:
    return [*served.tokenizer.encode(text), served.eos_token_ids[0]]


def say(server: Live, text: str) -> None:
    server.wait_idle()
    server.runner.script = script(server.frontend.served, text)


def wire(client: openai.OpenAI, **body: Any) -> Any:
    """The very JSON of an answer."""
    return json.loads(client.responses.with_raw_response.create(**body).text)


def run_agent(server: Live, **fields: Any) -> Any:
    """What an agent of the Agents SDK makes of "hi"."""

    async def run() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            model = agents.OpenAIResponsesModel(server.model, client)
            agent = agents.Agent(name="agent", model=model, **fields)
            config = agents.RunConfig(tracing_disabled=True)
            return await agents.Runner.run(agent, "hi", run_config=config)

    return asyncio.run(run())


def events(server: Live, client: openai.OpenAI, **options: Any) -> list[dict[str, Any]]:
    """The very events of a stream; each is named as its data is."""
    body = {"model": server.model, "input": "hi", "stream": True} | options
    found = []
    with server.http as http:
        for block in http.post("/v1/responses", json=body).text.strip().split("\n\n"):
            name, data = block.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found
