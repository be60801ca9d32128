"""Token ids beside the text, as vLLM tells them: rollouts must not be tokenised again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from live import Live, oracle

HI = [{"role": "user", "content": "hi"}]
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
BODIES = {
    CHAT: {"messages": HI, "max_tokens": 20},
    COMPLETION: {"prompt": [[5, 6, 7], [8, 9]], "max_tokens": 20},
}


def ask(server: Live, path: str, **more: Any) -> dict[str, Any]:
    body = BODIES[path] | {"temperature": 0, "ignore_eos": True, "return_token_ids": True} | more
    with server.http as client:
        return client.post(path, json=body).raise_for_status().json()


def stream(server: Live, path: str, **more: Any) -> list[dict[str, Any]]:
    asked = BODIES[path] | {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with server.http as client:
        text = client.post(path, json=asked | {"stream": True} | more).raise_for_status().text
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def prompts(server: Live, path: str) -> list[list[int]]:
    rendered = server.frontend.served.chat_prompt(HI)
    return [rendered] if path == CHAT else BODIES[COMPLETION]["prompt"]


@pytest.mark.parametrize("path", BODIES)
def test_they_are_what_was_read_and_generated(server: Live, path: str):
    answer = ask(server, path)
    for choice, prompt in zip(answer["choices"], prompts(server, path), strict=True):
        assert choice["token_ids"] == oracle(prompt, 20)
        holder = answer if path == CHAT else choice
        assert holder["prompt_token_ids"] == prompt


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("more", [{}, {"stop": ["qqq"]}, {"logprobs": True}, {"max_tokens": 1}])
def test_streams_add_up_to_the_same(server: Live, path: str, more: dict[str, Any]):
    chunks, found = stream(server, path, **more), {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            found.setdefault(choice["index"], []).extend(choice.get("token_ids", []))
    whole = ask(server, path, **more)["choices"]
    assert found == {choice["index"]: choice["token_ids"] for choice in whole}
    if path == CHAT:
        told = [chunk["prompt_token_ids"] for chunk in chunks if "prompt_token_ids" in chunk]
        assert told == prompts(server, path)
        assert "prompt_token_ids" in chunks[0]
    else:
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        told = [(c["index"], c["prompt_token_ids"]) for c in choices if "prompt_token_ids" in c]
        assert sorted(told) == [*enumerate(prompts(server, path))]


@pytest.mark.parametrize("path", BODIES)
def test_nobody_else_gets_them(server: Live, path: str):
    text = json.dumps(
        [ask(server, path, return_token_ids=False), *stream(server, path, return_token_ids=None)]
    )
    assert "token_ids" not in text


@pytest.mark.parametrize("path", BODIES)
def test_the_first_chunk_comes_with_the_first_token(server: Live, path: str):
    """Who times a stream takes its first event for the first token."""
    chunks = stream(server, path, return_token_ids=True)
    ids = [choice.get("token_ids") for chunk in chunks[:2] for choice in chunk["choices"]]
    assert any(ids)


@pytest.mark.parametrize("echo", [False, True])
def test_the_prompt_alone(server: Live, echo: bool):
    (chunk, *rest), whole = (
        stream(server, COMPLETION, prompt=[5, 6, 7], max_tokens=0, echo=echo),
        ask(server, COMPLETION, prompt=[5, 6, 7], max_tokens=0, echo=echo),
    )
    for told in (chunk, whole):
        assert told["choices"][0]["prompt_token_ids"] == [5, 6, 7]
        assert told["choices"][0]["token_ids"] == []
    assert "token_ids" not in json.dumps(rest)


def test_a_completion_of_no_tokens(server: Live):
    answer = ask(server, COMPLETION, max_tokens=0, return_token_ids=False)
    assert [choice["text"] for choice in answer["choices"]] == ["", ""]
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["usage"]["prompt_tokens"] == 5


@pytest.mark.parametrize("name", ["default", None])
def test_names_that_stand_for_the_only_model(server: Live, name: str | None):
    assert ask(server, CHAT, model=name)["model"] == "tiny-glm"
    folder = str(server.frontend.served.folder)
    assert ask(server, CHAT, model=folder)["model"] == "tiny-glm"
