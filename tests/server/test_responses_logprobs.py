"""Log probabilities of what the Responses API tells as text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Live
from openai.types.responses import Response
from responses_talk import THOUGHT, WEATHER, call, events, say

from glmjax.server.choice import ChoiceDelta, ChoiceSpec
from glmjax.server.logprob_words import Place
from glmjax.server.responses.text_logprobs import TextLogprobs
from glmjax.server.served import ServedModel
from glmjax.text.output import text_of
from glmjax.text.reader import AnswerReader, Reading
from glmjax.types import FinishReason, SamplingParams, TokenLogprobs

LOGPROBS = "message.output_text.logprobs"
BANG = 0  # the token of an exclamation mark


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (THOUGHT + "\n\nhi é🎉 <think> there" + call("Rome"), {}),
        ("\n<think>hm \n</think> hi", {}),
        ("plain \n\n text \n", {}),
        (call("Rome") + "more", {}),
        ("so az" + call("Rome"), {"stop": ["azure"]}),  # perhaps, up to white space
        ("so az" + call("Rome").lstrip(), {"stop": ["azure"]}),  # or up to a tag
        ("so az\nmore", {"stop": ["azure"]}),
        ("so az", {"stop": ["azure"]}),  # and up to the end
        ("so az! more", {"stop_token_ids": [BANG]}),
        ("yes <tool_call>3 < 4", {}),  # no call
        ("<tool_call>\n<tool_call> <tool_call>ping ping", {}),
        ("yes <tool_call>", {}),
        ("yes <tool_call>3 < 4" + call("Rome"), {}),
        ("yes <tool_call>3 < 4 az" + call("Rome"), {"stop": ["azure"]}),
        ("<tool_call>ping<tool_call>3 < 4", {}),
        ("\n<think> </think> x", {}),
        ("on<think>x", {"stop": ["<think>y"]}),
        ("\n</think>on azure", {"stop": [" azure"]}),
    ],
)
def test_logprobs_are_of_the_text(
    talker: Live, client: openai.OpenAI, text: str, options: dict[str, Any]
):
    say(talker, text)
    asked = {"tools": [WEATHER], "top_logprobs": 2} | options
    with talker.http as http:
        whole = http.post("/v1/responses", json={"input": "hi"} | asked).json()
    Response.model_validate(whole)
    content = next(item for item in whole["output"] if item["type"] == "message")["content"][0]
    data = b"".join(bytes(each["bytes"]) for each in content["logprobs"])
    assert data.decode() == content["text"] != ""
    assert {len(each["top_logprobs"]) for each in content["logprobs"]} == {2}
    found = events(talker, client, **asked)
    pieces = [e["logprobs"] for e in found if e["type"] == "response.output_text.delta"]
    assert [each for piece in pieces for each in piece] == content["logprobs"]


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens(talker: Live, skip: bool):
    """Where they are no text, no log probability tells of them."""
    served = talker.frontend.served
    (eos, *_), encode = served.eos_token_ids, served.tokenizer.encode
    talker.wait_idle()
    talker.runner.script = [*encode("so"), eos, *encode(" it goes"), eos]
    body = {"input": "hi", "top_logprobs": 1, "ignore_eos": True, "max_output_tokens": 8}
    with talker.http as http:
        answer = http.post("/v1/responses", json=body | {"skip_special_tokens": skip}).json()
    (content,) = answer["output"][-1]["content"]
    data = b"".join(bytes(each["bytes"]) for each in content["logprobs"])
    assert data.decode() == content["text"]
    assert (served.tokenizer.token_bytes(eos).decode() in content["text"]) == (not skip)


TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>"]
WORDS = ["hi", "weather", "az", "3 < 4", " ", "\n", "é", "🎉", "<arg_value>2", "</arg_value>"]
PIECES = st.sampled_from([*TAGS, *WORDS, THOUGHT, call("Rome"), "<tool_call>ping</tool_call>"])


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(PIECES | st.sampled_from(["<|endoftext|>", "<|user|>"]), max_size=12),
    cuts=st.lists(st.integers(1, 4), min_size=1),
    prompt=st.sampled_from(["<|assistant|>", "<|assistant|>\n<think>", "<|assistant|>\nOn"]),
    separate=st.booleans(),
    truncated=st.booleans(),
)
def test_whatever_it_says(
    served: ServedModel,
    pieces: list[str],
    cuts: list[int],
    prompt: str,
    separate: bool,
    truncated: bool,
):
    """The tokens found spell the text, but that there may be more white space at its ends."""
    reading = Reading(tools={"weather": None}, separate_reasoning=separate)
    encode = served.tokenizer.encode
    spec = ChoiceSpec(tuple(encode(prompt)), SamplingParams(), ("azure",), reading=reading)
    reader = AnswerReader(served.tokenizer, reading, served.opening(spec.prompt_ids), spec.stops)
    ids = [token for piece in pieces for token in encode(piece)]
    said = text_of([part for token in ids for part in reader.push(token)])
    said += text_of(reader.finish(truncated))
    places = taken(TextLogprobs(spec, served), ids, itertools.cycle(cuts), truncated)
    spelled = served.tokenizer.decode([place.token_id for place in places])
    assert "".join(spelled.split()) == "".join(said.split())
    where = [place.logprobs.logprob for place in places if place.logprobs]
    assert where == sorted(set(where)), "each once, in order"


def taken(
    found: TextLogprobs, ids: list[int], sizes: Iterator[int], truncated: bool
) -> list[Place]:
    """What is found when tokens come a few at a time; each one's log probability is its place."""
    places: list[Place] = []
    logprobs = [TokenLogprobs(float(i), ()) for i in range(len(ids))]
    begin, end = 0, None
    while end is None:
        step = slice(begin, begin + next(sizes))
        if step.stop >= len(ids):
            end = FinishReason.LENGTH if truncated else FinishReason.STOP
        places += found.take(
            ChoiceDelta(
                token_ids=tuple(ids[step]), logprobs=tuple(logprobs[step]), finish_reason=end
            )
        )
        begin = step.stop
    return places


def test_who_asks_for_logprobs(talker: Live, client: openai.OpenAI):
    say(talker, "plain")
    for asked, tops in (({"top_logprobs": 1}, {1}), ({"include": [LOGPROBS]}, {0}), ({}, set())):
        content = client.responses.create(input="hi", **asked).output[0].content[0]
        assert {len(each.top_logprobs) for each in content.logprobs} == tops
