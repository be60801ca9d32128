"""A projection's heads on their way to attention: formulas, and the kernel that stores them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.backend import REF, Backend
from pallas_kernels.rope import Rotation, rope_table, rotate, rotate_and_store

KERNELS = Backend("triton", interpret=True)
LAYERS, PAGES, PAGE = 2, 4, 2
compiled = jax.jit(rotate_and_store, static_argnames="backend")


def rotation(rng, tokens, kv_heads, heads, head_dim, rotary, dtype, *, bias=True, norm=True):
    def vector(*shape):
        return jnp.asarray(rng.standard_normal(shape) + 1, dtype)

    cos, sin = rope_table(jnp.asarray(rng.integers(0, 5000, tokens)), rotary, 1e4)
    return Rotation(
        vector(kv_heads, heads, head_dim) if bias else None,
        vector(head_dim) if norm else None,
        vector(head_dim) if norm else None,
        cos,
        sin,
        1e-2,
    )


def formula(qkv, r):
    """Bias, RMSNorm and rotation in float64: q [T, K, G, h], k and v [T, K, h]."""
    qkv = np.asarray(qkv, np.float64)
    if r.bias is not None:
        qkv = qkv + np.asarray(r.bias, np.float64)
    half = r.cos.shape[1]
    angle = (np.asarray(r.cos) + 1j * np.asarray(r.sin))[:, None, None]

    def turn(x, weight):
        if weight is not None:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + r.eps) * np.asarray(weight)
        z = (x[..., :half] + 1j * x[..., half : 2 * half]) * angle
        return np.concatenate([z.real, z.imag, x[..., 2 * half :]], -1)

    key = turn(qkv[:, :, -2:-1], r.k_norm)[:, :, 0]
    return turn(qkv[:, :, :-2], r.q_norm), key, qkv[:, :, -1]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_heads_are_biased_normed_and_turned(bias, norm):
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal((3, 2, 5, 10)), jnp.float32)
    r = rotation(rng, 3, 2, 5, 10, 6, jnp.float32, bias=bias, norm=norm)
    q, k, v = rotate(qkv, r)
    expected_q, expected_k, expected_v = formula(qkv, r)
    np.testing.assert_allclose(q, expected_q.reshape(3, 6, 10), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(k, expected_k, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(v, expected_v, rtol=1e-6)


# What programs are compiled for: [T], (K, G + 2), (h, rotary dim), dtypes, what the model has.
F32, BF16, FP8, BITS = jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.uint16
FORMS = [
    {"tokens": 4, "heads": (2, 5), "dims": (8, 4), "dtype": BF16, "pool": BF16, "has": "bn"},
    {"tokens": 3, "heads": (1, 3), "dims": (2, 2), "dtype": F32, "pool": F32, "has": "n"},
    {"tokens": 2, "heads": (1, 4), "dims": (7, 6), "dtype": BF16, "pool": BITS, "has": "bn"},
    {"tokens": 4, "heads": (2, 4), "dims": (16, 8), "dtype": BF16, "pool": FP8, "has": "bn"},
]


@st.composite
def stores(draw):
    """A form, and distinct places for its tokens; some are padding, on page 0."""
    form = draw(st.sampled_from(FORMS))
    tokens = form["tokens"]
    places = draw(st.permutations(range(PAGE, PAGES * PAGE)))[:tokens]
    padded = draw(st.integers(0, tokens - 1))
    return {
        **form,
        "places": np.array(places) * (np.arange(tokens) < tokens - padded),
        "layer": draw(st.integers(0, LAYERS - 1)),
        "seed": draw(st.integers(0, 99)),
    }


def arrays(case) -> tuple[Any, ...]:
    """Arguments of `rotate_and_store`; pools have something everywhere, values go beyond 448."""
    rng = np.random.default_rng(case["seed"])
    (kv_heads, heads), (head_dim, rotary) = case["heads"], case["dims"]
    tokens, dtype = len(case["places"]), case["dtype"]
    qkv = jnp.asarray(rng.standard_normal((tokens, kv_heads, heads, head_dim)) * 400, dtype)
    has = {"bias": "b" in case["has"], "norm": "n" in case["has"]}
    r = rotation(rng, tokens, kv_heads, heads, head_dim, rotary, dtype, **has)
    shape = (LAYERS, PAGES, PAGE, kv_heads, head_dim)
    pools = [jnp.asarray(rng.integers(1, 99, shape), case["pool"]) for _ in "kv"]
    ids, offsets = (jnp.asarray(x, jnp.int32) for x in np.divmod(case["places"], PAGE))
    return qkv, r, *pools, jnp.int32(case["layer"]), ids, offsets


def numbers(pool):
    if pool.dtype == jnp.uint16:
        pool = jax.lax.bitcast_convert_type(pool, jnp.bfloat16)
    return np.asarray(pool, np.float32)


@settings(deadline=None, max_examples=15)
@given(stores())
def test_the_kernel_turns_and_stores(case):
    args = arrays(case)
    q, *pools = compiled(*args, backend=KERNELS)
    expected_q, *expected = compiled(*args, backend=REF)
    assert q.dtype == expected_q.dtype
    exact = case["dtype"] == jnp.bfloat16
    scale = float(jnp.max(jnp.abs(expected_q)))
    np.testing.assert_allclose(
        np.asarray(q, np.float32),
        np.asarray(expected_q, np.float32),
        rtol=2**-7 if exact else 1e-5,
        atol=scale * (2**-8 if exact else 1e-5),
    )
    for got, want, before in zip(pools, expected, args[2:4], strict=True):
        assert got.dtype == want.dtype
        check_pool(numbers(got), numbers(want), numbers(before), case)


def check_pool(got, want, before, case):
    """Written places hold what the plain form writes, page 0 anything, all others what was."""
    assert np.all(np.isfinite(got))
    layer, rows = case["layer"], case["places"][case["places"] > 0]
    pages, offsets = np.divmod(rows, PAGE)
    step = {jnp.float8_e4m3fn: 2**-3}.get(case["pool"], 2**-7)
    written = got[layer, pages, offsets], want[layer, pages, offsets]
    np.testing.assert_allclose(*written, rtol=step, atol=8.0)
    close = np.isclose(*written, rtol=1e-3, atol=1e-2)
    assert close.mean() > 0.9  # the rest may be a rounding away
    got, before = got.copy(), before.copy()
    for pool in (got, before):
        pool[layer, pages, offsets] = 0
        pool[layer, 0] = 0
    np.testing.assert_array_equal(got, before)


def test_what_fp8_cannot_hold_is_clamped():
    case = {"places": np.array([3]), "heads": (1, 3), "dims": (4, 2), "layer": 1, "seed": 0}
    qkv, *rest = arrays(case | {"dtype": F32, "pool": FP8, "has": ""})
    for backend in (REF, KERNELS):
        _, k_pages, v_pages = rotate_and_store(jnp.sign(qkv) * 1e4, *rest, backend=backend)
        np.testing.assert_array_equal(np.abs(numbers(v_pages)[1, 1, 1]), 448)
        np.testing.assert_array_equal(np.abs(numbers(k_pages)[1, 1, 1]).max(), 448)


def test_the_norms_weights_are_of_queries_and_of_keys():
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal((2, 1, 4, 6)), jnp.float32)
    r = rotation(rng, 2, 1, 4, 6, 4, jnp.float32, bias=False)
    pool = jnp.zeros((1, 2, 2, 1, 6), jnp.float32)
    pages, offsets = jnp.ones(2, jnp.int32), jnp.arange(2, dtype=jnp.int32)

    def run(r):
        return compiled(qkv, r, pool, pool, jnp.int32(0), pages, offsets, backend=KERNELS)

    doubled = replace(r, k_norm=2 * jnp.asarray(r.k_norm))
    (q, k, v), (q2, k2, v2) = run(r), run(doubled)
    np.testing.assert_array_equal(q, q2)
    np.testing.assert_array_equal(v, v2)
    np.testing.assert_allclose(2 * k, k2, rtol=1e-6)
