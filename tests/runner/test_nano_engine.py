"""A trained model, whose drafts are good: they change how soon tokens come, never which."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from answers import Answer, ask

from glmjax.config import SchedulerConfig
from glmjax.engine import Engine
from glmjax.plans import Bucket, ChunkRow, DecodeRow, GroupRows, StepPlan
from glmjax.runner.runner import DeviceRunner
from glmjax.runner.weights import load_mtp
from glmjax.text.chat import ChatTemplate
from glmjax.text.tokenizer import Tokenizer
from glmjax.train.data.encode import render_prompt
from glmjax.train.data.mixture import draw
from glmjax.train.drafting import Acceptance, Drafter
from glmjax.types import Request, SamplingParams

CHATS, STEPS, MOST_STEPS = 12, 3, 30
SHARES = 0.99, 0.62, 0.34  # of drafts that are accepted, by place, as measured on many chats
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def prompts(nano) -> list[tuple[int, ...]]:
    """Token ids of held-out chats."""
    rng, template = random.Random(4), ChatTemplate.from_folder(nano.folder)
    tokenizer = Tokenizer.from_folder(nano.folder)
    chats = [render_prompt(draw(rng, "held_out"), template) for _ in range(3 * CHATS)]
    encoded = (tuple(tokenizer.encode(chat)) for chat in chats)
    return [ids for ids in encoded if len(ids) < 400][:CHATS]


def requests(prompts, eos: tuple[int, ...], **sampling) -> list[Request]:
    """Of many lengths; some end at the model's end tokens, some at others, some at none."""
    made = []
    for i, ids in enumerate(prompts):
        stops = {"ignore_eos": i % 3 == 0, "stop_token_ids": set(eos) if i % 3 == 1 else set()}
        params = SamplingParams(max_new_tokens=10 + 6 * (i % 8), **stops, **sampling)
        made.append(Request(str(i), ids, params))
    return made


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafts_change_nothing(nano, prompts, always_drafting, temperature):
    eos = nano.config.eos_token_ids
    asked = requests(prompts, eos, temperature=temperature, top_p=0.95, seed=11)
    with_drafts, without = Engine(nano.drafting, None, eos), Engine(nano.plain, None, eos)
    expected = ask(without, asked)
    for id, answer in ask(with_drafts, asked).items():
        assert answer.tokens == expected[id].tokens
        assert answer.reason is expected[id].reason
        assert answer.matched_stop == expected[id].matched_stop
    counters = with_drafts.counters()
    assert counters.accepted[0] > 0.85 * counters.drafted[0] > 50
    assert counters.steps < 0.75 * without.counters().steps


def generate(runner: DeviceRunner, prompt: tuple[int, ...], eos: set[int]) -> list[tuple]:
    """New tokens and drafts of each step, up to an end; all drafts are verified, every time."""
    limits, chunk = runner.limits, runner.limits.chunk_tokens
    pages = tuple(range(1, limits.pages_per_seq + 1))
    found = []

    def launch(bucket: Bucket, rows: GroupRows) -> None:
        result = runner.launch(StepPlan(bucket, (rows,))).result()
        row = 0 if rows.decode else bucket.rows
        count = result.accept_lens[0, row]
        if count:
            found.append((result.tokens[0, row, :count].tolist(), result.drafts[0, row].tolist()))

    for start in range(0, len(prompt), chunk):
        ids = np.array(prompt[start : start + chunk], np.int32)
        end = start + len(ids)
        last = end == len(prompt)
        place = (0, pages) if start == 0 else (len(pages), ())
        row = ChunkRow(0, start, ids, -1 if last else prompt[end], last, *place, GREEDY)
        launch(max(limits.buckets), GroupRows(chunks=(row,)))
    decode = DecodeRow(0, STEPS, len(pages), ())
    while len(found) < MOST_STEPS and not eos & set(found[-1][0]):
        launch(Bucket(limits.slots, STEPS, 0, 0), GroupRows(decode=(decode,)))
    return found


def test_drafts_are_those_of_chains_over_the_whole_text(nano, prompts):
    """Of each step, all of them; and as many are accepted as the reference counts."""
    runner = nano.drafting
    mtp = load_mtp(nano.folder, runner._mesh, "float32")
    drafter = Drafter(nano.config, runner._params["model"], mtp, runner._mesh, STEPS)
    eos = set(nano.config.eos_token_ids)
    expected, steps, accepted = Acceptance(), 0, np.zeros(STEPS)
    for prompt in prompts[::2]:
        ids, found = list(prompt), generate(runner, prompt, eos)
        ends = []
        for tokens, _ in found:
            ids += tokens
            ends.append(len(ids))
            accepted += np.arange(STEPS) < len(tokens) - 1
        reference = drafter.drafts(ids)
        for end, (_, drafts) in zip(ends, found, strict=True):
            assert drafts == reference[end - 2].tolist()
        expected.add(len(prompt), ids, reference)
        steps += len(found) - 1
    assert expected.verifications == steps
    assert expected.accepted == accepted.tolist()
    np.testing.assert_allclose(accepted / steps, SHARES, atol=0.2)


def test_after_a_prefix_hit_drafts_are_as_good(nano, prompts, always_drafting):
    """The draft layer's KV is found again with the model's."""

    def continued(prefix_cache: bool) -> tuple[Answer, Answer]:
        engine = Engine(nano.drafting, SchedulerConfig(prefix_cache=prefix_cache))
        sampling = replace(GREEDY, max_new_tokens=40, logprobs=3, ignore_eos=True)
        first = Request("first", prompts[0], replace(sampling, max_new_tokens=1))
        ask(engine, [first])
        again = ask(engine, [Request("again", prompts[0], sampling)])["again"]
        longer = (*prompts[0], *again.tokens, *prompts[1][:9])
        return again, ask(engine, [Request("longer", longer, sampling)])["longer"]

    page = nano.drafting.limits.page_size
    for length, hit, computed in zip(
        (len(prompts[0]), len(prompts[0]) + 40), continued(True), continued(False), strict=True
    ):
        assert computed.cached == 0
        assert length - 2 * page <= hit.cached < length
        assert hit.tokens == computed.tokens
        probs = ([place.logprob for place in answer.logprobs] for answer in (hit, computed))
        np.testing.assert_allclose(*probs, atol=1e-3)
        assert hit.accepted == computed.accepted > 5
        assert hit.drafted == computed.drafted


def test_a_flushed_cache_is_empty(nano, prompts):
    engine = Engine(nano.drafting)
    asked = Request("", max(prompts, key=len), replace(GREEDY, max_new_tokens=2))
    cached = []
    for flush in (False, False, True):
        if flush:
            engine.flush_cache()
            assert engine.load().cached_tokens == 0
        cached.append(ask(engine, [asked])[""].cached)
    assert cached[1] > 0
    assert cached == [0, cached[1], 0]
