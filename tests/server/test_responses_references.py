"""Items of earlier answers that a client refers to by their ids."""

from __future__ import annotations

import threading
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import Live
from responses_talk import THOUGHT, WEATHER, call, events, say

from glmjax.server.responses.kept import ENTRY_BYTES, KEPT_BYTES, KeptItems
from glmjax.server.responses.requests import MessageItem

USER = {"role": "user", "content": "hi"}
PATCH = {"type": "custom", "name": "patch"}
GROUP = {"type": "namespace", "name": "sky", "tools": [WEATHER]}
SAID = (
    THOUGHT
    + "\nI will look."
    + call("Rome").replace("weather", "sky__weather")
    + "\n<tool_call>patch\n<arg_key>input</arg_key>\n<arg_value>+a</arg_value>\n</tool_call>"
)


def ask(client: openai.OpenAI, server: Live, **body: Any) -> Any:
    body = {"tools": [GROUP, PATCH], "input": [USER]} | body
    return client.responses.create(model=server.model, **body)


def reference(item: Any) -> dict[str, Any]:
    return {"type": "item_reference", "id": item.id}


def results(output: list[Any]) -> list[dict[str, Any]]:
    function, custom = output[-2:]
    return [
        {"type": "function_call_output", "call_id": function.call_id, "output": "sun"},
        {"type": "custom_tool_call_output", "call_id": custom.call_id, "output": "done"},
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("summary", [None, "auto"])
@pytest.mark.parametrize("store", [{}, {"extra_body": {"store": None}}])
def test_references_are_as_good_as_items(
    talker: Live, client: openai.OpenAI, stream: bool, summary: Any, store: Any
):
    say(talker, SAID)
    asked = {"reasoning": {"summary": summary}, "stream": stream} | store
    first = ask(client, talker, **asked)
    output = (list(first)[-1].response if stream else first).output
    kinds = ["reasoning", "message", "function_call", "custom_tool_call"]
    assert [item.type for item in output] == kinds

    def tokens(*items: Any) -> int:
        again = ask(client, talker, input=[USER, *items, *results(output)])
        return again.usage.input_tokens

    whole = tokens(*output)
    assert tokens(*map(reference, output)) == whole
    assert tokens(*({"id": item.id} for item in output)) == whole, "the type may be left out"
    assert tokens(*map(reference, output[:2]), *output[2:]) == whole, "as some clients mix them"
    assert tokens(*output[2:]) < whole
    counted: Any = [USER, *map(reference, output), *results(output)]
    tools: Any = [GROUP, PATCH]
    count = client.responses.input_tokens.count(model=talker.model, input=counted, tools=tools)
    assert count.input_tokens == whole


def test_the_cache_knows_what_is_referred_to(talker: Live, client: openai.OpenAI):
    say(talker, SAID)
    first = ask(client, talker)
    talker.wait_idle()
    again = ask(client, talker, input=[USER, *map(reference, first.output), *results(first.output)])
    assert again.usage.input_tokens_details.cached_tokens > first.usage.input_tokens


def test_a_thought_is_there_once(talker: Live, client: openai.OpenAI):
    """A summary, its seal and the thought itself are one and the same."""
    say(talker, SAID)
    seal: Any = {"include": ["reasoning.encrypted_content"]}
    counts = set()
    for options in ({}, seal, {"reasoning": {"summary": "detailed"}}):
        for more in (seal, {}):
            thought, *_, function, custom = ask(client, talker, **options | more).output
            for sent in (thought, reference(thought)):
                asked = [USER, sent, function, custom, *results([function, custom])]
                counts.add(ask(client, talker, input=asked).usage.input_tokens)
    assert len(counts) == 1


def test_items_of_a_stream_that_its_client_left(talker: Live, client: openai.OpenAI):
    say(talker, SAID)
    with ask(client, talker, stream=True) as stream:
        done = next(event for event in stream if event.type == "response.output_item.done")
    talker.wait_idle()
    ask(client, talker, input=[USER, reference(done.item), USER])


@pytest.mark.parametrize("stream", [False, True])
def test_what_shall_not_be_kept(talker: Live, client: openai.OpenAI, stream: bool):
    say(talker, SAID)
    first = ask(client, talker, store=False, stream=stream)
    output = (list(first)[-1].response if stream else first).output
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, talker, input=[USER, reference(output[0])])
    assert caught.value.param == "input"
    for words in (
        f"input[1] refers to '{output[0].id}'",
        "in this server's memory",
        "store: false",
    ):
        assert words in caught.value.message
    with pytest.raises(openai.BadRequestError, match=r"input\[1\] refers to 'rs_1'"):
        client.responses.input_tokens.count(input=[USER, {"type": "item_reference", "id": "rs_1"}])


