"""What fails on the device ends the requests that had a part in it, and harms no other."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answers import ask
from tiny import TINY, TINY_SEED

from glmjax.engine import Engine
from glmjax.runner.runner import DeviceHandle
from glmjax.types import FinishReason, Request, SamplingParams

BROKEN = 21  # a token whose embedding is not finite
SOUND = [t for t in range(TINY.vocab_size) if t != BROKEN]
# Kept from being sampled; drafted it may be.
SAMPLING = SamplingParams(
    max_new_tokens=14, temperature=0.0, ignore_eos=True, logit_bias={BROKEN: -1e6}, logprobs=2
)


def sound(count: int) -> list[Request]:
    """Requests with prompts of 5 to 40 tokens, the longest first."""
    rng = np.random.default_rng(1)
    prompts = (rng.choice(SOUND, 40 - 5 * (i % 8)).tolist() for i in range(count))
    return [Request(str(i), tuple(p), SAMPLING) for i, p in enumerate(prompts)]


def broken(request: Request, at: int) -> Request:
    """A request that begins like another, up to the broken token at position `at`."""
    ids = (*request.prompt_ids[:at], BROKEN, *request.prompt_ids[at + 1 :])
    return replace(request, id="broken", prompt_ids=ids)


@pytest.fixture
def poisoned(drafting, make_params):
    """The runner with one row of the embedding that is not finite."""
    params = make_params(TINY_SEED)
    table = params["model"]["embed_tokens"]
    params["model"]["embed_tokens"] = table.at[BROKEN].set(jnp.nan)
    drafting.update_params(params)
    yield drafting
    drafting.update_params(make_params(TINY_SEED))


def check_all(oracle, requests, answers) -> None:
    for asked in requests:
        oracle.check(asked, answers[asked.id])


@pytest.mark.parametrize("at", [3, 20, 39])
def test_logits_that_are_not_finite_end_their_request_only(poisoned, oracle, at):
    engine, requests = Engine(poisoned), sound(6)
    bad = broken(requests[0], at)
    answers = ask(engine, [requests[0], bad, *requests[1:]])
    check_all(oracle, requests, answers)
    assert answers["broken"].reason is FinishReason.ABORT
    assert "not finite" in (answers["broken"].error or "")
    assert answers["broken"].tokens == []
    assert engine.counters().failed_requests == 1


def test_nothing_of_it_is_cached_and_the_next_are_exact(poisoned, oracle):
    engine, requests = Engine(poisoned), sound(3)
    bad = broken(requests[0], 20)
    for _ in range(2):
        again = ask(engine, [bad])["broken"]
        assert again.reason is FinishReason.ABORT
        assert "not finite" in (again.error or "")
        assert again.cached == 0
        assert engine.load().cached_tokens == 0
    for _ in range(2):
        check_all(oracle, requests, ask(engine, requests))


class Failing:
    """Calls something, but fails at one call, as XLA does: the state it was given is gone."""

    def __init__(self, call, at: int):
        self.call, self.left = call, at

    def __call__(self, *args):
        self.left -= 1
        if self.left:
            return self.call(*args)
        for leaf in jax.tree.leaves(args[1:2]):
            leaf.delete()
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")


def fail_launch(monkeypatch, runner, at: int) -> None:
    bucket = max(runner.limits.buckets)  # with chunks
    monkeypatch.setitem(runner._programs, bucket, Failing(runner._programs[bucket], at))


def fail_read(monkeypatch, runner, at: int) -> None:
    failing = Failing(DeviceHandle.result, at)
    monkeypatch.setattr(DeviceHandle, "result", lambda handle: failing(handle))


@pytest.mark.parametrize("fail", [fail_launch, fail_read])
@pytest.mark.parametrize("at", [1, 2, 7])
def test_a_step_that_fails_costs_its_own_requests_only(drafting, oracle, monkeypatch, fail, at):
    engine, requests = Engine(drafting), sound(8)
    with monkeypatch.context() as patch:
        fail(patch, drafting, at)
        answers = ask(engine, requests)
    failed = {id for id, answer in answers.items() if answer.error}
    assert 1 <= len(failed) <= drafting.limits.slots
    for id in failed:
        assert answers[id].reason is FinishReason.ABORT
        assert "RESOURCE_EXHAUSTED" in (answers[id].error or "")
    assert engine.counters().failed_requests == len(failed)
    check_all(oracle, [r for r in requests if r.id not in failed], answers)
    check_all(oracle, requests, ask(engine, requests))
