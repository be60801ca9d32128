"""A KV pool in FP8: half the bytes, near the same answers, and as exact about who shares what."""

from __future__ import annotations

import numpy as np
import pytest
from answers import ask, tokens_of
from tiny import TINY

from glmjax.engine import Engine
from glmjax.runner.runner import DeviceRunner
from glmjax.scheduler.drafting import Drafting
from glmjax.types import Request, SamplingParams

SAMPLING = SamplingParams(max_new_tokens=10, temperature=0.0, ignore_eos=True, logprobs=0)


@pytest.fixture(scope="module")
def fp8(make_runner) -> DeviceRunner:
    """In float32 but for its pool, with two drafts."""
    return make_runner(drafts=2, kv="fp8_e4m3")


def requests(count: int = 5) -> list[Request]:
    rng = np.random.default_rng(0)
    prompts = (rng.integers(0, TINY.vocab_size, 5 + 9 * i).tolist() for i in range(count))
    return [Request(str(i), tuple(prompt), SAMPLING) for i, prompt in enumerate(prompts)]


def test_the_pool_takes_a_byte_a_value(fp8):
    kv, limits = fp8._state.kv, fp8.limits
    token_bytes = TINY.kv_bytes_per_token(drafting=True) // 4
    assert kv.k.nbytes + kv.v.nbytes == limits.pages * limits.page_size * token_bytes


def test_answers_are_near_those_of_an_exact_pool(fp8, oracle):
    """FP8's half step is 1 part in 16 at most; it moves logits, by little, and never to NaN."""
    errors = []
    for asked, answer in zip(requests(), ask(Engine(fp8), requests()).values(), strict=True):
        logits = oracle.logits([*asked.prompt_ids, *answer.tokens])[len(asked.prompt_ids) - 1 : -1]
        expected = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        chosen = expected[np.arange(len(answer.tokens)), answer.tokens]
        errors += np.abs(chosen - [place.logprob for place in answer.logprobs]).tolist()
    assert 1e-3 < np.median(errors) < 0.3


def test_what_is_cached_or_alone_is_the_same(fp8):
    """Chunks read their own keys from the pool too, so nothing depends on how a text was cut."""
    together = ask(Engine(fp8), requests())
    engine = Engine(fp8)
    for asked in requests():
        first = ask(engine, [asked])[asked.id]
        again = ask(engine, [asked])[asked.id]
        assert again.cached > 0 or len(asked.prompt_ids) < 8
        assert first.tokens == again.tokens == together[asked.id].tokens


def test_drafts_change_nothing(fp8, monkeypatch):
    found = []
    for pays in (True, False):
        monkeypatch.setattr(Drafting, "pays", lambda *_, pays=pays: pays)
        found.append(ask(Engine(fp8), requests()))
    drafting, plain = found
    assert sum(answer.accepted for answer in drafting.values()) > 10
    assert not sum(answer.drafted for answer in plain.values())
    assert tokens_of(drafting) == tokens_of(plain)
