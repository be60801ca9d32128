"""SGLang's own HTTP API."""

from __future__ import annotations

import itertools
import json
from typing import Any
from unittest.mock import ANY

import pytest
from live import Live, live, oracle

from glmjax.server.served import ServedModel

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
    """An answer without what depends on how fast steps were."""
    timed = ("spec_", "e2e_")
    meta = {k: v for k, v in answer["meta_info"].items() if not k.startswith(timed)}
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
        "e2e_latency": ANY,
        "reasoning_tokens": 0,
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


def test_an_answer_of_no_tokens(server: Live):
    sampling = {"max_new_tokens": 0, "temperature": 0}
    answer = generate(server, text="hello", sampling_params=sampling)
    assert (answer["text"], answer["output_ids"]) == ("", [])
    meta = answer["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 0}
    assert meta["prompt_tokens"] == len(server.frontend.served.tokenizer.encode("hello"))
    assert meta["completion_tokens"] == 0
    many = generate(
        server, text=["a", "b"], sampling_params=[sampling, GREEDY], return_logprob=True
    )
    assert [len(each["meta_info"]["output_token_logprobs"]) for each in many] == [0, 12]
    (last,) = events(server, text="hello", sampling_params=sampling)
    assert without_drafts(last)["text"] == ""


def test_how_long_it_took_and_the_thought_in_it(served: ServedModel):
    encode = served.tokenizer.encode
    ends = list(served.eos_token_ids[:1])
    with live(served) as server:
        for before, said, thought in [
            ("<|user|>hi<|assistant|>", "\n<think>hm, well</think>\nHi </think>", "hm, well"),
            ("<|user|>hi<|assistant|><think>", "hm</think>Hi", "hm"),
            ("hi", "<think>on and on", "on and on"),
            ("<|user|>hi<|assistant|><think></think>", "no</think>", ""),
            ("hi", "no thought", ""),
        ]:
            server.runner.script = encode(said) + ends
            answer = generate(server, text=before, sampling_params={"max_new_tokens": 50})
            meta = answer["meta_info"]
            assert meta["reasoning_tokens"] == len(encode(thought)), said
            assert 0 < meta["e2e_latency"] < 30
        *others, last = events(server, text="hi", sampling_params={"max_new_tokens": 50})
    assert "e2e_latency" in last["meta_info"]
    assert not any("e2e_latency" in other["meta_info"] for other in others)


def test_a_model_that_may_be_named(server: Live):
    assert generate(server, text="a", model=server.model)["output_ids"]
    with server.http as client:
        refused = client.post("/generate", json={"text": "a", "model": "gpt-4"})
    assert refused.status_code == 404
    assert refused.json()["error"]["param"] == "model"


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
        two = client.post("/tokenize", json={"prompt": ["a", "bcd"]}).json()
        both = tokenizer.encode_batch(["a", "bcd"])
        assert (two["tokens"], two["count"]) == (both, [len(ids) for ids in both])
        assert client.post("/detokenize", json={"tokens": ids}).json() == {"text": "hello 🎉"}
        many = client.post("/detokenize", json={"tokens": [ids, []]}).json()
        assert many == {"text": ["hello 🎉", ""]}
        user = [tokenizer.token_id("<|user|>")]
        body = {"tokens": user, "skip_special_tokens": False}
        assert client.post("/detokenize", json=body).json() == {"text": "<|user|>"}
        assert client.post("/detokenize", json={"tokens": user}).json() == {"text": ""}


HI = [{"role": "user", "content": "hi"}]
LOOK_UP = {"type": "function", "function": {"name": "look_up", "parameters": {}}}


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tools": [LOOK_UP]},
        {"tools": [LOOK_UP], "tool_choice": "none"},
        {"enable_thinking": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"thinking": {"type": "disabled"}},
        {"reasoning_effort": "none"},
        {
            "messages": [*HI, {"role": "assistant", "content": "Hello"}],
            "continue_final_message": True,
        },
    ],
)
def test_a_conversation_has_as_many_tokens_as_it_is_served_with(
    server: Live, path: str, more: dict[str, Any]
):
    body = {"model": server.model, "messages": HI} | more
    with server.http as client:
        counted = client.post(path, json=body).json()
        answer = client.post("/v1/chat/completions", json=body | {"max_tokens": 1}).json()
    assert counted["count"] == len(counted["tokens"]) == answer["usage"]["prompt_tokens"]
    if not more:
        assert counted["tokens"] == server.frontend.served.chat_prompt(HI)


