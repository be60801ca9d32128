"""Routing against the published rule, a token at a time; the kernel runs in the interpreter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.backend import REF, Backend
from pallas_kernels.router import route

TRITON = Backend("triton", interpret=True)
OPTIONS = ("top_k", "n_group", "topk_group", "norm_topk_prob", "scaling_factor")
BACKENDS = pytest.mark.parametrize("backend", [REF, TRITON], ids=lambda b: b.name)
choose = jax.jit(route, static_argnames=(*OPTIONS, "backend"))
PLAIN = {
    "top_k": 3,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "scaling_factor": 1.0,
}


def route_loop(logits, bias, top_k, n_group, topk_group, norm, scaling):
    """The published rule, a token at a time."""
    all_ids, all_weights = [], []
    for row in logits:
        scores = 1 / (1 + np.exp(-row.astype(np.float64)))
        choice = scores + bias
        groups = np.split(np.arange(len(row)), n_group)
        best = sorted(groups, key=lambda g: -np.sort(choice[g])[-2:].sum())[:topk_group]
        allowed = np.concatenate(best)
        ids = sorted(allowed, key=lambda e: (-choice[e], e))[:top_k]
        weights = scores[ids] / (scores[ids].sum() + 1e-20) if norm else scores[ids]
        all_ids.append(ids)
        all_weights.append(weights * scaling)
    return np.array(all_ids), np.array(all_weights)


@BACKENDS
@settings(max_examples=30)
@given(
    sizes=st.sampled_from([(1, 16, 1), (5, 16, 3), (3, 160, 8)]),
    groups=st.sampled_from([(1, 1), (4, 2), (4, 4), (2, 1)]),
    norm=st.booleans(),
    bias_at=st.sampled_from([0.0, 7.0, -7.0]),
    seed=st.integers(0, 2**16),
)
def test_route_equals_the_published_rule(backend, sizes, groups, norm, bias_at, seed):
    tokens, experts, top_k = sizes
    rng = np.random.default_rng(seed)
    # Scores at steps: rounding, coarser by the bias, does not swap neighbours.
    order = rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)
    scores = (order + 1) / (experts + 2)
    logits = np.log(scores / (1 - scores)).astype(np.float32)
    bias = (bias_at + 0.2 * rng.standard_normal(experts) / (experts + 2)).astype(np.float32)
    ids, weights = choose(
        jnp.asarray(logits),
        jnp.asarray(bias),
        top_k=top_k,
        n_group=groups[0],
        topk_group=groups[1],
        norm_topk_prob=norm,
        scaling_factor=2.5,
        backend=backend,
    )
    expected_ids, expected_weights = route_loop(logits, bias, top_k, *groups, norm, 2.5)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)


@BACKENDS
def test_ties_go_to_the_lowest_expert(backend):
    bias = jnp.array([0.0, 1, 0, 1, 0, 0, 1, 1, 0, 0])
    ids, _ = route(jnp.zeros((2, 10)), bias, backend=backend, **{**PLAIN, "top_k": 6})
    assert ids.tolist() == [[1, 3, 6, 7, 0, 2]] * 2


@BACKENDS
def test_padding_has_the_ids_of_no_expert_and_changes_no_other(backend):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((4, 10)), jnp.float32)
    valid = jnp.array([True, False, True, False])
    all_ids, all_weights = route(logits, jnp.zeros(10), backend=backend, **PLAIN)
    ids, weights = route(logits, jnp.zeros(10), valid=valid, backend=backend, **PLAIN)
    np.testing.assert_array_equal(ids, np.where(valid[:, None], all_ids, 10))
    np.testing.assert_array_equal(weights, all_weights)


@BACKENDS
def test_the_bias_steers_the_choice_but_not_the_weights(backend):
    logits, bias = jnp.array([[2.0, 1.0, -1.0, 0.5]]), jnp.array([0.0, -9.0, 9.0, 0.0])
    options = {**PLAIN, "norm_topk_prob": False, "top_k": 2}
    ids, weights = route(logits, bias, backend=backend, **options)
    assert ids.tolist() == [[2, 0]]
    np.testing.assert_allclose(weights, 1 / (1 + np.exp([[1.0, -2.0]])), rtol=1e-6)


def test_a_token_that_is_not_finite_has_ids_within_the_experts_or_paddings():
    logits = jnp.array([[np.nan] * 10, [0.0] * 10])
    ids, weights = route(logits, jnp.zeros(10), backend=TRITON, **PLAIN)
    assert np.all((ids[0] >= 0) & (ids[0] <= 10))
    assert ids[1].tolist() == [0, 1, 2]
    assert np.all(np.isfinite(weights[1]))
