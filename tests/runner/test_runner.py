"""The programs themselves: what they were compiled to, and what they hold."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from answers import ask
from tiny import TINY

from glmjax.config import CacheConfig, MeshConfig, SchedulerConfig
from glmjax.engine import Engine
from glmjax.model.decoder import Decoder
from glmjax.model.mtp import MTP
from glmjax.model.spec import abstract, specs_of
from glmjax.plans import Bucket, Limits, StepPlan
from glmjax.runner.compiled import lower_step
from glmjax.runner.state import state_specs
from glmjax.scheduler.limits import make_limits
from glmjax.sharding import make_mesh
from glmjax.types import Request, SamplingParams

CACHE = CacheConfig(page_size=16, num_pages=8200)


def requests(count: int) -> list[Request]:
    rng = np.random.default_rng(0)
    sampling = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0)
    prompts = (rng.integers(0, TINY.vocab_size, 5 + 9 * i).tolist() for i in range(count))
    return [Request(str(i), tuple(p), sampling) for i, p in enumerate(prompts)]


def compile_decode(mesh: str, drafts: int, max_seq_len: int = 64):
    """One decode program alone, of four rows, without a single array; and its limits."""
    shape = MeshConfig.parse(mesh)
    config = replace(TINY, max_position_embeddings=1 << 17).replicated(shape.tensor)
    scheduler = SchedulerConfig(4, max_seq_len=max_seq_len, speculative_num_steps=drafts)
    limits: Limits = make_limits(config, shape, CACHE, scheduler)
    devices = make_mesh(shape)
    specs = {"model": specs_of(Decoder(config))} | (
        {"mtp": specs_of(MTP(config))} if drafts else {}
    )
    state = state_specs(config, limits, config.dtype)
    params, state = abstract(specs, devices), abstract(state, devices)
    bucket = Bucket(limits.slots, drafts, 0, 0)
    return lower_step(config, limits, bucket, devices, params, state).compile(), limits


def test_bfloat16_runs_and_is_near(make_runner, oracle):
    """Logits of the same text, as many of them as are not lost in sums of another rounding."""
    answers = ask(Engine(make_runner(dtype="bfloat16")), requests(5))
    for asked in requests(5):
        answer, start = answers[asked.id], len(asked.prompt_ids) - 1
        logits = oracle.logits([*asked.prompt_ids, *answer.tokens])[start:-1]
        expected = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        chosen = expected[np.arange(len(answer.tokens)), answer.tokens]
        errors = np.abs(chosen - [place.logprob for place in answer.logprobs])
        assert np.median(errors) < 0.3
        assert np.mean(chosen > expected.max(axis=1) - 1.0) > 0.8


def test_a_shape_that_was_not_compiled_is_an_error(plain):
    with pytest.raises(KeyError):
        plain.launch(StepPlan(Bucket(3, 0, 0, 0), ()))


def test_drafts_need_a_block_that_makes_them(plain, drafting):
    with pytest.raises(ValueError, match="2 drafts, but no MTP block"):
        type(plain)(TINY, plain._params["model"], plain._mesh, drafting.limits)


@pytest.mark.parametrize("name", ["plain", "drafting", "split"])
def test_the_kv_pool_is_updated_in_place(request, name):
    runner = request.getfixturevalue(name)
    leaves = jax.tree.leaves(runner._state.kv)
    pool_bytes = sum(a.addressable_shards[0].data.nbytes for a in leaves)
    for program in runner._programs.values():
        assert program.memory_analysis().alias_size_in_bytes >= pool_bytes


def test_the_pool_takes_what_was_planned(drafting):
    kv, limits = drafting._state.kv, drafting.limits
    token_bytes = TINY.kv_bytes_per_token(drafting=True)
    assert kv.k.nbytes + kv.v.nbytes == limits.pages * limits.page_size * token_bytes


def test_after_a_reset_it_starts_afresh(drafting, oracle):
    for _ in range(2):
        drafting.reset()
        assert all(not np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(drafting._state))
        answers = ask(Engine(drafting), requests(5))
        for asked in requests(5):
            oracle.check(asked, answers[asked.id])


def test_a_layer_sums_twice_over_tensor_parallel_devices():
    text = compile_decode("8", drafts=0)[0].as_text()
    sums = len(re.findall(r" all-reduce(?:-start)?\(", text))
    assert sums == 2 * 2 + 1, "two a layer, and one for the embedding"
    gathers = len(re.findall(r" all-gather(?:-start)?\(", text))
    assert gathers == 1, "the logits"


def test_a_longer_context_costs_a_step_nothing():
    """With the same pool: no buffer and no access grows with the width of the page table."""
    (short, few), (long, many) = (compile_decode("1", 2, n) for n in (1 << 12, 1 << 17))
    assert few.pages == many.pages
    memory = short.memory_analysis(), long.memory_analysis()
    assert memory[0].temp_size_in_bytes == memory[1].temp_size_in_bytes > 0
    table_bytes = 4 * few.slots * (many.pages_per_seq - few.pages_per_seq)
    assert memory[1].argument_size_in_bytes - memory[0].argument_size_in_bytes == table_bytes
    accessed = [program.cost_analysis()["bytes accessed"] for program in (short, long)]
    assert accessed[1] - accessed[0] <= 8 * table_bytes, "new pages are entered, no table copied"
