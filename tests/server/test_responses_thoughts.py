"""Thoughts in the Responses API: sent back to go on from, and as summaries."""

from __future__ import annotations

from typing import Any

import agents
import openai
import pytest
from live import Live, live
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter
from responses_talk import THOUGHT, events, run_agent, say, wire

from glmjax.server.served import ServedModel

EVENT = TypeAdapter(ResponseStreamEvent)

PING: dict[str, Any] = {"type": "function", "name": "ping", "parameters": {}, "strict": False}
SAYS = "\n<think>hm, well</think>\n<tool_call>ping\n</tool_call>"
SEALED = ["reasoning.encrypted_content"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_thought_comes_back_from_clients_that_keep_no_content(served: ServedModel, stream: bool):
    script = [*served.tokenizer.encode(SAYS), served.eos_token_ids[0]]
    with live(served, script=script) as server, server.openai as client:
        options: Any = {"model": server.model, "tools": [PING]}
        first: Any = client.responses.create(input="hi", include=SEALED, stream=stream, **options)
        thought, called = (list(first)[-1].response if stream else first).output
        kept = {"type": "reasoning", "summary": [], "encrypted_content": thought.encrypted_content}
        result = {"type": "function_call_output", "call_id": called.call_id, "output": "pong"}

        def prompt_tokens(*before: Any) -> int:
            sent: Any = [{"role": "user", "content": "hi"}, *before, called.model_dump(), result]
            return client.responses.create(input=sent, **options).usage.input_tokens

        assert prompt_tokens(kept) == prompt_tokens(thought.model_dump()) > prompt_tokens()
        plain: Any = client.responses.create(input="hi", **options)
        assert plain.output[0].encrypted_content is None


# Summaries


def asked(**options: Any) -> dict[str, Any]:
    return {"input": "hi", "tools": [PING]} | options


@pytest.mark.parametrize("name", ["summary", "generate_summary"])
@pytest.mark.parametrize("kind", ["auto", "concise", "detailed"])
def test_a_thought_is_its_own_summary(talker: Live, client: openai.OpenAI, name: str, kind: str):
    """Who asks for one shows nothing else of a thought."""
    say(talker, SAYS)
    thought, called = wire(client, **asked(reasoning={name: kind}))["output"]
    assert thought["summary"] == [{"type": "summary_text", "text": "hm, well"}]
    assert (thought["content"], thought["encrypted_content"]) == ([], None)
    assert called["type"] == "function_call"
    thought, _ = wire(client, **asked(reasoning={name: None}))["output"]
    assert thought["summary"] == []
    assert thought["content"] == [{"type": "reasoning_text", "text": "hm, well"}]


def test_events_of_a_summary(talker: Live, client: openai.OpenAI):
    say(talker, SAYS)
    found = events(talker, client, **asked(reasoning={"summary": "auto"}, include=SEALED))
    for event in found:
        EVENT.validate_python(event)
    about = [event for event in found if event.get("output_index") == 0]
    kinds = [event["type"].removeprefix("response.") for event in about]
    added, *deltas, done, part_done, end = about[1:]
    first, last = ["output_item.added", "reasoning_summary_part.added"], ["output_item.done"]
    text = ["reasoning_summary_text.delta"] * len(deltas) + ["reasoning_summary_text.done"]
    assert kinds == first + text + ["reasoning_summary_part.done"] + last
    assert about[0]["item"]["summary"] == about[0]["item"]["content"] == []
    assert added["part"] == {"type": "summary_text", "text": ""}
    assert "".join(delta["delta"] for delta in deltas) == done["text"] == "hm, well"
    assert part_done["part"] == {"type": "summary_text", "text": "hm, well"}
    assert end["item"]["summary"] == [part_done["part"]]
    assert end["item"]["encrypted_content"] == "thought:hm, well"
    inner = [added, *deltas, done, part_done]
    assert {event["summary_index"] for event in inner} == {0}
    assert {event["item_id"] for event in inner} == {end["item"]["id"]}
    assert not any("content_index" in event for event in inner)


def test_a_summary_comes_back(talker: Live, client: openai.OpenAI):
    """As the thought that it is, and once, however much of it a client keeps."""
    say(talker, SAYS)
    options: Any = asked(include=SEALED, reasoning={"summary": "auto"})
    thought, called = wire(client, **options)["output"]
    result = {"type": "function_call_output", "call_id": called["call_id"], "output": "pong"}

    def prompt_tokens(**kept: Any) -> int:
        before = [{"type": "reasoning"} | kept] if kept else []
        sent: Any = [{"role": "user", "content": "hi"}, *before, called, result]
        return wire(client, **asked(input=sent))["usage"]["input_tokens"]

    summary, sealed = {"summary": thought["summary"]}, {"encrypted_content": "thought:hm, well"}
    plain = prompt_tokens(content=[{"type": "reasoning_text", "text": "hm, well"}])
    assert plain > prompt_tokens()
    for kept in (thought, summary, summary | sealed, sealed | {"summary": []}):
        assert prompt_tokens(**kept) == plain


def test_a_summary_that_is_cut_off(talker: Live, client: openai.OpenAI):
    say(talker, SAYS)
    options: Any = asked(reasoning={"summary": "auto"}, max_output_tokens=5)
    (thought,) = wire(client, **options)["output"]
    assert thought["status"] == "incomplete"
    (part,) = thought["summary"]
    assert "hm, well".startswith(part["text"])
    assert part["text"] not in ("", "hm, well")


def test_clients_read_summaries(talker: Live, client: openai.OpenAI):
    say(talker, THOUGHT + "\nhello")
    options: Any = {"model": talker.model, "input": "hi", "reasoning": {"summary": "auto"}}
    with client.responses.stream(**options) as stream:
        said = [e.delta for e in stream if e.type == "response.reasoning_summary_text.delta"]
        final: Any = stream.get_final_response()
    assert final.output[0].summary[0].text == "".join(said) == "hm, well"
    assert final.output_text == "hello"


def test_an_agent_reads_summaries(talker: Live):
    def ping() -> str:
        say(talker, "\n<think></think>\nDone.")
        return "pong"

    say(talker, SAYS)
    settings: Any = {"summary": "auto"}
    done = run_agent(
        talker,
        model_settings=agents.ModelSettings(reasoning=settings),
        tools=[agents.function_tool(ping)],
    )
    assert done.final_output == "Done."
    thought: Any = done.new_items[0].raw_item
    assert (thought.type, thought.summary[0].text) == ("reasoning", "hm, well")
