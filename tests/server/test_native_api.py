"""SGLang's own HTTP API."""

from __future__ import annotations

import itertools
import json
from typing import Any
from unittest.mock import ANY

import pytest
from live import Live, oracle

GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


def generate(server: Live, **body: Any) -> Any:
    body = {"sampling_params": GREEDY} | body
    with server.http as client:
        response = client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(server: Live, **body: Any) -> list[dict[str, Any]]:
    body = {"sampling_params": GREEDY, "stream": True} | body
    with server.http as client:
        lines = client.post("/generate", json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def without_drafts(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without the counts that depend on how fast steps were."""
    meta = {k: v for k, v in answer["meta_info"].items() if not k.startswith("spec_")}
    return answer | {"meta_info": meta}


def test_ids_in_ids_out(server: Live):
    answer = generate(server, input_ids=[5, 6, 7], rid="mine")
    ids = oracle([5, 6, 7], 12)
    assert answer["output_ids"] == ids
    assert answer["text"] == server.frontend.served.tokenizer.decode(ids)
    assert answer["meta_info"] == {
        "id": "mine",
        "finish_reason": {"type": "length", "length": 12},
        "prompt_tokens": 3,
        "completion_tokens": 12,
        "cached_tokens": 0,
        "weight_version": "default",
        "spec_verify_ct": ANY,
        "spec_accept_length": ANY,
        "spec_acceptance": ANY,
        "spec_accept_token_num": ANY,
        "spec_draft_token_num": ANY,
    }


def test_text_in(server: Live):
    ids = server.frontend.served.tokenizer.encode("hello")
    assert generate(server, text="hello")["output_ids"] == oracle(ids, 12)


def test_batches(server: Live):
    prompts = [[1, 2], [3], [4, 5, 6]]
    answers = generate(server, input_ids=prompts)
    assert [answer["output_ids"] for answer in answers] == [oracle(p, 12) for p in prompts]
    assert len({answer["meta_info"]["id"] for answer in answers}) == 3
    assert len(generate(server, input_ids=[[1]])) == 1, "a batch of one is a list"
    lengths = [{**GREEDY, "max_new_tokens": n} for n in (2, 3, 4)]
    answers = generate(server, input_ids=prompts, sampling_params=lengths)
    assert [len(answer["output_ids"]) for answer in answers] == [2, 3, 4]
    assert len(generate(server, text=["a", "b"])) == 2


@pytest.mark.parametrize("seed_name", ["sampling_seed", "seed"])
def test_n_and_seeds(server: Live, seed_name: str):
    params = {"n": 3, seed_name: 7, "max_new_tokens": 12, "ignore_eos": True}
    answers = generate(server, input_ids=[1, 2], sampling_params=params)
    assert answers[0]["output_ids"] == oracle([1, 2], 12, seed=7)
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 3


def test_a_stream_repeats_all_of_the_text(server: Live):
    whole = generate(server, input_ids=[5, 6, 7], rid="x")
    seen = events(server, input_ids=[5, 6, 7], rid="x")
    assert without_drafts(seen[-1]) == without_drafts(whole)
    for before, after in itertools.pairwise(seen):
        assert before["meta_info"]["finish_reason"] is None
        assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
        assert after["text"].startswith(before["text"])


def test_a_streamed_batch(server: Live):
    whole = generate(server, input_ids=[[1], [2]], rid="b")
    seen = events(server, input_ids=[[1], [2]], rid="b")
    last = {event.pop("index"): without_drafts(event) for event in seen}
    assert [last[0], last[1]] == list(map(without_drafts, whole))


def test_stops(server: Live):
    ids = oracle([5, 6, 7], 12)
    stop = next(token for token in ids if ids.index(token) == 4)
    params = GREEDY | {"stop_token_ids": [stop]}
    answer = generate(server, input_ids=[5, 6, 7], sampling_params=params)
    assert answer["output_ids"] == ids[:5]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    decode = server.frontend.served.tokenizer.decode
    text = decode(ids)
    answer = generate(server, input_ids=[5, 6, 7], sampling_params=GREEDY | {"stop": text[3:5]})
    assert answer["text"] == text[: text.index(text[3:5])]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": text[3:5]}
    count = answer["meta_info"]["completion_tokens"]
    assert answer["output_ids"] == ids[:count]
    assert text[3:5] in decode(ids[:count])
    assert text[3:5] not in decode(ids[: count - 1])


def test_default_length(server: Live):
    answer = generate(server, input_ids=[1], sampling_params={"ignore_eos": True})
    assert answer["meta_info"]["completion_tokens"] == 128
    params = {"ignore_eos": True, "max_new_tokens": None}
    answer = generate(server, input_ids=[1] * 4000, sampling_params=params)
    assert answer["meta_info"]["completion_tokens"] == 96, "to the end of the context"


def test_tokenizing(server: Live):
    tokenizer = server.frontend.served.tokenizer
    with server.http as client:
        one = client.post("/tokenize", json={"prompt": "hello 🎉"}).json()
        ids = tokenizer.encode("hello 🎉")
        assert one == {"tokens": ids, "count": len(ids), "max_model_len": 4096}
        two = client.post("/tokenize", json={"prompt": ["a", "bc"]}).json()
        assert two["tokens"] == tokenizer.encode_batch(["a", "bc"])
        assert client.post("/detokenize", json={"tokens": ids}).json() == {"text": "hello 🎉"}
        many = client.post("/detokenize", json={"tokens": [ids, []]}).json()
        assert many == {"text": ["hello 🎉", ""]}
        user = [tokenizer.token_id("<|user|>")]
        body = {"tokens": user, "skip_special_tokens": False}
        assert client.post("/detokenize", json=body).json() == {"text": "<|user|>"}
        assert client.post("/detokenize", json={"tokens": user}).json() == {"text": ""}


def test_health_and_information(server: Live):
    with server.http as client:
        for path in ("/health", "/health_generate"):
            assert client.get(path).json() == {"status": "running"}
        info = client.get("/get_server_info").json()
    assert info["served_model_name"] == "tiny-glm"
    assert info["internal_states"][0]["num_running_reqs"] == 0
    assert info["max_running_requests"] == 8
