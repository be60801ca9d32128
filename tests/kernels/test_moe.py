"""Router and grouped experts against loops in numpy."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.linear import dot, quantize, scaled_linear
from pallas_kernels.moe import grouped_mlp
from pallas_kernels.router import route


def silu(x):
    return x / (1 + np.exp(-x))


def expert_loop(x, ids, weights, gate_up, down):
    out = np.zeros((x.shape[0], down.shape[1]))
    for t in range(x.shape[0]):
        for e, w in zip(ids[t], weights[t], strict=True):
            if e < gate_up.shape[0]:
                out[t] += w * (down[e] @ (silu(gate_up[e, 0] @ x[t]) * (gate_up[e, 1] @ x[t])))
    return out


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.sampled_from([1, 2, 3, 9, 40]),
    experts=st.sampled_from([2, 5]),
    pattern=st.sampled_from(["random", "one hot expert", "padding"]),
    rows=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 2**16),
)
def test_no_token_is_dropped_whatever_the_load(tokens, experts, pattern, rows, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, 6))
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :2]
    if pattern == "one hot expert":
        ids[:, 0], ids[:, 1] = 1, 0
    if pattern == "padding":
        ids[tokens // 2 :] = experts
    weights = rng.random((tokens, 2))
    gate_up = rng.standard_normal((experts, 2, 4, 6))
    down = rng.standard_normal((experts, 6, 4))
    f32 = [jnp.asarray(a, jnp.float32) for a in (weights, gate_up, down)]
    got = grouped_mlp(jnp.asarray(x, jnp.float32), jnp.asarray(ids), *f32, rows=rows)
    expected = expert_loop(x, ids, weights, gate_up, down)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


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


@settings(max_examples=40, deadline=None)
@given(
    groups=st.sampled_from([(1, 1), (4, 2), (4, 4), (2, 1)]),
    norm=st.booleans(),
    bias_at=st.sampled_from([0.0, 7.0]),
    seed=st.integers(0, 2**16),
)
def test_route_equals_the_published_rule(groups, norm, bias_at, seed):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((5, 16)).astype(np.float32)
    bias = (bias_at + 0.3 * rng.standard_normal(16)).astype(np.float32)
    ids, weights = route(
        jnp.asarray(logits),
        jnp.asarray(bias),
        top_k=3,
        n_group=groups[0],
        topk_group=groups[1],
        norm_topk_prob=norm,
        scaling_factor=2.5,
    )
    expected_ids, expected_weights = route_loop(logits, bias, 3, *groups, norm, 2.5)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)


def test_ties_go_to_the_lowest_expert():
    ids, _ = route(
        jnp.zeros((1, 8)),
        jnp.zeros(8),
        top_k=3,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        scaling_factor=1.0,
    )
    assert ids.tolist() == [[0, 1, 2]]


def fp8_weight(rng, shape, block):
    """FP8 values with scales, and what they stand for."""
    values, scale = quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), block)
    meaning = (np.asarray(values, np.float32) * np.asarray(scale)[..., None]).reshape(
        *shape[:-1], -1
    )
    flat = values.reshape(*shape[:-1], -1)[..., : shape[-1]]
    return flat, scale, meaning[..., : shape[-1]]


@pytest.mark.parametrize("block", [None, 4])
def test_fp8_products_scale_by_token_and_channel(block):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 10)).astype(np.float32) * np.array([[1], [100], [0]], np.float32)
    values, scale, weight = fp8_weight(rng, (7, 10), block)
    x_q, x_scale = quantize(jnp.asarray(x), block)
    x_meaning = (np.asarray(x_q, np.float32) * np.asarray(x_scale)[..., None]).reshape(3, -1)
    expected = x_meaning[:, :10] @ weight.T
    got = scaled_linear(jnp.asarray(x), values, scale, block)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got, x @ weight.T, atol=0.1 * np.abs(x @ weight.T).max())


def test_quantizing_never_overflows():
    x = jnp.array([[448.0001, -1e30, 3e38]])
    values, _ = quantize(x)
    assert bool(jnp.all(jnp.isfinite(values.astype(jnp.float32))))


@pytest.mark.parametrize("block", [None, 4])
def test_fp8_experts_equal_their_dequantised_weights(block):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((6, 8)), jnp.float32)
    ids = jnp.asarray(np.argsort(rng.random((6, 3)), axis=1)[:, :2])
    weights = jnp.asarray(rng.random((6, 2)), jnp.float32)
    gate_up, gate_up_scale, gate_up_meaning = fp8_weight(rng, (3, 2, 8, 8), block)
    down, down_scale, down_meaning = fp8_weight(rng, (3, 8, 8), block)
    got = grouped_mlp(x, ids, weights, gate_up, down, gate_up_scale, down_scale, block=block)
    exact = expert_loop(*map(np.asarray, (x, ids, weights)), gate_up_meaning, down_meaning)
    assert np.abs(got - exact).max() < 0.1 * np.abs(exact).max()
    assert np.abs(got - exact).max() > 0, "activations were not quantised"


def test_rows_are_independent_of_the_rest_of_the_batch():
    rng = np.random.default_rng(2)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in ((4, 2, 4, 6), (4, 6, 4))]
    x = rng.standard_normal((9, 6)).astype(np.float32)
    ids = np.argsort(rng.random((9, 4)), axis=1)[:, :2]
    weights = rng.random((9, 2)).astype(np.float32)
    together = jax.jit(grouped_mlp)(x, ids, weights, *arrays)
    one = jax.jit(grouped_mlp)(x[:1], ids[:1], weights[:1], *arrays)
    np.testing.assert_allclose(together[:1], one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_with_a_fixed_capacity_no_bit_depends_on_the_others(dtype):
    """Alone, and as any place among tokens that fill the same experts or others."""
    rng = np.random.default_rng(4)
    shapes = (8, 2, 48, 80), (8, 80, 48)
    arrays = [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]
    x = jnp.asarray(rng.standard_normal((16, 80)), dtype)
    ids = np.argsort(rng.random((16, 8)), axis=1)[:, :3]
    weights = rng.random((16, 3)).astype(np.float32)
    run = jax.jit(partial(grouped_mlp, rows=4))
    together = np.asarray(run(x, ids, weights, *arrays))
    for t in range(16):
        alone = np.where(np.arange(16)[:, None] == t, ids, 8)
        np.testing.assert_array_equal(run(x, alone, weights, *arrays)[t], together[t])
    order = rng.permutation(16)
    shuffled = run(x[order], ids[order], weights[order], *arrays)
    np.testing.assert_array_equal(shuffled, together[order])


@pytest.mark.parametrize("rows", [1, 7, 8])
def test_few_bfloat16_rows_are_widened_not_changed(rows):
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((rows, 64)), jnp.bfloat16)
    weight = jnp.asarray(rng.standard_normal((2, 5, 64)), jnp.bfloat16)
    exact = np.einsum("tk,mnk->tmn", np.asarray(x, np.float64), np.asarray(weight, np.float64))
    got = jax.jit(dot, static_argnums=0)("tk,...nk->t...n", x, weight)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-4)
