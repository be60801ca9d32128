"""RMSNorm and rotary embedding against their formulas."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.activation import silu_mul
from pallas_kernels.norm import add_rms_norm, rms_norm
from pallas_kernels.rope import apply_rope, rope_table


def test_rms_norm_multiplies_by_the_plain_weight():
    x = np.array([[3.0, 4.0]], np.float32)
    got = rms_norm(jnp.asarray(x), jnp.array([1.0, 2.0]), 0.0)
    np.testing.assert_allclose(got, x / np.sqrt(12.5) * [1, 2], rtol=1e-6)


def test_rms_norm_works_in_float32_and_casts_before_the_weight():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 64)) * 100, jnp.bfloat16)
    weight = jnp.asarray(np.random.default_rng(1).random(64), jnp.bfloat16)
    x32 = np.asarray(x, np.float32)
    normed = x32 / np.sqrt((x32**2).mean(-1, keepdims=True) + 1e-5)
    expected = jnp.asarray(normed).astype(jnp.bfloat16) * weight
    assert rms_norm(x, weight, 1e-5).dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(rms_norm(x, weight, 1e-5), np.float32), np.asarray(expected, np.float32), 1e-2
    )


def test_add_rms_norm_returns_the_new_residual():
    x, residual = jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 2.0]])
    normed, total = add_rms_norm(x, residual, jnp.ones(2), 0.0)
    np.testing.assert_array_equal(total, [[3.0, 4.0]])
    np.testing.assert_allclose(normed, np.array([[3.0, 4.0]]) / np.sqrt(12.5), rtol=1e-6)


def test_rope_turns_pairs_half_a_rotary_dim_apart_and_leaves_the_rest():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 10)).astype(np.float32)
    positions, rotary, theta = np.array([0, 5, 1000]), 6, 1e4
    cos, sin = rope_table(jnp.asarray(positions), rotary, theta)
    got = np.asarray(apply_rope(jnp.asarray(x), cos, sin))
    for t, position in enumerate(positions):
        for i in range(rotary // 2):
            angle = position * theta ** (-2 * i / rotary)
            z = (x[t, :, i] + 1j * x[t, :, i + rotary // 2]) * np.exp(1j * angle)
            np.testing.assert_allclose(got[t, :, i], z.real, atol=1e-4)
            np.testing.assert_allclose(got[t, :, i + rotary // 2], z.imag, atol=1e-4)
    np.testing.assert_array_equal(got[..., rotary:], x[..., rotary:])


def test_silu_mul_gates_the_first_argument():
    gate, up = jnp.array([2.0]), jnp.array([3.0])
    np.testing.assert_allclose(silu_mul(gate, up), 2 / (1 + np.exp(-2)) * 3, rtol=1e-6)
