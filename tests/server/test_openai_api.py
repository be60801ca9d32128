"""OpenAI's API through OpenAI's own client."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import openai
import pytest
from live import DRAFTS, Live, live, oracle
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params

from glmjax.server import unserved
from glmjax.server.openai.requests import ChatRequest, CompletionRequest
from glmjax.server.served import ServedModel

HI = [{"role": "user", "content": "hi"}]
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


def chat(server: Live, client: openai.OpenAI, **options) -> Any:
    options = {"messages": HI, "max_tokens": 24} | GREEDY | options
    return client.chat.completions.create(model=server.model, **options)


def complete(server: Live, client: openai.OpenAI, **options) -> Any:
    options = {"prompt": "hello", "max_tokens": 24} | GREEDY | options
    return client.completions.create(model=server.model, **options)


def chat_ids(server: Live, **variables) -> list[int]:
    return server.frontend.served.chat_prompt(HI, **variables)


def text_of(server: Live, ids: list[int]) -> str:
    return server.frontend.served.tokenizer.decode(ids)


def streamed(chunks: Any) -> tuple[dict[int, str], dict[int, str]]:
    """Text and finish reason of each choice of a stream."""
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            piece = choice.text if hasattr(choice, "text") else choice.delta.content
            assert choice.index not in ends, "text after the end"
            texts[choice.index] = texts.get(choice.index, "") + (piece or "")
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    return texts, ends


def test_chat_is_the_models_answer(server: Live):
    with server.openai as client:
        answer = chat(server, client)
    expected = oracle(chat_ids(server), 24)
    assert answer.choices[0].message.content == text_of(server, expected)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(chat_ids(server)), 24)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert answer.model == server.model


@pytest.mark.parametrize("prompt", ["hello", "a", "é€🎉 and more", "<|user|>\nhi<|assistant|>"])
@pytest.mark.parametrize("n", [1, 3])
def test_streaming_equals_one_shot(server: Live, prompt: str, n: int):
    with server.openai as client:
        for ask, options in (
            (chat, {"messages": [{"role": "user", "content": prompt}]}),
            (complete, {"prompt": prompt}),
        ):
            options |= {"n": n, "seed": 5, "temperature": 0.7, "max_tokens": 40}
            whole = ask(server, client, **options)
            texts, ends = streamed(ask(server, client, stream=True, **options))
            assert ends == {c.index: c.finish_reason for c in whole.choices}
            words = [c.text if hasattr(c, "text") else c.message.content for c in whole.choices]
            assert [texts[i] for i in range(n)] == words
            assert len(set(words)) == n


def test_the_models_end_token_ends_it_and_is_no_text(server: Live):
    served = server.frontend.served
    for seed in range(200):
        ids = oracle(chat_ids(server), 60, seed, served.eos_token_ids)
        if len(ids) < 60:
            break
    with server.openai as client:
        answer = chat(server, client, seed=seed, max_tokens=60, extra_body={}, temperature=1)
    choice = answer.choices[0]
    assert choice.message.content == text_of(server, ids[:-1])
    assert (choice.finish_reason, choice.matched_stop) == ("stop", ids[-1])
    assert answer.usage.completion_tokens == len(ids)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text(server: Live, stream: bool):
    full = text_of(server, oracle(chat_ids(server), 24))
    with server.openai as client:
        for begin in range(2, len(full) - 3, 4):
            stop = full[begin : begin + 3]
            answer = chat(server, client, stop=["never \n seen", stop], stream=stream)
            if stream:
                texts, ends = streamed(answer)
                text, end = texts[0], ends[0]
            else:
                text, end = answer.choices[0].message.content, answer.choices[0].finish_reason
                assert answer.choices[0].matched_stop == stop
            assert (text, end) == (full[: full.index(stop)], "stop")
    server.wait_idle()


def test_stop_token_ids(server: Live):
    ids = oracle(chat_ids(server), 24)
    with server.openai as client:
        body = {"ignore_eos": True, "stop_token_ids": [ids[6]]}
        answer = chat(server, client, extra_body=body)
    assert answer.choices[0].message.content == text_of(server, ids[: ids.index(ids[6])])
    assert answer.choices[0].finish_reason == "stop"


def test_usage_at_the_end_of_a_stream(server: Live):
    with server.openai as client:
        options = {"stream": True, "stream_options": {"include_usage": True}, "n": 2}
        *chunks, last = chat(server, client, **options)
        assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
        assert last.choices == []
        usage = last.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(chat_ids(server)), 48)
        whole = chat(server, client, n=2).usage
        assert usage.total_tokens == whole.total_tokens
        assert whole.prompt_tokens_details.cached_tokens == usage.prompt_tokens // 16 * 16
        assert all(chunk.usage is None for chunk in chat(server, client, stream=True))


@pytest.mark.parametrize("ask", [chat, complete])
def test_usage_all_along_a_stream(server: Live, ask: Any):
    usage = {"include_usage": True, "continuous_usage_stats": True}
    with server.openai as client:
        chunks = list(ask(server, client, stream=True, stream_options=usage, n=2))
        counts = [chunk.usage.completion_tokens for chunk in chunks]
        assert counts == sorted(counts)
        assert (counts[0] < 3, counts[-1], len(set(counts)) > 8) == (True, 48, True)
        assert chunks[-1].choices == []
        for options in ({"continuous_usage_stats": True}, {"include_obfuscation": False}):
            plain = ask(server, client, stream=True, stream_options=options)
            assert all(chunk.usage is None for chunk in plain)


def test_drafts_in_the_usage(server: Live):
    counters = server.frontend.engine.snapshot
    server.wait_idle()
    before = counters().counters
    with server.openai as client:
        usage = complete(server, client, max_tokens=100, n=2).usage
    server.wait_idle()
    after = counters().counters
    details = usage.completion_tokens_details
    accepted, rejected = details.accepted_prediction_tokens, details.rejected_prediction_tokens
    # what a step in flight drafted is counted there after its request has ended
    late = sum(after.drafted) - sum(before.drafted) - accepted - rejected
    assert 0 <= late <= 2 * DRAFTS
    assert 0 <= sum(after.accepted) - sum(before.accepted) - accepted <= late
    assert accepted > 0
    drafts = usage.model_extra["speculative_decoding"]
    assert round((drafts["mean_accepted_length"] - 1) * drafts["verifications"]) == accepted
    assert len(drafts["acceptance"]) == DRAFTS


def test_prompts_of_every_form(server: Live):
    tokenizer = server.frontend.served.tokenizer
    texts = ["hello", "world"]
    ids = tokenizer.encode_batch(texts)
    expected = [text_of(server, oracle(prompt, 8)) for prompt in ids]
    with server.openai as client:
        for prompt, count in (("hello", 1), (ids[0], 1), (texts, 2), (ids, 2), ([ids[0]], 1)):
            answer = complete(server, client, prompt=prompt, max_tokens=8)
            assert [choice.text for choice in answer.choices] == expected[:count]
        answer = complete(server, client, prompt=texts, max_tokens=8, n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [answer.choices[i].text for i in (0, 2)] == expected
        assert answer.usage.prompt_tokens == sum(map(len, ids)), "a prompt counts once"
        assert len(complete(server, client, max_tokens=None).choices[0].text) > 0
        assert complete(server, client, max_tokens=None).usage.completion_tokens == 16


def test_seeds(server: Live):
    with server.openai as client:
        ask = {"temperature": 1.0, "n": 4}

        def texts(**options) -> list[str]:
            return [c.message.content for c in chat(server, client, **ask, **options).choices]

        first = texts(seed=1)
        assert len(set(first)) == 4, "each choice has a seed of its own"
        assert first == texts(seed=1) != texts(seed=2)
        assert chat(server, client, temperature=1.0, seed=1).choices[0].message.content == first[0]
        assert texts(seed=-1) == texts(seed=2**32 - 1), "seeds count modulo 2**32"
        assert set(texts()).isdisjoint(texts()), "without a seed every request has its own"
        greedy = [c.message.content for c in chat(server, client, n=1).choices]
        assert greedy[0] == text_of(server, oracle(chat_ids(server), 24, seed=0))


def test_every_field_of_the_client_is_known():
    """It is served, changes nothing, or is refused with a word of why."""
    chats = set(chat_params.CompletionCreateParamsBase.__annotations__)
    texts = set(text_params.CompletionCreateParamsBase.__annotations__)
    assert chats - {"stream"} <= {*ChatRequest.model_fields, *unserved.CHAT}
    assert texts - {"stream"} <= {*CompletionRequest.model_fields, *unserved.COMPLETION}


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        ({}, {}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        ({"enable_thinking": False}, {"enable_thinking": False}),
        ({"reasoning_effort": "none"}, {"enable_thinking": False}),
        ({"reasoning_effort": "none", "enable_thinking": True}, {}),
        ({"reasoning": {"effort": "none"}}, {"enable_thinking": False}),
        ({"reasoning": {"enabled": False}}, {"enable_thinking": False}),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
    ],
)
def test_what_the_template_is_told(server: Live, options: dict, variables: dict):
    with server.openai as client:
        answer = chat(server, client, extra_body={"ignore_eos": True} | options)
    expected = oracle(chat_ids(server, **variables), 24)
    assert answer.choices[0].message.content == text_of(server, expected)


def test_limits(server: Live):
    with server.openai as client:
        for limits in ({"max_tokens": 3}, {"max_tokens": 9, "max_completion_tokens": 3}):
            assert chat(server, client, **limits).usage.completion_tokens == 3
        prompt = list(range(10)) * 400
        answer = complete(server, client, prompt=prompt, max_tokens=96)
        assert answer.usage.total_tokens == 4096 == server.frontend.served.max_seq_len


def test_special_tokens_are_shown_where_asked(served: ServedModel):
    script = served.tokenizer.encode("a<|system|>b<think>c")
    with live(served, script=script) as server, server.openai as client:
        assert chat(server, client, max_tokens=5).choices[0].message.content == "ab<think>c"
        body = {"ignore_eos": True, "skip_special_tokens": False}
        answer = chat(server, client, max_tokens=5, extra_body=body)
        assert answer.choices[0].message.content == "a<|system|>b<think>c"


def test_emoji_split_over_tokens_come_whole(served: ServedModel):
    tokenizer = served.tokenizer
    script = tokenizer.encode("é€🎉!")
    assert len(script) == 10, "one token a byte"
    with live(served, script=script) as server, server.openai as client:
        chunks = list(chat(server, client, max_tokens=10, stream=True))
        assert [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content] == list(
            "é€🎉!"
        )
        cut = list(chat(server, client, max_tokens=8, stream=True))
        assert streamed(cut)[0] == {0: "é€\ufffd"}
        answer = chat(server, client, max_tokens=10, stop="🎉")
        assert answer.choices[0].message.content == "é€"
        assert answer.usage.completion_tokens == 9


def test_many_clients_at_once(server: Live):
    prompts = [[i, i + 1, i + 2] for i in range(24)]

    async def main() -> list[str]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:

            async def ask(i: int) -> str:
                options: dict[str, Any] = {"prompt": prompts[i], "max_tokens": 20} | GREEDY
                if i % 2:
                    answer = await client.completions.create(model=server.model, **options)
                    return answer.choices[0].text
                stream = await client.completions.create(model=server.model, stream=True, **options)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(ask, range(len(prompts))))

    expected = [text_of(server, oracle(prompt, 20)) for prompt in prompts]
    assert asyncio.run(main()) == expected


def test_models(server: Live):
    with server.openai as client:
        assert [model.id for model in client.models.list()] == ["tiny-glm"]
        assert client.models.retrieve("tiny-glm").id == "tiny-glm"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("org/other")


def test_the_models_own_defaults(served: ServedModel):
    with (
        live(replace(served, default_sampling={"temperature": 0.0})) as server,
        server.openai as client,
    ):
        greedy = text_of(server, oracle(chat_ids(server), 24))
        body = {"ignore_eos": True}
        answer = chat(server, client, temperature=None, extra_body=body)
        assert answer.choices[0].message.content == greedy
        answer = chat(server, client, temperature=1.0, seed=3, extra_body=body)
        assert answer.choices[0].message.content != greedy
