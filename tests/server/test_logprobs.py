"""Log probabilities and echo, in the words of each API."""

from __future__ import annotations

import codecs
from typing import Any

import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Live, live, oracle

from glmjax.bench.synthetic import make_tokenizer
from glmjax.runner.fake import token_logprob
from glmjax.server.logprob_words import Offsets, Place, chat_words, completion_words, token_name
from glmjax.server.served import ServedModel
from glmjax.text.tokenizer import Tokenizer
from glmjax.types import TokenLogprobs

TOKENIZER = Tokenizer(make_tokenizer(512))
PROMPT = [80, 90, 100]
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


def expected(prompt: list[int], count: int) -> tuple[list[int], list[float], list[list[float]]]:
    """Tokens that follow a prompt, their log probabilities, and those of tokens 0 to 4 there."""
    ids = oracle(prompt, count)
    seen = [np.array(prompt + ids[:n]) for n in range(count)]
    own = [token_logprob(s, i) for s, i in zip(seen, ids, strict=True)]
    return ids, own, [[token_logprob(s, other) for other in range(5)] for s in seen]


def near(values: Any) -> Any:
    return pytest.approx(values, abs=1e-5)


def complete(server: Live, client: openai.OpenAI, **options: Any) -> Any:
    options = {"prompt": PROMPT, "max_tokens": 6} | GREEDY | options
    return client.completions.create(model=server.model, **options)


# OpenAI, chat


def test_chat(server: Live):
    messages: Any = [{"role": "user", "content": "hi"}]
    served = server.frontend.served
    prompt = served.chat_prompt(messages)
    ids, own, top = expected(prompt, 8)
    with server.openai as client:

        def chat(**options: Any) -> Any:
            return client.chat.completions.create(
                model=server.model, messages=messages, max_tokens=8, **GREEDY, **options
            )

        content = chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
        assert [c.logprob for c in content] == near(own)
        assert [bytes(c.bytes) for c in content] == [served.tokenizer.token_bytes(i) for i in ids]
        assert [c.token for c in content] == [token_name(served.tokenizer, i) for i in ids]
        assert [[t.logprob for t in c.top_logprobs] for c in content] == [near(t[:3]) for t in top]
        names = [served.tokenizer.decode([i]) for i in range(3)]
        assert all([t.token for t in c.top_logprobs] == names for c in content)

        bare = chat(logprobs=True).choices[0].logprobs.content
        assert [(c.token, c.logprob) for c in bare] == [(c.token, c.logprob) for c in content]
        assert all(c.top_logprobs == [] for c in bare)
        assert chat().choices[0].logprobs is None

        pieces = [
            piece
            for chunk in chat(logprobs=True, top_logprobs=3, stream=True)
            for piece in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())
        ]
        assert pieces == content


def test_tokens_after_a_stop_string_have_no_logprobs(served: ServedModel):
    script = served.tokenizer.encode("abSTOPcdefghijkl")
    with live(served, script=script) as server, server.openai as client:
        for stream in (False, True):
            answer = complete(server, client, logprobs=0, stop="STOP", max_tokens=16, stream=stream)
            choices = [a.choices[0] for a in answer] if stream else [answer.choices[0]]
            tokens = [t for c in choices if c.logprobs for t in c.logprobs.tokens]
            assert "".join(c.text for c in choices) == "ab"
            assert "".join(tokens).startswith("abSTOP"[:-1])
            assert "STOP" in "".join(tokens)
            assert "STOP" not in "".join(tokens[:-1])
            if not stream:
                assert answer.usage.completion_tokens == len(tokens)


# OpenAI, completions


def test_completions(server: Live):
    served = server.frontend.served
    ids, own, top = expected(PROMPT, 6)
    with server.openai as client:
        choice = complete(server, client, logprobs=2).choices[0]
        found = choice.logprobs
        assert found.token_logprobs == near(own)
        for place, t, o in zip(found.top_logprobs, top, own, strict=True):
            assert (place["!"], place['"']) == (near(t[0]), near(t[1]))
            assert o in [near(value) for value in place.values()]
            assert len(place) <= 3
        assert choice.text == served.tokenizer.decode(ids)
        assert found.text_offset[0] == 0
        whole = complete(server, client, logprobs=2)
        joined = [c.choices[0] for c in complete(server, client, logprobs=2, stream=True)]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            pieces = [x for c in joined if c.logprobs for x in getattr(c.logprobs, name)]
            assert pieces == getattr(whole.choices[0].logprobs, name)


