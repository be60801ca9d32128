"""Who starts, what need not be computed, and how much is computed twice when pages run out."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler.traffic import (
    VOCAB,
    CheckedRunner,
    Expected,
    check_accounting,
    make_engine,
    make_limits,
    request,
    run,
    script_drafting,
)

from glmjax.errors import InvalidRequestError, QueueFullError
from glmjax.plans import Limits
from glmjax.scheduler.admission import shared_pages
from glmjax.types import FinishReason, Request, SamplingParams


def text(seed: int, n: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(n)]


# what is shared


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_many_at_once_compute_their_common_prefix_once_a_group(groups, drafts):
    """1,000 tokens are 62 pages of 16, and 8 more that each computes with the 8 of its own."""
    limits = make_limits(
        groups, slots=32, pages=400, page_size=16, max_seq_len=1040, chunk=256, drafts=drafts
    )
    runner = CheckedRunner(limits)
    engine = make_engine(limits, runner)
    shared = text(0, 1000)
    sent = [request(str(i), shared + text(1 + i, 8), 4, seed=i) for i in range(32)]
    collected = run(engine, *sent)
    assert runner.computed == groups * 1008 + (32 - groups) * 16
    assert sum(o.cached_tokens for o in collected.last.values()) == (32 - groups) * 992
    assert engine.counters().computed_tokens == runner.computed
    assert engine.counters().prompt_tokens == 32 * 1008


def longest_cached(prompt: list[int], before: list[list[int]], limits: Limits) -> int:
    """What can be found: whole pages that one before computed, and the last token never.

    With drafting a page needs the token after it too.
    """
    known = int(limits.num_drafts > 0)
    best = 0
    for tokens in before:
        computed = tokens[: len(tokens) - 1 + known]  # the last token's KV was never computed
        same = 0
        while same < min(len(prompt), len(computed)) and prompt[same] == computed[same]:
            same += 1
        best = max(best, same - known)
    return min(best, len(prompt) - 1) // limits.page_size * limits.page_size


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 20), st.lists(st.integers(0, 2), max_size=4)),
        max_size=8,
    ),
    st.sampled_from([1, 4]),
    st.sampled_from([0, 3]),
)
def test_cached_tokens_are_the_longest_prefix_of_whole_pages(prompts, page_size, drafts):
    limits = make_limits(slots=2, pages=400, page_size=page_size, drafts=drafts)
    engine = make_engine(limits)
    before: list[list[int]] = []
    for i, (family, n, rest) in enumerate(prompts):
        sent = request(str(i), text(family, n) + rest, 5)
        collected = run(engine, sent)
        expected = longest_cached(list(sent.prompt_ids), before, limits)
        assert collected.last[str(i)].cached_tokens == expected
        before.append(Expected(sent).run().tokens)


@pytest.mark.parametrize("drafts", [0, 3])
def test_an_answer_is_found_by_the_next_turn(drafts):
    limits = make_limits(pages=40, max_seq_len=80, drafts=drafts)
    engine = make_engine(limits)
    first = request("1", 10, 15)
    run(engine, first)
    tokens = Expected(first, 80).run().tokens
    cached = run(engine, request("2", [*tokens, 5, 5], 4)).last["2"].cached_tokens
    assert cached == (len(tokens) - 1) // 4 * 4 == 24


def test_prompt_logprobs_are_computed_not_found():
    engine = make_engine(make_limits(pages=40))
    run(engine, request("a", 20, 2))
    for start, cached in [(None, 16), (19, 16), (17, 16), (16, 12), (9, 8), (1, 0), (0, 0)]:
        sent = request(f"from {start}", 20, 2, logprobs=3, prompt_logprobs_start=start)
        assert run(engine, sent).last[sent.id].cached_tokens == cached


def test_prompt_logprobs_wait_for_no_prefix_they_cannot_use():
    limits = make_limits(pages=200, max_seq_len=300)
    engine = make_engine(limits)
    engine.add(request("a", [3] * 200, 2))
    engine.add(request("b", [3] * 200, 2, logprobs=0, prompt_logprobs_start=0))
    engine.step()
    assert engine.load().running == 2


def test_nothing_is_found_after_a_flush_or_without_a_cache():
    engine = make_engine(make_limits(pages=40))
    run(engine, request("a", 20, 2))
    assert engine.load().cached_tokens == 20
    engine.flush_cache()
    assert engine.load().cached_tokens == 0
    assert run(engine, request("b", 20, 2)).last["b"].cached_tokens == 0
    assert run(engine, request("c", 20, 2)).last["c"].cached_tokens == 16
    engine = make_engine(make_limits(pages=40), prefix_cache=False)
    assert [run(engine, request(i, 20, 2)).last[i].cached_tokens for i in "ab"] == [0, 0]


def test_a_request_goes_where_its_prefix_is():
    limits = make_limits(groups=2, slots=4, pages=60, max_seq_len=200)
    engine = make_engine(limits)
    prefixes = text(0, 100), text(1, 100)
    run(engine, *(request(str(i), prefix, 2) for i, prefix in enumerate(prefixes)))
    asked = [request(f"{i}{j}", [*prefixes[i], j], 2) for i in range(2) for j in range(2)]
    assert {o.cached_tokens for o in run(engine, *asked).last.values()} == {100}


def test_groups_share_the_load():
    engine = make_engine(make_limits(groups=2, slots=2))
    for i in range(4):
        engine.add(request(str(i), [i] * 4, 3))
    engine.step()
    assert [len(group.running) for group in engine._scheduler._groups] == [2, 2]


@given(st.lists(st.integers(0, 1), max_size=20), st.integers(0, 20), st.integers(1, 5))
def test_shared_pages_are_whole(tokens, change, page_size):
    other = [*tokens[:change], 2, *tokens[change + 1 :]]
    same = min(change, len(tokens))
    found = shared_pages(np.array(tokens, np.int32), np.array(other, np.int32), page_size)
    assert found == same // page_size


# when pages run out


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("new", [(20, 60), (100, 200)])
def test_little_is_computed_twice_on_a_tight_pool(new, prefix_cache, drafts):
    """64 requests on 64 pages of 16 tokens: a few at a time have room."""
    rng = random.Random(1)
    limits = make_limits(
        slots=32, pages=65, page_size=16, max_seq_len=400, chunk=256, drafts=drafts
    )
    runner = CheckedRunner(limits)
    engine = make_engine(limits, runner, prefix_cache=prefix_cache)
    script_drafting(engine, lambda: True)
    sent = [
        request(str(i), text(i, rng.randint(50, 100)), rng.randint(*new), seed=i) for i in range(64)
    ]
    run(engine, *sent)
    needed = sum(len(r.prompt_ids) for r in sent)
    assert engine.counters().preemptions > 0
    assert runner.computed < (1.35 if prefix_cache else 1.5) * needed


def test_preemption_recomputes_and_changes_nothing():
    engine = make_engine(make_limits(slots=4, pages=11))
    collected = run(engine, *(request(str(i), [i] * (4 + i), 25, logprobs=1) for i in range(4)))
    assert engine.counters().preemptions > 0
    assert set(collected.reasons.values()) == {FinishReason.LENGTH}


@pytest.mark.parametrize("drafts", [0, 3])
def test_as_many_as_can_be_on_pages_for_one(drafts):
    limits = make_limits(slots=5, pages=41, page_size=1, drafts=drafts)
    engine = make_engine(limits)
    collected = run(engine, *(request(str(i), [i] * (1 + 3 * i), 40 - 3 * i - 1) for i in range(9)))
    assert set(collected.reasons.values()) == {FinishReason.LENGTH}


def test_a_preempted_prompt_gives_its_pages_at_once():
    limits = make_limits(slots=2, pages=52, max_seq_len=204, chunk=4)
    engine = make_engine(limits)
    engine.add(request("old", [1] * 40, 100))
    while not any(o.token_ids for o in engine.step()):
        pass
    engine.add(request("new", [2] * 155, 4))
    gap, longest = 0, 0
    while engine.has_work():
        outputs = {o.request_id for o in engine.step()}
        check_accounting(engine._scheduler)
        gap = 0 if "old" in outputs else gap + 1
        if "old" in engine._scheduler._alive:
            longest = max(longest, gap)
    assert longest <= 4


# what is refused


@pytest.mark.parametrize(
    ("prompt", "new", "param"), [(0, 1, "prompt"), (40, None, "prompt"), (30, 11, "max_tokens")]
)
def test_what_can_never_run_is_refused(prompt, new, param):
    engine = make_engine(make_limits())
    with pytest.raises(InvalidRequestError) as error:
        engine.add(Request("a", tuple(range(prompt)), SamplingParams(max_new_tokens=new)))
    assert error.value.param == param
    assert not engine.has_work()


def test_a_full_queue_and_a_used_id_are_refused():
    engine = make_engine(make_limits(), max_queued_requests=2)
    engine.add(request("a", 1, 1))
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        engine.add(request("a", 1, 1))
    engine.add(request("b", 1, 1))
    with pytest.raises(QueueFullError, match="max_queued_requests"):
        engine.add(request("c", 1, 1))
    assert set(run(engine).reasons) == {"a", "b"}


def test_without_a_bound_a_request_runs_to_the_end_of_the_context():
    collected = run(make_engine(make_limits(pages=20)), request("a", 3, None))
    assert len(collected.tokens["a"]) == 37
    assert collected.reasons["a"] is FinishReason.LENGTH
