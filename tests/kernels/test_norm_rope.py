"""RMSNorm, rotary embedding and SwiGLU's middle against their formulas, kernels against both."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.activation import silu_mul
from pallas_kernels.backend import Backend
from pallas_kernels.linear import QuantRows, quantize_rows
from pallas_kernels.norm import add_rms_norm, rms_norm
from pallas_kernels.rope import apply_rope, rope_table

KERNELS = Backend("triton", interpret=True)
DTYPES = st.sampled_from([jnp.float32, jnp.bfloat16])
few = settings(deadline=None, max_examples=8)


def normal(seed, shape, dtype, spread=1.0):
    """Rows of different sizes, the first all zeros."""
    x = np.random.default_rng(seed).standard_normal(shape) * spread
    x *= 4.0 ** np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    x[0] *= shape[0] == 1
    return jnp.asarray(x, dtype)


def close(got, expected, dtype):
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-7  # one step of bfloat16
    assert got.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(expected, np.float32), tolerance, tolerance**2
    )


def same_rows(got, expected):
    """But for the last bit of a scale, and what it rounds the other way: a step of FP8."""
    (values, scale), (wanted, wanted_scale) = got, expected
    assert values.dtype == wanted.dtype == jnp.float8_e4m3fn
    np.testing.assert_allclose(scale, wanted_scale, rtol=1e-6)
    values, wanted = np.asarray(values, np.float32), np.asarray(wanted, np.float32)
    np.testing.assert_allclose(values, wanted, rtol=1 / 8, atol=2**-9)
    assert np.sum(values != wanted) <= values.size // 50


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
    normed, quantized, total = add_rms_norm(x, residual, jnp.ones(2), 0.0)
    assert quantized is None
    np.testing.assert_array_equal(total, [[3.0, 4.0]])
    np.testing.assert_allclose(normed, np.array([[3.0, 4.0]]) / np.sqrt(12.5), rtol=1e-6)


@few
@given(
    tokens=st.integers(1, 9),
    width=st.sampled_from([1, 5, 96, 128, 300, 520]),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_the_norm_kernel_is_the_norm_then_quantised(tokens, width, dtype, seed):
    x, residual = (normal(seed + i, (tokens, width), dtype) for i in (0, 1))
    weight = normal(seed + 2, (1, width), dtype)[0] + 1
    y, quantized, total = add_rms_norm(x, residual, weight, 1e-5, quantize=True, backend=KERNELS)
    expected, _, expected_total = add_rms_norm(x, residual, weight, 1e-5)
    np.testing.assert_array_equal(
        np.asarray(total, np.float32), np.asarray(expected_total, np.float32)
    )
    close(y, expected, dtype)
    assert quantized is not None
    same_rows(quantized, quantize_rows(y))


def test_the_norm_kernel_need_not_quantise():
    x, residual = (normal(i, (3, 40), jnp.bfloat16) for i in (0, 1))
    weight = normal(2, (1, 40), jnp.float32)[0]
    y, quantized, total = add_rms_norm(x, residual, weight, 1e-5, backend=KERNELS)
    expected, _, expected_total = add_rms_norm(x, residual, weight, 1e-5)
    assert quantized is None
    close(y, expected, jnp.bfloat16)
    close(total, expected_total, jnp.bfloat16)


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


def test_silu_mul_gates_the_first_half():
    gate_up = jnp.array([[[2.0], [3.0]]])
    np.testing.assert_allclose(silu_mul(gate_up), [[2 / (1 + np.exp(-2)) * 3]], rtol=1e-6)


@few
@given(
    tokens=st.integers(1, 9),
    width=st.sampled_from([1, 5, 96, 128, 300, 520]),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_the_silu_kernel_is_the_formula_then_quantised(tokens, width, dtype, seed):
    gate_up = normal(seed, (tokens, 2, width), dtype, spread=0.01)
    wide = np.asarray(gate_up, np.float64)
    hidden = silu_mul(gate_up, backend=KERNELS)
    sigmoid = (1 + np.tanh(wide[:, 0] / 2)) / 2  # no overflow, whatever was drawn
    close(hidden, wide[:, 0] * sigmoid * wide[:, 1], dtype)
    close(silu_mul(gate_up), np.asarray(hidden, np.float32), dtype)
    quantized = silu_mul(gate_up, quantize=True, backend=KERNELS)
    assert isinstance(quantized, QuantRows)
    same_rows(quantized, quantize_rows(hidden))
    same_rows(silu_mul(gate_up, quantize=True), quantize_rows(silu_mul(gate_up)))