@pytest.mark.parametrize("stream", [False, True])
def test_echo(server: Live, stream: bool):
    tokenizer = server.frontend.served.tokenizer
    prompts = ["hello <|user|> é", "two"]
    answers = [tokenizer.decode(oracle(ids, 6)) for ids in tokenizer.encode_batch(prompts)]
    with server.openai as client:
        answer = complete(server, client, prompt=prompts, echo=True, n=2, stream=stream)
        texts = dict.fromkeys(range(4), "")
        for part in answer if stream else [answer]:
            for choice in part.choices:
                texts[choice.index] += choice.text
                assert choice.logprobs is None
    assert texts[0] == prompts[0] + answers[0]
    assert texts[2] == prompts[1] + answers[1]
    assert texts[1].startswith(prompts[0])
    assert texts[3].startswith(prompts[1])


def test_echo_with_logprobs(server: Live):
    prompt = server.frontend.served.tokenizer.encode("hello world, hello")
    known = [token_logprob(np.array(prompt[:n]), prompt[n]) for n in range(1, len(prompt))]
    _, own, _ = expected(prompt, 3)
    with server.openai as client:
        options: Any = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 3}
        for _ in range(2):  # the second time the prompt could come from the cache
            choice = complete(server, client, **options).choices[0]
            found = choice.logprobs
            assert found.token_logprobs == [None, *map(near, [*known, *own])]
            assert found.top_logprobs[0] is None
            ends = [*found.text_offset[1:], len(choice.text)]
            spans = [choice.text[a:b] for a, b in zip(found.text_offset, ends, strict=True)]
            whole = [i for i, token in enumerate(found.tokens) if "bytes:" not in token]
            assert [spans[i] for i in whole] == [found.tokens[i] for i in whole]
            assert set(range(len(prompt))) <= set(whole)
        joined = [c.choices[0] for c in complete(server, client, stream=True, **options)]
        assert "".join(c.text for c in joined) == choice.text
        offsets = [x for c in joined if c.logprobs for x in c.logprobs.text_offset]
        assert offsets == found.text_offset


@pytest.mark.parametrize("stream", [False, True])
def test_echo_of_the_prompt_alone(server: Live, stream: bool):
    options: Any = {"echo": True, "logprobs": 1, "max_tokens": 0, "stream": stream}
    with server.openai as client:
        answer = complete(server, client, **options)
        parts = list(answer) if stream else [answer]
    choices = [choice for part in parts for choice in part.choices]
    tokenizer = server.frontend.served.tokenizer
    assert "".join(c.text for c in choices) == tokenizer.decode(PROMPT)
    found = [x for c in choices if c.logprobs for x in c.logprobs.token_logprobs]
    own = [token_logprob(np.array(PROMPT[:n]), PROMPT[n]) for n in (1, 2)]
    assert found == [None, *map(near, own)]
    assert choices[-1].finish_reason == "length"
    if not stream:
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 0)


def test_what_lm_eval_asks(server: Live):
    """Its local-completions model: batches of ids, one token more than it reads."""
    prompts, context = [[5, 6, 7, 8], [100, 101, 102]], 2
    with server.http as client:
        body = {"model": server.model, "prompt": prompts, "temperature": 0, "max_tokens": 1}
        body |= {"logprobs": 1, "seed": 1234, "echo": True}
        choices = client.post("/v1/completions", json=body).json()["choices"]
    for prompt, choice in zip(prompts, choices, strict=True):
        found = choice["logprobs"]
        own = found["token_logprobs"][context:-1]
        wanted = [token_logprob(np.array(prompt[:n]), prompt[n]) for n in range(2, len(prompt))]
        assert own == [near(value) for value in wanted]
        tops = found["top_logprobs"][context:-1]
        assert len(tops) == len(own)
        assert all(value in top.values() for value, top in zip(own, tops, strict=True))


# SGLang


