"""The engine on devices: what a request gives depends on nothing but itself."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

from glmjax.engine import Engine
from glmjax.types import Bucket, Request, SamplingParams, StepPlan


def request(i: int, **sampling) -> Request:
    prompt = np.random.default_rng(i).integers(0, 192, 3 + 5 * i)
    params = {"temperature": 0.9 * (i % 2), "top_k": 30, "top_p": 0.9, "seed": i} | sampling
    return Request(
        str(i),
        tuple(prompt.tolist()),
        SamplingParams(max_new_tokens=18, ignore_eos=True, **params),
    )


def run(runner, requests: list[Request]) -> dict[str, list[int]]:
    engine = Engine(runner)
    tokens: dict[str, list[int]] = {r.id: [] for r in requests}
    for r in requests:
        engine.add(r)
    while engine.has_work():
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    return tokens


@pytest.fixture(scope="module")
def runner(make_runner):
    return make_runner()


@pytest.fixture(scope="module")
def alone(runner) -> dict[str, list[int]]:
    """Each request with the runner to itself."""
    return {k: v for i in range(7) for k, v in run(runner, [request(i)]).items()}


def test_a_crowd_changes_nothing(runner, alone):
    assert run(runner, [request(i) for i in range(7)]) == alone


def test_preemption_changes_nothing(make_runner, alone):
    cramped = make_runner(pages=17)  # one sequence of 64 fits, four do not
    assert run(cramped, [request(i) for i in range(7)]) == alone


def test_data_groups_and_tensor_parts_change_nothing(make_runner, alone):
    split = make_runner(mesh="2x4")
    assert run(split, [request(i) for i in range(7)]) == alone


def test_bfloat16_runs_and_is_near(make_runner, alone):
    tokens = run(make_runner(dtype="bfloat16"), [request(i, temperature=0) for i in range(4)])
    assert all(len(t) == 18 for t in tokens.values())
    exact = run(make_runner(), [request(i, temperature=0) for i in range(4)])
    assert sum(tokens[i][0] == exact[i][0] for i in exact) >= 2


def test_a_shape_that_was_not_compiled_is_an_error(runner):
    with pytest.raises(KeyError):
        runner.launch(StepPlan(Bucket(3, 3, 1), ((),)))


def test_the_kv_pool_is_updated_in_place(runner):
    pool_bytes = sum(a.nbytes for a in jax.tree.leaves(runner._state.kv))
    for program in runner._programs.values():
        assert program.memory_analysis().alias_size_in_bytes >= pool_bytes


def test_a_layer_sums_twice_over_tensor_parallel_devices(make_runner):
    program = make_runner(mesh="8")._programs[Bucket(4, 4, 1)]
    sums = len(re.findall(r" all-reduce(?:-start)?\(", program.as_text()))
    assert sums == 2 * 2 + 1, "two a layer, and one for the embedding"
    gathers = len(re.findall(r" all-gather(?:-start)?\(", program.as_text()))
    assert gathers == 1, "the logits"
