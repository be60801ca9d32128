"""Batch-invariant bfloat16: log probabilities are the same bits, whoever shares the device."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmjax.engine import Engine
from glmjax.model.blocks import map_blocks
from glmjax.types import Request, SamplingParams

COUNT = 7


def request(i: int) -> Request:
    """Greedy and seeded, some with log probabilities of the prompt; some lengths cross chunks."""
    prompt = np.random.default_rng(i).integers(0, 192, 3 + 5 * i)
    sampling = SamplingParams(
        max_new_tokens=28,
        ignore_eos=True,
        temperature=0.9 * (i % 2),
        top_k=30,
        top_p=0.9,
        seed=i,
        logprobs=3,
        prompt_logprobs_start=0 if i % 3 == 0 else None,
    )
    return Request(str(i), tuple(prompt.tolist()), sampling)


def run(engine: Engine, indices) -> dict[str, list]:
    """What each request gave: tokens, their log probabilities and those of its prompt."""
    found: dict[str, list] = {str(i): [] for i in indices}
    for i in indices:
        engine.add(request(i))
    while engine.has_work():
        for output in engine.step():
            assert output.error is None
            given = output.token_ids, output.logprobs, output.prompt_logprobs
            found[output.request_id] += [*zip(*given[:2], strict=True), *given[2]]
    return found


def run_alone(runner) -> dict[str, list]:
    """Each with the runner to itself, and nothing cached."""
    return {k: v for i in range(COUNT) for k, v in run(Engine(runner), [i]).items()}


@pytest.fixture(scope="module")
def make(make_runner):
    return partial(make_runner, dtype="bfloat16", deterministic=True)


@pytest.fixture(scope="module")
def runner(make):
    return make()


@pytest.fixture(scope="module")
def alone(runner) -> dict[str, list]:
    found = run_alone(runner)
    assert all(len(values) >= 28 for values in found.values())
    return found


def test_neither_a_crowd_nor_a_cached_prefix_changes_a_bit(runner, alone):
    engine = Engine(runner)
    assert run(engine, range(COUNT)) == alone
    before = engine.counters().cached_tokens
    assert run(engine, range(COUNT)) == alone
    assert engine.counters().cached_tokens > before


def test_neither_preemption_nor_drafts_nor_longer_chunks_change_a_bit(make, alone):
    engine = Engine(make(pages=17, slots=8, drafts=2, chunk=16))
    assert run(engine, range(COUNT)) == alone
    counters = engine.counters()
    assert counters.preemptions > 0
    assert sum(counters.drafted) > 0


@pytest.mark.slow
def test_data_groups_change_no_bit(make, alone):
    assert run(Engine(make(mesh="2x1")), range(COUNT)) == alone


@pytest.mark.slow
def test_without_it_bits_change(make_runner):
    runner = make_runner(dtype="bfloat16")
    assert run(Engine(runner), range(COUNT)) != run_alone(runner)


@settings(max_examples=20, deadline=None)
@given(total=st.sampled_from([1, 16, 40]), count=st.integers(0, 40))
def test_blocks_run_in_order_up_to_the_count(total, count):
    count = min(count, total)
    values = np.arange(1, total + 1, dtype=np.int32)

    def fn(carry, block):
        return carry + block.sum(), (block + carry)[:, None]

    carry, out = jax.jit(lambda x, n: map_blocks(fn, jnp.int32(0), x, n))(values, count)
    ran = -(-count // 16) * 16
    before = np.concatenate([[0], np.cumsum(values)])[np.arange(total) // 16 * 16]
    expected = np.where(np.arange(total) < ran, values + before, 0)
    assert out[:, 0].tolist() == expected.tolist()
    assert carry == values[:ran].sum()