def test_generate(server: Live):
    ids, own, top = expected(PROMPT, 5)
    sampling = {"temperature": 0, "max_new_tokens": 5, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True}

    def meta(**fields: Any) -> dict[str, Any]:
        with server.http as client:
            return client.post("/generate", json=body | fields).json()["meta_info"]

    bare = meta()
    assert bare["output_token_logprobs"] == [
        [near(o), i, None] for o, i in zip(own, ids, strict=True)
    ]
    assert bare["input_token_logprobs"] == []
    assert "output_top_logprobs" not in bare

    full = meta(logprob_start_len=1, top_logprobs_num=2, return_text_in_logprobs=True)
    names = [token_name(server.frontend.served.tokenizer, i) for i in range(2)]
    assert full["output_top_logprobs"] == [
        [[near(t[n]), n, names[n]] for n in range(2)] for t in top
    ]
    known = [token_logprob(np.array(PROMPT[:n]), PROMPT[n]) for n in (1, 2)]
    assert [[*t[:2]] for t in full["input_token_logprobs"]] == [
        [near(k), i] for k, i in zip(known, PROMPT[1:], strict=True)
    ]
    assert [len(t) for t in full["input_top_logprobs"]] == [2, 2]

    first = meta(logprob_start_len=0, top_logprobs_num=1)
    assert first["input_token_logprobs"][0] == [None, PROMPT[0], None]
    assert first["input_top_logprobs"][0] is None
    assert "output_token_logprobs" not in meta(return_logprob=False, top_logprobs_num=2)


def test_generate_lists_for_each_prompt(server: Live):
    body = {
        "input_ids": [[1, 2], [3, 4, 5]],
        "sampling_params": {"max_new_tokens": 3, "ignore_eos": True},
        "return_logprob": [True, False],
        "logprob_start_len": [0, 0],
        "top_logprobs_num": [1, 0],
    }
    with server.http as client:
        one, two = (a["meta_info"] for a in client.post("/generate", json=body).json())
        assert len(one["input_token_logprobs"]) == 2
        assert [len(t) for t in one["output_top_logprobs"]] == [1, 1, 1]
        assert "output_token_logprobs" not in two
        error = client.post("/generate", json=body | {"return_logprob": [True]}).json()["error"]
    assert error["param"] == "return_logprob"
    assert "1 return_logprob for 2 prompts" in error["message"]


def test_generate_nothing_but_scores(server: Live):
    body = {
        "input_ids": PROMPT,
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    with server.http as client:
        answer = client.post("/generate", json=body).json()
    assert (answer["text"], answer["output_ids"]) == ("", [])
    meta = answer["meta_info"]
    assert [i for _, i, _ in meta["input_token_logprobs"]] == PROMPT
    assert meta["output_token_logprobs"] == []
    assert meta["completion_tokens"] == 0


# Words


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 511), max_size=30), skip=st.booleans(), start=st.integers(0, 9))
def test_offsets_cut_the_text_into_its_tokens(ids: list[int], skip: bool, start: int):
    half = len(ids) // 2
    offsets = Offsets(TOKENIZER, skip, start)
    places = [
        *offsets.places(ids[:half], [None] * half),
        *offsets.places(ids[half:], [None] * (len(ids) - half)),
    ]
    assert [place.token_id for place in places] == ids
    skipped = TOKENIZER.special_ids if skip else frozenset()
    for n, place in enumerate(places):
        data = b"".join(TOKENIZER.token_bytes(i) for i in ids[:n] if i not in skipped)
        sure = codecs.getincrementaldecoder("utf-8")("replace").decode(data)
        assert place.offset == start + len(sure)


def test_half_characters_have_names_that_differ():
    first, second = (TOKENIZER.encode("é")[n] for n in (0, 1))
    assert TOKENIZER.decode([first]) == TOKENIZER.decode([second]) == "\ufffd"
    logprobs = TokenLogprobs(-2.0, ((second, -1.0), (first, -2.0)))
    words = completion_words(TOKENIZER, [Place(first, logprobs)])
    assert words["tokens"] == [r"bytes:\xc3"]
    assert words["top_logprobs"] == [{r"bytes:\xa9": -1.0, r"bytes:\xc3": -2.0}]
    (content,) = chat_words(TOKENIZER, [Place(first, logprobs)])["content"]
    assert (content["token"], content["bytes"]) == (r"\xc3", [0xC3])