def test_a_conversation_that_is_over(server: Live):
    turns = [*HI, {"role": "assistant", "content": "Hello"}]
    with server.http as client:
        body = {"messages": turns, "add_generation_prompt": False}
        over = client.post("/tokenize", json=body).json()["tokens"]
        more = client.post("/tokenize", json={"messages": turns}).json()["tokens"]
    assert more[: len(over)] == over
    assert len(more) > len(over)


def test_no_special_token_is_added_to_a_text(server: Live):
    with server.http as client:
        bodies = [{"prompt": "a"}, *({"prompt": "a", "add_special_tokens": on} for on in (0, 1))]
        answers = [client.post("/v1/tokenize", json=body).json() for body in bodies]
        again = client.post("/v1/detokenize", json={"tokens": answers[0]["tokens"]})
    assert answers[1:] == answers[:1] * 2
    assert again.json() == {"text": "a"}


def test_texts_of_tokens(server: Live):
    with server.http as client:
        body = {"prompt": "hi 🎉<|user|>", "return_token_strs": True, "chat_template": None}
        one = client.post("/tokenize", json=body).json()
        two = client.post("/tokenize", json=body | {"prompt": ["hi", ""]}).json()
        plain = client.post("/tokenize", json=body | {"return_token_strs": False}).json()
    assert len(one["token_strs"]) == one["count"]
    assert one["token_strs"][:2] == ["hi", " "]
    assert one["token_strs"][-1] == "<|user|>"
    assert two["token_strs"] == [["hi"], []]
    assert "token_strs" not in plain


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": "a", "messages": HI}, "prompt", "not both"),
        ({"messages": None}, "prompt", "either prompt or messages is required"),
        ({"prompt": "a", "tools": []}, "tools", "tools goes with messages"),
        ({"prompt": ["a"], "enable_thinking": True}, "enable_thinking", "goes with messages"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": [{"role": "robot"}]}, "messages", "'robot'"),
        ({"messages": HI, "tools": [5]}, "tools", "tools[0]"),
        ({"messages": HI, "max_tokens": 5}, "max_tokens", "not permitted"),
    ],
)
def test_what_cannot_be_tokenized(server: Live, body: dict[str, Any], param: str, words: str):
    with server.http as client:
        response = client.post("/tokenize", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_health_and_information(server: Live):
    with server.http as client:
        for path in ("/health", "/health_generate"):
            assert client.get(path).json() == {"status": "running"}
        info = client.get("/get_server_info").json()
        assert client.get("/server_info").json().keys() == info.keys()
    assert info["served_model_name"] == "tiny-glm"
    assert info["internal_states"][0]["num_running_reqs"] == 0
    assert info["max_running_requests"] == 8


def test_too_many_choices_over_all_prompts(server: Live):
    body = {"text": ["a"] * 100, "sampling_params": {"n": 100, "max_new_tokens": 1}}
    with server.http as client:
        refused = client.post("/generate", json=body)
    assert refused.status_code == 400
    assert "10000 choices" in refused.json()["error"]["message"]


def test_a_body_without_end(server: Live):
    def pieces():
        yield b'{"text": "'
        for _ in range(40):
            yield b"a" * 2**20
        yield b'"}'

    with server.http as client:
        headers = {"content-type": "application/json"}
        refused = client.post("/generate", content=pieces(), headers=headers)
    assert refused.status_code == 413
    assert "above 33554432 bytes" in refused.json()["error"]["message"]
