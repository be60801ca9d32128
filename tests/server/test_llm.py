"""glmjax.LLM over a runner that needs no device: what it passes on, and what it gives back."""

from __future__ import annotations

import gc
import json
import re
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from live import PacedRunner, make_engine, oracle

import glmjax.llm
from glmjax.errors import ConfigError, EngineStoppedError, InvalidRequestError, RequestFailedError
from glmjax.llm import LLM, Completion
from glmjax.runner.fake import token_logprob
from glmjax.server.served import ServedModel
from glmjax.types import FinishReason

PROMPT = list(range(1, 50))
GREEDY = {"temperature": 0, "ignore_eos": True, "seed": 0}


@pytest.fixture
def parts(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> tuple[LLM, PacedRunner]:
    engine, runner = make_engine(served)
    made = [engine]
    del engine  # so that the LLM alone holds it
    monkeypatch.setattr(glmjax.llm, "build", lambda *_, **__: (made.pop(), served))
    return LLM(served.folder), runner


@pytest.fixture
def llm(parts: tuple[LLM, PacedRunner]) -> Iterator[LLM]:
    with parts[0] as model:
        yield model


def one(llm: LLM, prompt: list[int] | str = PROMPT, **options) -> Completion:
    answer = llm.generate(prompt, **options)
    assert isinstance(answer, Completion)
    return answer


def test_log_probabilities(llm: LLM):
    done = one(llm, max_new_tokens=6, logprobs=2, prompt_logprobs_start=0, **GREEDY)
    assert list(done.token_ids) == oracle(PROMPT, 6)
    tokens = np.array([*PROMPT, *done.token_ids], np.int32)
    expected = [token_logprob(tokens[:n], int(tokens[n])) for n in range(1, len(tokens))]
    first, *prompt = done.prompt_logprobs
    assert first is None
    found = [each.logprob for each in (*prompt, *done.logprobs) if each]
    assert found == pytest.approx(expected)
    assert all(len(each.top) == 2 for each in done.logprobs)
    plain = one(llm, max_new_tokens=6, **GREEDY)
    assert plain.logprobs == plain.prompt_logprobs == ()


def test_a_stop_string_cuts_log_probabilities_too(llm: LLM):
    whole = one(llm, max_new_tokens=30, logprobs=0, **GREEDY)
    cut = one(llm, max_new_tokens=30, logprobs=0, stop=whole.text[3:5], **GREEDY)
    assert cut.finish_reason is FinishReason.STOP
    assert len(cut.token_ids) < 30
    assert cut.logprobs == whole.logprobs[: len(cut.token_ids)]


def test_how_it_was_computed(llm: LLM):
    first, second = (one(llm, max_new_tokens=40, **GREEDY) for _ in range(2))
    assert (first.cached_tokens, second.cached_tokens) == (0, 48)
    assert 0 < first.accepted_tokens < first.drafted_tokens
    assert first == second, "which makes no difference"
    llm.flush_cache()
    assert one(llm, **GREEDY, max_new_tokens=1).cached_tokens == 0


def test_versions_of_weights(llm: LLM):
    old = one(llm, max_new_tokens=5, **GREEDY)
    llm.update_params(7, "after a step")
    new = one(llm, max_new_tokens=5, **GREEDY)
    assert list(new.token_ids) == oracle(PROMPT, 5, seed=7)
    assert (old.weight_version, new.weight_version) == ("default", "after a step")
    with pytest.raises(ConfigError):
        llm.update_params("seven", "never")
    assert one(llm, max_new_tokens=5, **GREEDY) == new
    llm.update_params(0)
    assert one(llm, max_new_tokens=5, **GREEDY) == old
    assert one(llm, max_new_tokens=5, **GREEDY).weight_version not in ("default", "after a step")


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
SCHEMA |= {"additionalProperties": False}


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({"regex": r"[ab]{3,5}!"}, lambda text: re.fullmatch(r"[ab]{3,5}!", text)),
        ({"grammar": 'start: ("x" | "yy")+ "."'}, lambda text: re.fullmatch(r"(x|yy)+\.", text)),
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"choice": "maybe"}, lambda text: text == "maybe"),
        ({"json_schema": SCHEMA}, lambda text: type(json.loads(text)["n"]) is int),
        ({"json_schema": json.dumps(SCHEMA)}, lambda text: type(json.loads(text)["n"]) is int),
    ],
)
def test_constraints(llm: LLM, options, fits):
    prompts = [[n, n + 1] for n in range(1, 9)]
    answers = llm.generate(prompts, max_new_tokens=400, seed=3, **options)
    assert isinstance(answers, list)
    ended = [a.text for a in answers if a.finish_reason is FinishReason.STOP]
    assert len(ended) >= 4, "numbers may go on for long"
    assert all(map(fits, ended)), ended


def test_a_constraint_after_thinking(llm: LLM):
    end = llm.served.tokenizer.token_id("</think>")
    answers = llm.generate(
        [[n] for n in range(1, 9)],
        max_new_tokens=2000,
        seed=1,
        logit_bias={end: 5.0},
        ignore_eos=False,
        choice=["yes"],
        after_thinking=True,
    )
    assert isinstance(answers, list)
    thoughts = [list(a.token_ids) for a in answers if end in a.token_ids]
    assert thoughts
    decode = llm.served.tokenizer.decode
    for ids in thoughts:
        assert decode(ids[ids.index(end) + 1 :]) == "yes"


@pytest.mark.parametrize(
    ("options", "message", "param"),
    [
        ({"regex": "a", "choice": ["b"]}, "regex and choice are given", None),
        ({"regex": "("}, "regex", "regex"),
        ({"grammar": "start: missing"}, "missing", "grammar"),
        ({"json_schema": {"type": "nothing"}}, "nothing", "json_schema"),
        ({"choice": []}, "choice", "choice"),
    ],
)
def test_constraints_that_cannot_be(parts, options, message, param):
    llm, runner = parts
    with pytest.raises(InvalidRequestError, match=message) as caught:
        llm.generate(["a", "b"], **options)
    assert caught.value.param == param
    assert runner.launched == 0


def test_a_step_that_fails(parts):
    llm, runner = parts
    runner.broken = True
    with pytest.raises(RequestFailedError, match=r"prompt \d: .*the device is on fire"):
        llm.generate([PROMPT, [1, 2]], max_new_tokens=5, **GREEDY)
    runner.broken = False
    assert list(one(llm, max_new_tokens=5, **GREEDY).token_ids) == oracle(PROMPT, 5)


def test_closing_lets_the_engine_go(parts):
    llm, _ = parts
    engine = weakref.ref(llm._engine)
    with llm:
        assert one(llm, max_new_tokens=1).token_ids
        assert engine() is not None
    gc.collect()
    assert engine() is None
    for call in (lambda: llm.generate("a"), llm.flush_cache, lambda: llm.update_params(1)):
        with pytest.raises(EngineStoppedError, match="closed; make a new one"):
            call()
    llm.close()
