"""Grouped experts against loops in numpy."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.linear import dot, quantize
from pallas_kernels.moe import grouped_mlp


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


def fp8_weight(rng, shape, block):
    """FP8 values with scales, and what they stand for."""
    values, scale = quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), block)
    meaning = (np.asarray(values, np.float32) * np.asarray(scale)[..., None]).reshape(
        *shape[:-1], -1
    )
    flat = values.reshape(*shape[:-1], -1)[..., : shape[-1]]
    return flat, scale, meaning[..., : shape[-1]]


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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_shared_expert_is_added_to_the_rounded_sum(dtype):
    rng = np.random.default_rng(5)
    shapes = (5, 6), (4, 2, 4, 6), (4, 6, 4), (5, 6)
    x, gate_up, down, shared = (jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)
    ids = jnp.asarray(np.argsort(rng.random((5, 4)), axis=1)[:, :2])
    weights = jnp.asarray(rng.random((5, 2)), jnp.float32)
    routed = grouped_mlp(x, ids, weights, gate_up, down)
    got = grouped_mlp(x, ids, weights, gate_up, down, shared=shared)
    assert (routed.dtype, got.dtype) == (jnp.float32, dtype)
    np.testing.assert_array_equal(got, routed.astype(dtype) + shared)


@pytest.mark.parametrize(("ways", "share"), [(1, 256), (4, 64)])
def test_capacities_are_those_of_a_device_that_has_some_of_the_experts(ways, share):
    """Of 512 tokens with 2 choices, 4 experts here; any number of them may come all the same."""
    tokens, shapes = 512, ((4, 2, 4, 6), (4, 6, 4))
    gate_up, down = (jnp.ones(shape) for shape in shapes)
    x, weights = jnp.ones((tokens, 6)), jnp.ones((tokens, 2))
    run = partial(grouped_mlp, ways=ways)
    ids = jnp.asarray(np.arange(2 * tokens).reshape(tokens, 2) % 4)
    text = str(jax.make_jaxpr(run)(x, ids, weights, gate_up, down))
    for slack in (1.25, 1.5):
        assert f"f32[4,{int(share * slack)},6]" in text
    hot = jnp.broadcast_to(jnp.array([3, 1]), (tokens, 2))
    for chosen in (ids, hot):
        got = np.asarray(run(x, chosen, weights, gate_up, down))
        np.testing.assert_allclose(got, np.full((tokens, 6), 2 * 4 * 6 * silu(6.0)), rtol=1e-5)


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