def test_one_reference_for_an_item(talker: Live, client: openai.OpenAI):
    say(talker, "hello")
    (item,) = ask(client, talker).output
    with pytest.raises(openai.BadRequestError, match=f"'{item.id}' more than once"):
        ask(client, talker, input=[USER, *[reference(item)] * 2])


def test_another_server_knows_nothing_of_it(talker: Live, server: Live, client: openai.OpenAI):
    say(talker, "hello")
    (item,) = ask(client, talker).output
    with server.openai as other, pytest.raises(openai.BadRequestError, match="refers to"):
        ask(other, server, input=[reference(item)])


def test_log_probabilities_go_with_it(talker: Live, client: openai.OpenAI):
    say(talker, "hello")
    found = events(talker, client, top_logprobs=3)
    (item,) = found[-1]["response"]["output"]
    assert item["content"][0]["logprobs"]
    ask(client, talker, input=[USER, {"type": "item_reference", "id": item["id"]}, USER])


# The table


def message(item_id: str, text: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text}]
    return {"id": item_id, "type": "message", "role": "assistant", "content": content}


def text_of(item: Any) -> str | None:
    if item is None:
        return None
    assert isinstance(item, MessageItem)
    (part,) = item.content
    return part["text"]  # type: ignore[index]


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([None, 0, 100, 600, 2000]))))
def test_the_latest_are_kept(steps: list[tuple[int, int | None]]):
    """Beside a table that forgets nothing; None looks an item up, a number is a text's length."""
    bytes_, kept = 4 * ENTRY_BYTES, KeptItems(4 * ENTRY_BYTES)
    last: dict[str, str] = {}  # in the order of their use
    for number, length in steps:
        item_id = f"msg_{number}"
        if length is None:
            found = text_of(kept.find(item_id))
            assert found in (None, last.get(item_id))
            if found is not None:
                last[item_id] = last.pop(item_id)
            continue
        kept.keep(message(item_id, "x" * length))
        if ENTRY_BYTES + length + 200 < bytes_:
            last.pop(item_id, None)
            last[item_id] = "x" * length
            assert text_of(kept.find(item_id)) == last[item_id], "the latest is there"
    there = [item_id for item_id in last if kept.find(item_id) is not None]
    assert there == [*last][len(last) - len(there) :], "those used least lately go first"
    assert len(there) <= 4


def test_it_is_bounded():
    kept = KeptItems(10 * ENTRY_BYTES)
    kept.keep(message("msg_large", "x" * 10 * ENTRY_BYTES))
    assert kept.find("msg_large") is None, "larger than all that is kept"
    for number in range(100):
        kept.keep(message(f"msg_{number}", ""))
    there = [number for number in range(100) if kept.find(f"msg_{number}")]
    assert 0 < len(there) < 10
    assert there[-1] == 99
    assert KEPT_BYTES == 64 * 2**20


def test_threads_share_it():
    kept = KeptItems(20 * ENTRY_BYTES)
    failures: list[Exception] = []

    def work(name: int) -> None:
        try:
            for number in range(300):
                kept.keep(message(f"msg_{name}_{number % 30}", "x" * number))
                kept.find(f"msg_{1 - name}_{number % 30}")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_what_asks_to_be_stored_is_answered(talker: Live, client: openai.OpenAI):
    answer = ask(client, talker, store=True, extra_body={"truncation": "auto"})
    assert (answer.model_extra or {})["store"] is False
    assert answer.truncation == "disabled"
