"""What ended an answer may stay in its text: SGLang's no_stop_trim, vLLM's name for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import Live, live

from glmjax.server.served import ServedModel
from glmjax.text.detokenizer import StopCutter

NAMES = ["no_stop_trim", "include_stop_str_in_output"]
HI = [{"role": "user", "content": "hi"}]
THOUGHT, SAID = "\n<think>Well.</think>\n", "One, two. Three"


@pytest.fixture(scope="module")
def talker(served: ServedModel) -> Iterator[Live]:
    """A server that thinks and counts."""
    script = served.tokenizer.encode(THOUGHT + SAID)
    with live(served, script=[*script, *served.eos_token_ids[:1]]) as server:
        yield server


@pytest.fixture(scope="module")
def client(talker: Live) -> Iterator[httpx.Client]:
    with talker.http as made:
        yield made


def native(client: httpx.Client, **sampling: Any) -> dict[str, Any]:
    """The answer, which ends as a stream of it does."""
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 50} | sampling}
    whole = client.post("/generate", json=body)
    assert whole.status_code == 200, whole.text
    *_, last, _, _ = client.post("/generate", json=body | {"stream": True}).text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["text"] == whole.json()["text"]
    return whole.json()


def chat(client: httpx.Client, **fields: Any) -> tuple[str, Any]:
    """The content of the answer, the same as of a stream, and what ended it."""
    body = {"messages": HI, "max_tokens": 50} | fields
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    lines = client.post("/v1/chat/completions", json=body | {"stream": True}).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    deltas = [each["delta"] for chunk in chunks for each in chunk["choices"]]
    content = choice["message"]["content"]
    assert "".join(delta.get("content") or "" for delta in deltas) == content
    assert choice["message"]["reasoning_content"] == "Well."
    return content, choice["matched_stop"]


@pytest.mark.parametrize("name", NAMES)
def test_a_stop_string(client: httpx.Client, name: str):
    for stop, cut, kept in [(["o. T"], "One, tw", "One, two. T"), ([",", "e, t"], "One", "One,")]:
        trimmed = native(client, stop=stop)
        whole = native(client, stop=stop, **{name: True})
        assert (trimmed["text"], whole["text"]) == (THOUGHT + cut, THOUGHT + kept)
        assert trimmed["output_ids"] == whole["output_ids"]
        assert whole["meta_info"]["finish_reason"]["matched"] in stop
        assert chat(client, stop=stop)[0] == cut
        assert chat(client, stop=stop, **{name: True}) == (kept, stop[0])
        assert chat(client, stop=stop, **{name: False})[0] == cut


def test_a_stop_of_white_space(client: httpx.Client):
    assert chat(client, stop=[" "]) == ("One,", " ")
    assert chat(client, stop=[" "], no_stop_trim=True) == ("One, ", " ")


@pytest.mark.parametrize("name", NAMES)
def test_a_stop_token(client: httpx.Client, served: ServedModel, name: str):
    """As a trainer asks that trains on the very text of the answer."""
    end = served.eos_token_ids[0]
    text = served.tokenizer.decode([end], skip_special_tokens=False)
    shown = {"skip_special_tokens": False}
    assert native(client, **shown)["text"] == THOUGHT + SAID
    answer = native(client, **shown, **{name: True})
    assert answer["text"] == THOUGHT + SAID + text
    assert answer["output_ids"] == served.tokenizer.encode(THOUGHT + SAID + text)
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": end}
    assert text not in native(client, **{name: True})["text"], "it is a special token"
    assert chat(client, **{name: True})[0] == SAID
    assert chat(client, **shown, **{name: True})[0] == SAID + text


def test_a_stop_token_that_is_text(client: httpx.Client, served: ServedModel):
    dot = served.tokenizer.encode(SAID)[-2]
    word = served.tokenizer.decode([dot])
    before = SAID[: SAID.index(word)]
    asked = {"stop_token_ids": [dot]}
    assert chat(client, **asked) == (before.rstrip(), dot)
    assert chat(client, **asked, no_stop_trim=True) == (SAID[: len(before + word)], dot)


def test_completions(client: httpx.Client):
    body = {"prompt": "a", "stop": "two", "max_tokens": 50}
    for more, end in [({}, "One, "), ({NAMES[0]: True}, "One, two"), ({NAMES[1]: True}, "two")]:
        (choice,) = client.post("/v1/completions", json=body | more).json()["choices"]
        assert choice["text"].endswith(end)


def test_nothing_ended_it(client: httpx.Client):
    assert native(client, stop=["x"], max_new_tokens=4) | {"meta_info": 0} == native(
        client, stop=["x"], max_new_tokens=4, no_stop_trim=True
    ) | {"meta_info": 0}


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 4), min_size=30, max_size=30),
)
def test_the_cut_is_behind_what_was_found(text: str, stops: list[str], sizes: list[int]):
    before, behind = StopCutter(stops), StopCutter(stops, keep=True)
    shown = ["", ""]
    rest = text
    for size in sizes:
        piece, rest = rest[:size], rest[size:]
        for n, cutter in enumerate((before, behind)):
            shown[n] += "" if cutter.matched else cutter.push(piece)
    if behind.matched is None:
        shown = [shown[0] + before.finish(), shown[1] + behind.finish()]
    assert before.matched == behind.matched
    assert shown[1] == shown[0] + (behind.matched or "")
    assert text.startswith(shown[1])
