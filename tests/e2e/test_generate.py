"""glmjax.generate and glmjax.LLM, as from a notebook."""

from __future__ import annotations

import numpy as np
import pytest

import glmjax
from cases import GOLDENS, served_prompts
from glmjax.bench.synthetic import default_config
from glmjax.config import MeshConfig
from glmjax.errors import ConfigError, InvalidRequestError
from glmjax.runner.runner import DeviceHandle
from glmjax.runner.weights import load
from glmjax.sharding import make_mesh

GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm(converted):
    scheduler = glmjax.SchedulerConfig(
        max_running_requests=4, max_queued_requests=2, chunked_prefill_size=16, max_seq_len=256
    )
    return glmjax.LLM(converted, scheduler=scheduler)


def test_token_ids_equal_transformers_and_keep_their_order(llm):
    expected = np.load(GOLDENS / "served.npz")["greedy"][:, :12].tolist()
    done = llm.generate(served_prompts(default_config()), **GREEDY)
    assert [list(completion.token_ids) for completion in done] == expected


def test_one_prompt_gives_one_completion_many_give_a_list(llm):
    one = llm.generate("Hello", **GREEDY)
    assert one.prompt_tokens == len(llm.served.tokenizer.encode("Hello"))
    assert one.text == llm.served.tokenizer.decode(one.token_ids)
    assert llm.generate(["Hello"], **GREEDY) == [one]
    assert llm.generate(llm.served.tokenizer.encode("Hello"), **GREEDY) == one


def test_chat_messages_go_through_the_template(llm):
    messages = [{"role": "user", "content": "Hello"}]
    prompt = "[gMASK]<sop><|user|>\nHello/nothink<|assistant|>\n<think></think>"
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    assert llm.generate(messages, **options, **GREEDY) == llm.generate(prompt, **GREEDY)
    assert llm.generate([messages], **options, **GREEDY) == [llm.generate(prompt, **GREEDY)]


def test_a_stop_string_ends_the_text_before_it(llm):
    whole = llm.generate("Hello", **GREEDY)
    stop = whole.text[3:5]
    cut = llm.generate("Hello", stop=stop, **GREEDY)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == glmjax.FinishReason.STOP
    assert len(cut.token_ids) < len(whole.token_ids)


def test_stop_token_ids_may_be_a_list(llm):
    whole = llm.generate("Hello", **GREEDY)
    cut = llm.generate("Hello", stop=None, stop_token_ids=[whole.token_ids[2]], **GREEDY)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert cut.token_ids[-1] == whole.token_ids[2]


def test_ctrl_c_leaves_a_model_that_works(llm, monkeypatch):
    whole, result, calls = llm.generate("Hello", **GREEDY), DeviceHandle.result, []

    def interrupted(handle):
        calls.append(handle)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return result(handle)

    monkeypatch.setattr(DeviceHandle, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Hello", "there"], **GREEDY)
    assert llm.generate("Hello", **GREEDY) == whole


def test_a_seed_repeats_a_sample_and_none_does_not(llm):
    sampled = {"temperature": 1.5, "max_new_tokens": 24, "ignore_eos": True}
    assert llm.generate("a", seed=1, **sampled) == llm.generate("a", seed=1, **sampled)
    assert llm.generate("a", seed=1, **sampled) != llm.generate("a", seed=2, **sampled)
    assert llm.generate("a", **sampled) != llm.generate("a", **sampled)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("a", {"temprature": 1}, "unknown sampling parameter.*temprature"),
        ("a", {"top_p": 0}, "top_p is 0"),
        ("a", {"stop": ""}, "stop"),
        ("", {}, "the prompt is empty"),
        ([99999], {}, "token id 99999"),
        ({1: 2}, {}, "prompts must be"),
        ([[1.5, 2]], {}, "prompts must be"),
        ([[{"role": "user", "content": "a"}, 5]], {}, "prompts must be"),
        ("a", {"max_new_tokens": "5"}, "max_new_tokens is '5'"),
        ("a", {"top_k": 2**31}, "top_k is 2147483648"),
        ("a", {"stop_token_ids": ["x"]}, "stop_token_ids is"),
        (["a", 5], {}, "prompts must be"),
        ([1] * 300, {}, "the prompt is too long: it has 300 tokens"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_runs(llm, prompts, options, message):
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate(prompts, **options)
    assert llm.generate("Hello", **GREEDY).token_ids


def test_other_weights_and_back(llm, converted):
    whole = llm.generate("Hello", **GREEDY)
    _, params = load(converted, make_mesh(MeshConfig()))
    llm.update_params(params | {"lm_head": -params["lm_head"]})
    other = llm.generate("Hello", **GREEDY)
    llm.update_params(params)
    assert llm.generate("Hello", **GREEDY) == whole != other


def test_generate_loads_a_model_for_one_call(converted):
    with pytest.raises(ConfigError, match="does not divide"):
        glmjax.generate("Hello", model=converted, mesh=3)
